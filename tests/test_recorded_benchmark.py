"""`benchmarks/recorded.py`: its figures are those of the labels, and what it does not compute could not differ."""

import csv
import importlib
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_watchdog.metrics import Step
from grpo_watchdog.recorded import recorded

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "recorded.py"
INF = math.inf
COLUMNS = ("name", "file", "severity", "severity_1", "severity_2", "label", "trouble_step", "must_by", "steps_per_row",
           "family")  # fmt: skip


def part(name: str) -> Any:  # noqa: ANN401 - mypy does not look for what stands beside a script
    """Return a module that stands beside the script, as the script finds it."""
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        return importlib.import_module(f"recorded_parts.{name}")
    finally:
        sys.path.pop(0)


tables, variants, packages = part("tables"), part("variants"), part("packages")


def rows(*, kl_from: int = 10**9, nan_from: int = 10**9) -> list[dict[str, float]]:
    """Return 40 rows of a run that learns, as TRL logs it; from a step on its KL is 50, or its numbers are NaN."""
    found = []
    for step in range(1, 41):
        wave = 0.02 * math.sin(2.1 * step)
        broken = math.nan if step >= nan_from else 0.0
        found.append({
            "step": step, "loss": 0.01 + wave / 10 + broken, "grad_norm": 0.5 + wave + broken, "entropy": 0.6 + wave,
            "kl": 50.0 if step >= kl_from else 0.001 * step, "reward": 0.3 + 0.01 * step + wave,
            "reward_std": 0.3 + wave, "frac_reward_zero_std": 0.1, "completions/mean_length": 120 + 100 * wave,
            "completions/clipped_ratio": 0.05 + wave / 10, "learning_rate": 1e-6,
        })  # fmt: skip
    return found


def write(path: Path, table: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "calm.csv", rows())
    write(tmp_path / "far.csv", rows(kl_from=20))
    write(tmp_path / "nan.csv", rows(nan_from=30))
    write(tmp_path / "late.csv", rows(nan_from=35))
    labels = [
        ("calm", "calm.csv", "ok", "ok", "ok", "healthy", "", "", "", "a"),
        ("far", "far.csv", "crit", "crit", "crit", "diverged", 20, 30, "", "b"),
        ("nan", "nan.csv", "crit", "crit", "crit", "nan", 30, 35, "", "a"),
        ("late", "late.csv", "crit", "crit", "crit", "nan", 5, 10, "", "a"),
        ("gone", "gone.csv", "ok", "ok", "ok", "healthy", "", "", "", "c"),
    ]
    write(tmp_path / "labels.csv", [dict(zip(COLUMNS, row, strict=True)) for row in labels])
    return tmp_path


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False, timeout=100
    )


def test_where_there_are_no_runs_it_says_so(tmp_path: Path) -> None:
    done = run(tmp_path / "absent")
    assert done.returncode == 0
    assert done.stdout == f"{tmp_path / 'absent'} is not there: nothing to measure on\n"


@pytest.mark.parametrize(
    ("text", "said"), [("file,severity\nx.csv,fine\n", "severity 'fine'"), ("file\nx.csv\n", "no column")]
)
def test_labels_that_cannot_be_used_are_one_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "labels.csv").write_text(text)
    done = run(tmp_path)
    assert done.returncode == 1
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_figures_are_of_the_labels(folder: Path) -> None:
    done = run(folder, "--json", "--quick")
    assert done.returncode == 0, done.stderr
    whole = json.loads(done.stdout)
    assert (whole["runs"], whole["unread"]) == (5, 1)
    guarded, plain = whole["books"]["guarded"], whole["books"]["non-finite only"]
    assert guarded["crit_recall"] == round(
        2 / 3, 3
    )  # `late` is called when there is something to see, and that is late
    assert plain["crit_recall"] == round(1 / 3, 3)
    assert guarded["ok_silent"] == plain["ok_silent"] == 0.5  # what could not be read was not left alone either
    assert guarded["crit_premature"] == guarded["false_critical"] == 0.0
    assert guarded["warn_recall"] is guarded["disputed_within"] is None
    assert {entry["run"]: entry["comes_to"] for entry in whole["wrong"] if entry["run"] != "gone"} == {"late": "late"}
    for name, module in (("rlwatch", "rlwatch"), ("rldoctor", "rl_doctor")):
        if importlib.util.find_spec(module) is None:
            assert whole["books"][name] is None


def test_every_table_is_printed_and_what_hangs_on_one_family_is_told(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run(folder, "--json")
    assert done.returncode == 0, done.stderr
    whole = json.loads(done.stdout)
    assert whole["rules"]["kl_runaway"]["families"] == ["b"]
    assert "kl_runaway" in whole["left_out"]["dropped"]["b"]
    assert whole["left_out"]["plain"]["crit_recall"] == whole["books"]["guarded"]["crit_recall"]
    assert sum(found["chosen"] for found in whole["left_out"]["scales"].values()) == whole["left_out"]["families"] == 3
    assert whole["families"]["b"]["alone"]["crit_recall"] == 1.0
    assert whole["families"]["b"]["others"]["crit_recall"] == 0.5
    assert whole["otherwise"]["rewards times 10"] == whole["left_out"]["plain"]
    assert whole["otherwise"]["no KL"]["crit_recall"] < whole["left_out"]["plain"]["crit_recall"]  # b dies of it
    for table in ("books", "families", "rules", "left_out", "otherwise", "thresholds", "wrong"):
        getattr(tables, f"print_{table}")(whole)
    printed = capsys.readouterr().out
    assert printed.count("\n## ") == 6
    widths = [[line.count("|") for line in block.splitlines() if line[:1] == "|"] for block in printed.split("\n\n")]
    assert all(len(set(width)) <= 1 for width in widths)  # every row of a table has the columns of its head


@pytest.mark.parametrize("options", [{}, {"kl_from": 20}, {"nan_from": 30}], ids=str)
def test_a_call_is_what_diagnose_says(tmp_path: Path, options: dict[str, int]) -> None:
    write(tmp_path / "run.csv", rows(**options))
    steps = variants.read_steps(tmp_path / "run.csv", 1)
    for name in ("guarded", "documented", "llm"):
        book = variants.book(name)
        (found,) = recorded((str(tmp_path / "run.csv"),), book)
        alarm, critical = (INF if step is None else step for step in (found.alarm_step, found.critical_step))
        assert variants.call(book, steps) == (alarm, critical)


def test_what_is_not_computed_could_not_differ(tmp_path: Path) -> None:
    write(tmp_path / "run.csv", rows(kl_from=20, nan_from=38))
    steps, guarded = variants.read_steps(tmp_path / "run.csv", 1), variants.book("guarded")
    base = variants.call(guarded, steps)
    changed, fired = variants.scaled(guarded, steps, base), variants.fired(guarded, steps)
    differing = 0
    for name in variants.diagnosis_rules():
        for threshold in variants.thresholds(name, guarded.rules[name])[:2]:
            other = variants.moved(guarded.rules[name], [threshold], 1.5)
            if other is not None:
                book = guarded.model_copy(update={"rules": {**guarded.rules, name: other}})
                expected = variants.call(book, steps)
                assert changed.get((threshold, 1.5), base) == expected, threshold
                differing += expected != base
        if name not in fired:
            assert variants.call(variants.without(guarded, [name]), steps) == base, name
    assert "kl_runaway" in fired
    assert base.critical == 22


@pytest.mark.parametrize(
    ("severity", "call", "expected"),
    [
        ("crit", (5, 12), "caught"), ("crit", (5, 20), "caught"), ("crit", (5, 9), "premature"),
        ("crit", (5, 21), "late"), ("crit", (5, INF), "softened"), ("crit", (21, INF), "missed"),
        ("crit", (INF, INF), "missed"),
        ("warn", (20, INF), "caught"), ("warn", (21, INF), "late"), ("warn", (INF, INF), "missed"),
        ("warn", (5, 30), "over"),
        ("ok", (INF, INF), "silent"), ("ok", (5, INF), "false warning"), ("ok", (5, 6), "false critical"),
        ("disputed", (INF, INF), "outside"), ("disputed", (5, INF), "within"), ("disputed", (5, 6), "within"),
    ],
)  # fmt: skip
def test_a_call_comes_to_what_the_scorer_says(severity: str, call: tuple[float, float], expected: str) -> None:
    labelled = tables.Run("r", "r", severity, ("crit", "warn"), "", 10.0, 20.0, 1, "f")
    assert tables.outcome(labelled, variants.Call(*call)) == expected
    assert tables.outcome(labelled, None) == "unread"


values = st.lists(
    st.fixed_dictionaries({
        "token_kl": st.floats(0, 20), "mean_ratio": st.floats(0.01, 30), "truncated_fraction": st.floats(0, 1),
        "entropy": st.floats(0, 0.02), "grad_norm": st.floats(0, 0.01), "zero_std_fraction": st.floats(0, 1),
    }),
    min_size=1, max_size=30,
)  # fmt: skip


@given(
    values, st.sampled_from(["kl_spike", "kl_drift", "ratio_dead", "truncated", "policy_dead"]), st.floats(1.01, 1.5)
)
def test_further_out_never_fires_where_it_did_not(table: list[dict[str, float]], name: str, factor: float) -> None:
    guarded = variants.book("guarded")
    rule = guarded.rules[name]
    steps = [Step(number, row) for number, row in enumerate(table)]
    out = variants.moved(rule, variants.thresholds(name, rule), factor)
    near = variants.moved(rule, variants.thresholds(name, rule), 1 / factor)
    fires = [
        {n for n, _ in variants._trace(guarded, name, each, steps)}  # noqa: SLF001 - the law is about each row
        for each in (out, rule, near)
    ]
    assert fires[0] <= fires[1] <= fires[2]


def test_a_package_gets_what_was_logged_under_its_own_names() -> None:
    row = {"token_kl": 0.1, "step_kl": 9.0, "mean_reward": math.nan, "completion_length": 7.0}
    names = {"kl": ("token_kl", "step_kl"), "reward": ("mean_reward",), "entropy": ("entropy",)}
    found = packages.given(row, names)
    assert list(found) == ["kl", "reward"]
    assert found["kl"] == 0.1
    assert math.isnan(found["reward"])
