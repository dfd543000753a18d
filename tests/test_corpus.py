"""The project's own corpus of recorded runs: all is read, healthy runs stay silent, sick ones are found in time."""

from __future__ import annotations

import csv
import functools
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_watchdog.backtest import Result, backtest, read_labels, summary
from grpo_watchdog.lab import corpus
from grpo_watchdog.logs import opened
from grpo_watchdog.recorded import recorded
from grpo_watchdog.rulebook import load

RUNS = Path(__file__).resolve().parent / "runs"
SCORER = Path(__file__).resolve().parents[2] / "shared" / "score_recorded.py"
LINES = list(csv.DictReader((RUNS / "labels.csv").read_text(encoding="utf-8").splitlines()))
LABELS = read_labels(RUNS / "labels.csv")
FILES = [line["file"] for line in LINES]

MOST_BYTES_OF_A_FILE, MOST_BYTES = 60_000, 1_000_000
CRITICAL_CAUGHT, WARNED = 14 / 17, 2 / 3

# What the guarded rulebook gets wrong about sick runs, and why. One that comes right is taken out; none comes in.
WRONG = {
    "chain_reward_hacked.tfevents": "the logged reward rises, and KL of a whole trajectory has no unit with a limit",
    "tokens_weights_corrupted.log.gz": "it would be rolled back in time, but by reward_drop, which is no critical rule",
    "trl_reward_inverted.json.gz": "the logged reward falls to a fifth and climbs again, by unlearning the task",
    "trl_reward_hacked.log": "the sum rises; no rule reads the reward functions one by one",
    "tokens_length_hacked.csv": "the hacked reward rises, which speaks against truncation as trouble",
    "trl_never_ends.log": "tokens that are forced on a policy have a KL of 6 and more: taken for a runaway",
}


@functools.cache
def results() -> dict[str, Result]:
    """Return what the guarded rulebook makes of every run, by file."""
    found, unread = backtest([RUNS / name for name in FILES], [load("guarded")], LABELS)
    assert unread == []
    return {Path(result.path).name: result for result in found}


def share(severity: str, outcome: str) -> float:
    mine = [result for name, result in results().items() if LABELS[name].severity == severity]
    return sum(result.outcome == outcome for result in mine) / len(mine)


def test_every_run_is_read_as_one_and_every_file_has_a_label() -> None:
    assert sorted(results()) == sorted(FILES)
    assert {path.name for path in RUNS.iterdir()} - set(FILES) == {"labels.csv", "README.md"}


def test_the_files_are_small() -> None:
    sizes = {name: (RUNS / name).stat().st_size for name in FILES}
    assert {name: size for name, size in sizes.items() if size >= MOST_BYTES_OF_A_FILE} == {}
    assert sum(sizes.values()) < MOST_BYTES


def test_no_file_tells_the_machine_it_was_recorded_on() -> None:
    places = [str(Path.home()), str(Path.cwd()), "/tmp/"]  # noqa: S108 - nothing is written there
    for name in FILES:
        content = (RUNS / name).read_bytes()
        assert not [place for place in places if place.encode() in content], name


def test_every_format_and_both_families_of_names_are_there() -> None:
    book = load("documented")
    seen: set[tuple[str, str]] = set()
    for name in FILES:
        for run in recorded((str(RUNS / name),), book):
            seen |= {(run.trainer, kind) for kind in run.formats}
    assert {("canonical", kind) for kind in ("csv", "jsonl", "tfevents", "console")} <= seen
    assert {("trl", kind) for kind in ("trainer_state", "tfevents", "console")} <= seen
    assert any(name.endswith(".gz") for name in FILES)


def test_healthy_runs_and_their_lookalikes_are_all_silent() -> None:
    loud = {name: r.outcome for name, r in results().items() if LABELS[name].severity == "ok" and r.outcome != "silent"}
    assert loud == {}


def test_critical_runs_are_called_critical_in_time() -> None:
    assert share("crit", "caught") >= CRITICAL_CAUGHT


def test_runs_to_be_warned_of_are_warned_of_in_time() -> None:
    in_time = [(r.alarm_step or 0) <= LABELS[name].must_by and r.alarm_step is not None
               for name, r in results().items() if LABELS[name].severity == "warn"]  # fmt: skip
    assert sum(in_time) / len(in_time) >= WARNED


def test_where_two_readings_differ_the_verdict_is_one_of_them() -> None:
    disputed = {
        line["file"]: {line["severity_1"], line["severity_2"]} for line in LINES if line["severity"] == "disputed"
    }
    assert disputed
    words = {"ok": "ok", "notice": "ok", "warning": "warn", "critical": "crit"}
    assert {name for name, readings in disputed.items() if words[results()[name].verdict] not in readings} == set()


def test_nothing_is_critical_before_its_trouble_begins() -> None:
    early = {name: r.critical_step for name, r in results().items()
             if r.critical_step is not None and r.critical_step < LABELS[name].trouble_step}  # fmt: skip
    assert early == {}


def test_what_is_wrong_is_known() -> None:
    wrong = {name for name, result in results().items() if result.outcome not in {"silent", "caught", "disputed"}}
    assert wrong - {name for name in FILES if LABELS[name].severity == "ok"} <= set(WRONG)


def test_a_book_that_only_knows_the_document_finds_less() -> None:
    found, _ = backtest([RUNS / name for name in FILES], [load("documented")], LABELS)
    mine = summary(list(results().values()), "guarded")
    assert summary(found, "documented").get("caught", 0) < mine["caught"]


@pytest.mark.parametrize("name", ["tokens_nan_batch", "reference_lr_x60"])
def test_a_run_is_what_the_recorder_makes(tmp_path: Path, name: str) -> None:
    (plan,) = [plan for plan in corpus.PLANS if plan.name == name]
    label = corpus.record(plan, tmp_path)
    fresh, kept = (rows(folder / plan.file) for folder in (tmp_path, RUNS))
    assert len(fresh) == len(kept) == plan.steps / plan.every
    for (step, values), (known_step, known) in zip(fresh[:40], kept[:40], strict=True):  # to here no bit has grown
        assert (step, values.keys()) == (known_step, known.keys())
        assert values == pytest.approx(known, rel=1e-3, abs=1e-6, nan_ok=True)
    assert {key: label[key] for key in ("severity", "trouble_step", "trainer")} == {
        key: line[key] for line in LINES if line["name"] == name for key in ("severity", "trouble_step", "trainer")
    }


def rows(path: Path) -> list[tuple[int | None, dict[str, float]]]:
    with opened((str(path),)) as log:
        return [(row.step, row.values) for row in log.rows]


def test_the_labels_are_those_of_the_plans() -> None:
    assert [(line["name"], line["file"]) for line in LINES] == [(plan.name, plan.file) for plan in corpus.PLANS]
    for plan, line in zip(corpus.PLANS, LINES, strict=True):
        label = LABELS[plan.file]
        assert label.trouble_step == (math.inf if plan.severity == "ok" else plan.onset)
        assert (label.must_by == math.inf) == (plan.severity == "ok")
        assert plan.severity == "ok" or plan.onset < label.must_by <= plan.steps
        readings = list(dict.fromkeys((line["severity_1"], line["severity_2"])))
        assert "|".join(readings) == plan.severity
        assert label.severity == (readings[0] if len(readings) == 1 else "disputed")
        assert line["reason"]


@pytest.mark.skipif(not SCORER.exists(), reason="../shared/score_recorded.py is not there")
def test_the_scorer_of_recorded_runs_scores_this_folder_too(tmp_path: Path) -> None:
    chosen = ["trl_beta_zero", "trl_lr_x100", "trl_nan_gradient"]
    with (tmp_path / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, LINES[0].keys())
        writer.writeheader()
        for line in LINES:
            if line["name"] in chosen:
                writer.writerow(line)
                shutil.copy(RUNS / line["file"], tmp_path)
    command = f"{sys.executable} -m grpo_watchdog.cli diagnose --rules guarded"
    done = subprocess.run(
        [sys.executable, str(SCORER), str(tmp_path), "--command", command], check=True, capture_output=True, text=True
    )
    figures = json.loads(done.stdout.splitlines()[-1])
    assert (figures["runs"], figures["unread"], figures["ok_silent"], figures["crit_recall"]) == (3, 0, 1.0, 1.0)
