"""Backtest: rulebooks held against recorded runs and against labels, run by run and in all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from grpo_watchdog.backtest import Label, Result, as_json, as_text, backtest, differences, read_labels, summary
from grpo_watchdog.cli import main
from grpo_watchdog.errors import ConfigurationError, LogError
from grpo_watchdog.rulebook import Rulebook
from log_streams import GUARDED, NAN, Rows, Task, book, changed, learning, write

WENT = 20  # steps that are healthy


def calm() -> Rows:
    return learning(0, Task(rows=60, groups=32, kind="shaped"))


def runaway() -> Rows:
    """Critical on its third row, step 23; warned of at step 21."""
    return changed(calm(), WENT, kl=6.0)


def spike() -> Rows:
    return [{**row, "kl": 6.0} if place == WENT else row for place, row in enumerate(calm())]


LOGS = {"calm": calm, "spike": spike, "runaway": runaway}


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    """A folder of three runs: nothing, a warning at step 21, critical at step 23."""
    folder = tmp_path / "logs"
    folder.mkdir()
    for name, make in LOGS.items():
        write(folder / f"{name}.jsonl", make())
    return folder


@pytest.fixture
def lax(tmp_path: Path) -> Rulebook:
    """`guarded`, without what tells a KL that stays high."""
    return book(tmp_path, kl_runaway={"bands": [{"from": 50, "severity": "critical"}]})


def label(severity: str, trouble: float = float("inf"), by: float = float("inf")) -> Label:
    return Label(severity, trouble, by, 1)


# ── labels ────────────────────────────────────────────────────────────────────────────────────────────────────────
HEAD = "file,severity,trouble_step,must_by,steps_per_row"


def labels(folder: Path, *lines: str, head: str = HEAD) -> Path:
    path = folder / "labels.csv"
    path.write_text("\n".join([head, *lines]) + "\n")
    return path


def test_labels_are_read(tmp_path: Path) -> None:
    path = labels(tmp_path, "a.json,crit,3,9,", "b.csv,ok,,,20", "c.log,disputed,,5.5,1")
    assert read_labels(path) == {
        "a.json": Label("crit", 3, 9, 1),
        "b.csv": Label("ok", float("inf"), float("inf"), 20),
        "c.log": Label("disputed", float("inf"), 5.5, 1),
    }


def test_labels_may_have_other_columns_a_mark_and_another_order(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("\ufeffreason,must_by,severity,file\nwhy not,9,warn,a.json\n", encoding="utf-8")
    assert read_labels(path) == {"a.json": Label("warn", float("inf"), 9, 1)}


FAULTS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "severity": (HEAD, ("a,ok,,,", "b,critical,1,2,"), ":3: severity 'critical'; allowed: ok, warn, crit, disputed"),
    "no_severity": (HEAD, ("a,,,,",), ":2: severity ''"),
    "short_row": (HEAD, ("a",), ":2: severity"),
    "step": (HEAD, ("a,crit,soon,9,",), ":2: .*'soon'; steps are numbers, or empty"),
    "must_by": (HEAD, ("a,crit,1,late,",), ":2: .*'late'"),
    "nan": (HEAD, ("a,crit,1,nan,",), ":2: .*nan"),
    "per_row": (HEAD, ("a,crit,1,9,2.5",), ":2: .*'2.5'"),
    "per_row_0": (HEAD, ("a,crit,1,9,0",), ":2: .*0"),
    "no_file": ("name,severity,must_by", ("a,ok,",), ":1: no column 'file'"),
    "no_column": ("file,must_by", ("a,9",), ":1: no column 'severity'"),
    "twice": (HEAD, ("a,ok,,,", "a,crit,1,9,"), ":3: .*a.*"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_labels_is_one_line_with_its_place(
    name: str, tmp_path: Path, logs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head, lines, what = FAULTS[name]
    path = labels(tmp_path, *lines, head=head)
    with pytest.raises(ConfigurationError, match=what):
        read_labels(path)
    assert main(["backtest", str(logs), "--rules", "documented", "--labels", str(path)]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"grpo-watchdog: {path}:")


@pytest.mark.parametrize(
    "content", [None, b"\xff\xfe\x00nonsense", b'file,severity,must_by\n"a'], ids=["none", "bytes", "quote"]
)
def test_labels_that_cannot_be_read_are_one_line(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigurationError) as caught:
        read_labels(path)
    assert str(caught.value).startswith(f"{path}:")
    assert "\n" not in str(caught.value)


# ── outcomes ──────────────────────────────────────────────────────────────────────────────────────────────────────
OUTCOMES = [
    ("runaway", label("crit", 21, 30), "caught", 7),
    ("runaway", label("crit", 21, 23), "caught", 0),
    ("runaway", label("crit", 21, 22), "late", -1),
    ("runaway", label("crit"), "caught", None),  # there is no latest step, and no lead
    ("spike", label("crit", 21, 30), "softened", None),
    ("spike", label("crit", 10, 20), "missed", None),
    ("calm", label("crit", 10, 20), "missed", None),
    ("spike", label("warn", 21, 30), "caught", 9),
    ("spike", label("warn", 10, 20), "late", -1),
    ("runaway", label("warn", 21, 30), "over", 9),
    ("calm", label("warn", 21, 30), "missed", None),
    ("calm", label("ok"), "silent", None),
    ("spike", label("ok"), "false warning", None),
    ("runaway", label("ok"), "false critical", None),
    ("runaway", label("disputed"), "disputed", None),
]


@pytest.mark.parametrize(("name", "right", "outcome", "lead"), OUTCOMES)
def test_an_outcome_is_what_the_label_makes_of_it(
    name: str, right: Label, outcome: str, lead: float | None, logs: Path
) -> None:
    (result,), unread = backtest([logs], [GUARDED], {f"{name}.jsonl": right})
    assert not unread
    assert (result.path, result.outcome) == (f"{logs}/{name}.jsonl", outcome)
    assert result.lead == lead


def test_only_labelled_runs_count_where_there_are_labels(logs: Path) -> None:
    assert len(backtest([logs], [GUARDED])[0]) == 3
    assert len(backtest([logs], [GUARDED], {"calm.jsonl": label("ok")})[0]) == 1


def test_steps_per_row_is_the_labels(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text("\n".join(map(json.dumps, runaway())))
    (result,), _ = backtest([path], [GUARDED], {"run.jsonl": Label("crit", 200, 240, 10)})
    assert (result.critical_step, result.outcome, result.lead) == (230, "caught", 10)


# ── two rulebooks ─────────────────────────────────────────────────────────────────────────────────────────────────
def test_every_book_meets_every_run_and_is_told_apart(logs: Path, lax: Rulebook) -> None:
    results, unread = backtest([logs], [GUARDED, lax], {name + ".jsonl": label("ok") for name in LOGS})
    assert not unread
    assert [(Path(r.path).stem, r.book) for r in results] == [
        (name, of) for name in ("calm", "runaway", "spike") for of in ("guarded", "changed")
    ]
    assert [group[0].path for group in differences(results)] == [f"{logs}/runaway.jsonl"]
    verdicts = {(r.book, Path(r.path).stem): r.verdict for r in results}
    assert verdicts["guarded", "runaway"] == "critical"
    assert verdicts["changed", "runaway"] == "warning"
    figures = {of: summary(results, of) for of in ("guarded", "changed")}
    assert [figures[of]["critical"] for of in ("guarded", "changed")] == [1, 0]
    assert [figures[of]["alarmed"] for of in ("guarded", "changed")] == [2, 2]
    assert figures["guarded"]["false critical"] == 1
    assert figures["guarded"]["runs"] == 3


def test_books_that_say_the_same_do_not_differ(logs: Path, tmp_path: Path) -> None:
    same = book(tmp_path, ess_low={"low": 0.2})  # of what these logs do not have
    assert not differences(backtest([logs], [GUARDED, same])[0])


def test_what_would_have_been_done_is_a_difference_too() -> None:
    one = Result("a", "x", "critical", 3, 3, 1, 10, ((3, "rollback"),), "", None)
    assert not differences([one, one._replace(book="b")])
    for other in (
        {"acts": ()},
        {"acts": ((4, "rollback"),)},
        {"alarm_step": 2},
        {"critical_step": 4},
        {"verdict": "ok"},
    ):
        assert differences([one, one._replace(book="b", **other)])


def test_alarms_are_counted_by_steps_not_by_rows(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text("\n".join(map(json.dumps, spike())))
    results, _ = backtest([path], [GUARDED], {"run.jsonl": Label("warn", 1, 1000, 10)})
    (result,) = results
    assert (result.steps, result.alarms) == (591, 1)  # from step 10 to step 600
    assert summary(results, "guarded")["alarms_per_1000_steps"] == pytest.approx(1000 / 591, abs=1e-3)


# ── the command ───────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_command_tells_runs_figures_and_differences(
    logs: Path, tmp_path: Path, lax: Rulebook, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lax.name == "changed"  # the file is there
    path = labels(tmp_path, "calm.jsonl,ok,,,", "spike.jsonl,warn,21,30,", "runaway.jsonl,crit,21,30,")
    mine = str(tmp_path / "changed.yaml")
    command = ["backtest", str(logs), "--rules", "guarded", "--rules", mine, "--labels", str(path)]
    assert main([*command, "--format", "json"]) == 20
    whole: dict[str, Any] = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert whole["schema"] == 1
    assert [figures["book"] for figures in whole["books"]] == ["guarded", "changed"]
    assert [figures.get("caught") for figures in whole["books"]] == [2, 1]
    assert [figures.get("softened") for figures in whole["books"]] == [None, 1]
    assert [figures["median_lead"] for figures in whole["books"]] == [9, 9]
    assert whole["differ"] == [f"{logs}/runaway.jsonl"]
    assert whole["unread"] == []
    runs = {(run["book"], Path(run["path"]).stem): run for run in whole["runs"]}
    assert len(runs) == 6
    worst = runs["guarded", "runaway"]
    assert (worst["alarm_step"], worst["critical_step"], worst["lead"], worst["outcome"]) == (21, 23, 7, "caught")
    assert worst["acts"][0]["step"] == 23

    assert main(command) == 20
    text = capsys.readouterr().out
    assert "The books differ on 1 run(s)" in text
    assert "runaway.jsonl: guarded critical (alarm 21, critical 23" in text
    assert "[caught]" in text
    assert "[softened]" in text


@pytest.mark.parametrize(("name", "code"), [("calm", 0), ("spike", 10), ("runaway", 20)])
def test_the_exit_code_is_the_worst_of_all(name: str, code: int, logs: Path) -> None:
    assert main(["backtest", str(logs / f"{name}.jsonl"), "--rules", "guarded"]) == code


def test_what_cannot_be_read_is_said_and_the_rest_is_told(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (logs / "bad.jsonl").write_bytes(b"\0\1\2\3")
    assert main(["backtest", str(logs), "--rules", "documented"]) in (0, 10)
    assert f"not read: {logs}/bad.jsonl" in capsys.readouterr().out
    results, unread = backtest([logs], [GUARDED])
    assert (len(results), [path for path, _ in unread]) == (3, [f"{logs}/bad.jsonl"])
    assert json.loads(as_json(results, unread))["unread"][0]["path"] == f"{logs}/bad.jsonl"
    assert "not read" in as_text(results, unread)
    assert main(["backtest", str(logs / "bad.jsonl"), "--rules", "documented"]) == 1


def test_a_path_that_does_not_exist_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(LogError, match="no such file or folder"):
        backtest([tmp_path / "nowhere"], [GUARDED])
    assert main(["backtest", str(tmp_path / "nowhere"), "--rules", "documented"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit) as caught:
        main(["backtest", str(tmp_path)])  # without a rulebook
    assert caught.value.code == 2


def test_not_a_number_is_told_as_json(tmp_path: Path) -> None:
    path = write(tmp_path / "run.jsonl", changed(calm(), WENT, loss=NAN, grad_norm=NAN))
    results, _ = backtest([path], [GUARDED])
    assert json.loads(as_json(results, []), parse_constant=pytest.fail)["runs"][0]["critical_step"] == 21
