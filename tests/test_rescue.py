"""The rescue benchmark: its figures on hand-made rows, and tiny real cells under every policy."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any
from xml.dom import minidom

import pytest

import grpo_watchdog as gw
from grpo_watchdog.actions import KNOB_ACTIONS
from grpo_watchdog.diagnosis import RankedCause
from grpo_watchdog.lab import rescue, runs, store, tables
from grpo_watchdog.lab.cells import Cell, Row
from grpo_watchdog.lab.faults import FAULTS
from grpo_watchdog.lab.policies import POLICIES, RANDOM_PER_RUN, Scene, Unwatched
from grpo_watchdog.lab.scores import harmed, in_reach, occasions, quantile, scores
from grpo_watchdog.lab.scores import rescue as rescue_fraction
from grpo_watchdog.lab.training import TASKS, GrpoTraining

HEALTHY = Row(
    task="reference", kind="healthy", event="", severity=0.0, seed=0, policy="guarded", lives_in="", steps=200, onset=0,
    ran=200, lost=0, reward=0.8, healthy=0.8, unwatched=0.8, interventions=(), alarm=None, early_alarm=None, cause="",
    right=None, halted=False, crashed="", seconds=1.0,
)  # fmt: skip


def faulty(**changes: Any) -> Row:
    """A harmful cell that a policy rescued half of."""
    made = {"kind": "fault", "event": "lr_up", "severity": 10.0, "onset": 80, "unwatched": 0.2, "reward": 0.5}
    return HEALTHY._replace(**{**made, "lives_in": "settings", **changes})


# --- figures ------------------------------------------------------------------------------------


def test_the_rescue_fraction_is_the_share_of_the_harm_that_was_undone() -> None:
    assert rescue_fraction(faulty()) == pytest.approx(0.5)
    assert rescue_fraction(faulty(reward=0.8)) == pytest.approx(1.0)
    assert rescue_fraction(faulty(reward=0.2)) == 0.0
    assert rescue_fraction(faulty(reward=0.1)) < 0.0


def test_a_fault_is_harmful_from_a_tenth_on() -> None:
    assert harmed(faulty(healthy=1.0, unwatched=0.9))
    assert not harmed(faulty(healthy=1.0, unwatched=0.901))
    assert not harmed(HEALTHY._replace(unwatched=0.1))  # no fault, no harm by one


def test_the_rescue_is_of_harmful_cells_only_and_by_class_and_task() -> None:
    rows = [
        faulty(),
        faulty(seed=1, reward=0.8),
        faulty(event="nan_reward", task="tokens", reward=0.2),
        faulty(event="lr_spike", unwatched=0.79),
        faulty(policy="documented", reward=0.0),
    ]
    found = scores(rows, "guarded")
    assert found.rescue.n == 3
    assert found.rescue.value == pytest.approx(0.5)
    assert {name: figure.n for name, figure in found.rescue_by_class.items()} == {"lr_up": 2, "nan_reward": 1}
    assert found.rescue_by_task["reference"].value == pytest.approx(0.75)
    assert found.worst_class == "nan_reward"
    assert found.rescue_worst.value == 0.0


def test_what_the_oracle_cannot_rescue_is_marked_and_stays_in_the_mean() -> None:
    rows = [
        faulty(policy="oracle", reward=0.8),
        faulty(policy="oracle", event="reward_hack", reward=0.4),
        faulty(reward=0.8),
        faulty(event="reward_hack", reward=0.2),
    ]
    assert in_reach(rows) == {("lr_up", "reference"): True, ("reward_hack", "reference"): False}
    found = scores(rows, "guarded")
    assert found.rescue.value == pytest.approx(0.5)
    assert found.rescue_in_reach.value == pytest.approx(1.0)
    page = tables.markdown([found], rows, "about", "chain")
    assert "| reward_hack | settings | reference |" in page
    assert page.count("out of reach") == 1


def test_false_interventions_are_steps_of_runs_in_which_nothing_is_wrong() -> None:
    acts = ((10, "rollback", True), (10, "raise_kl_coef", True), (30, "lower_learning_rate", False))
    rows = [
        HEALTHY._replace(interventions=acts),
        HEALTHY._replace(seed=1, interventions=((60, "restore_learning_rate", True),)),
        HEALTHY._replace(kind="lookalike", event="resume", onset=50, interventions=((60, "halt", True),), ran=100),
        faulty(interventions=((90, "rollback", True),)),
    ]
    found = scores(rows, "guarded")
    assert (found.false_healthy.value, found.false_healthy.n) == (50.0, 400)
    assert (found.false_lookalike.value, found.false_lookalike.n) == (200.0, 100)
    assert (found.false_interventions.value, found.false_interventions.n) == (80.0, 500)
    assert (found.early.value, found.early.n) == (0.0, 80)


def test_letting_go_and_failing_are_no_interventions() -> None:
    acts = tuple((5, action.release_name, True) for action in KNOB_ACTIONS.values())
    assert occasions(HEALTHY._replace(interventions=(*acts, (6, "rollback", False)))) == []


def test_recall_and_delay_count_from_the_onset() -> None:
    rows = [
        faulty(alarm=84),
        faulty(seed=1, alarm=None, interventions=((10, "rollback", True), (82, "veto", True))),
        faulty(seed=2, alarm=90, interventions=((85, "veto", True),)),
        faulty(seed=3, interventions=((79, "rollback", True),)),
    ]
    found = scores(rows, "guarded")
    assert found.recall == (0.75, 4)
    assert found.delay == (4, 3)
    assert found.act_delay == (3.5, 2)
    assert found.early.n == 320
    assert found.early.value == pytest.approx(2 * 20_000 / 320)


def test_do_no_harm_is_held_against_the_same_run_unwatched() -> None:
    alike = HEALTHY._replace(kind="lookalike", event="spike")
    rows = [HEALTHY, HEALTHY._replace(seed=1, reward=0.6), alike]
    found = scores(rows, "guarded")
    assert found.keeps.value == pytest.approx((1 + 0.75 + 1) / 3)
    assert found.keeps_low.value == pytest.approx(0.775)


def test_causes_and_harmless_injections() -> None:
    rows = [
        faulty(cause="learning_rate_too_high", right=True),
        faulty(seed=1, cause="bad_batch", right=False),
        faulty(seed=2),
        faulty(seed=3, unwatched=0.8, interventions=((81, "halt", True),)),
        faulty(seed=4, unwatched=0.8),
    ]
    found = scores(rows, "guarded")
    assert found.right == (0.5, 2)
    assert found.on_harmless == (0.5, 2)


def test_no_rows_give_no_figures_and_a_table_all_the_same() -> None:
    found = scores([], "guarded")
    assert math.isnan(found.rescue.value)
    assert found.rescue.n == 0
    assert "| guarded | - |" in tables.markdown([found], [], "about", "chain")
    assert json.loads(json.dumps(tables.as_json([found])))["guarded"]["rescue"] == {"value": None, "n": 0}


@pytest.mark.parametrize(("share", "value"), [(0.0, 1.0), (0.5, 2.5), (1.0, 4.0), (0.05, 1.15)])
def test_quantiles_interpolate(share: float, value: float) -> None:
    assert quantile([4.0, 1.0, 3.0, 2.0], share) == pytest.approx(value)


def test_a_row_goes_through_json_and_comes_back() -> None:
    row = faulty(interventions=((1, "halt", True),), right=False)
    assert Row.from_json(json.loads(json.dumps(row._asdict()))) == row


# --- notes of a run -----------------------------------------------------------------------------


def test_a_rollback_loses_what_was_learned_since() -> None:
    notes = runs.Notes(onset=5)
    for step in range(20):
        back = {10: 7, 15: 7}.get(step)
        notes.take(step, gw.Verdict(step, "ok", rolled_back_to=back))
    assert notes.ran == 20
    assert notes.lost == 3 + 5  # 8, 9, 10, and then 11 to 15: 8 to 10 are not lost twice


def test_alarms_before_the_onset_are_kept_apart() -> None:
    notes = runs.Notes(onset=5)
    for step, level in enumerate(["ok", "warning", "ok", "critical", "ok", "notice", "warning"]):
        notes.take(step, gw.Verdict(step, level))
    assert (notes.early_alarm, notes.alarm) == (1, 6)


def finding(rule: str, severity: str = "warning") -> gw.Finding:
    return gw.Finding(rule, severity, 1, 0, 0, "loss", 1.0, 1.0, None)


def test_an_alarm_that_stood_before_the_onset_is_no_sign_of_the_fault() -> None:
    notes = runs.Notes(onset=2)
    old, new = finding("std_reward"), finding("nonfinite")
    for step, findings in enumerate([(old,), (old,), (old,), (old, new)]):
        notes.take(step, gw.Verdict(step, "warning", findings=findings))
    assert (notes.early_alarm, notes.alarm) == (0, 3)
    notes = runs.Notes(onset=2)
    for step, findings in enumerate([(old,), (old,), (), (old,)]):
        notes.take(step, gw.Verdict(step, "warning" if findings else "ok", findings=findings))
    assert notes.alarm == 3


def test_the_cause_is_that_of_the_incident_that_was_acted_on() -> None:
    notes = runs.Notes(onset=2)
    incidents = [
        gw.Incident(n, rule, "warning", 2, 2, (finding(rule),), (RankedCause(cause, (), ()),))
        for n, (rule, cause) in enumerate([("std_reward", "identical_samples"), ("nonfinite", "bad_batch")], start=1)
    ]
    both = tuple(i.evidence[0] for i in incidents)
    notes.take(2, gw.Verdict(2, "warning", incidents=tuple(incidents), findings=both))
    assert notes.cause == "identical_samples"
    act = gw.Outcome(3, "rollback", 3.0, 1.0, "nonfinite", "loss nan")
    notes.take(3, gw.Verdict(3, "warning", incidents=tuple(incidents), findings=both, actions=(act,)))
    assert notes.cause == "bad_batch"


def test_what_a_shadow_would_have_done_and_what_is_let_up_are_no_interventions() -> None:
    notes = runs.Notes(onset=0)
    dose = gw.Outcome(0, "lower_learning_rate", 1.0, 0.1, "nonfinite", "loss nan")
    notes.take(
        0, gw.Verdict(0, "warning", actions=(dose._replace(held_back="shadow"),), findings=(finding("nonfinite"),))
    )
    assert notes.interventions == []
    notes.take(1, gw.Verdict(1, "warning", actions=(dose,), findings=(finding("nonfinite"),)))
    notes.take(2, gw.Verdict(2, "ok", actions=(dose._replace(before=0.1, after=0.15),)))
    assert [name for _, name, _ in notes.interventions] == ["lower_learning_rate", "restore_learning_rate"]


def test_checkpoints_are_no_interventions() -> None:
    notes = runs.Notes(onset=0)
    act = gw.Outcome(0, "checkpoint_now", None, 0.0, "schedule", "every 10 observations")
    notes.take(0, gw.Verdict(0, "ok", actions=(act, act._replace(action="halt")), halt=True))
    assert notes.interventions == [(0, "halt", True)]
    assert notes.halted


# --- real cells ---------------------------------------------------------------------------------


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> str:
    """A real task with a run of 24 steps."""

    def make(seed: int) -> GrpoTraining:
        training = TASKS["reference"](seed)
        training.config.total_steps = 24
        return training

    monkeypatch.setitem(TASKS, "short", make)
    monkeypatch.setattr(rescue, "QUICK", rescue.Sizes(seeds=1, healthy=2, compared=1, lookalikes=1, severities=1))
    return "short"


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch, short: str) -> None:
    """Let every fault exist on the short task."""
    for name, fault in list(FAULTS.items()):
        monkeypatch.setitem(FAULTS, name, dataclasses.replace(fault, tasks=fault.tasks | {short}))


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_plays_a_cell_to_its_end_or_halts(short: str, policy: str) -> None:
    row = runs.play(Cell(short, "fault", "nan_gradient", 1.0, 3), policy)
    assert row.crashed == ""
    assert 0.3 * 24 - 1 <= row.onset <= 0.6 * 24
    assert row.ran == 24 or row.halted
    assert math.isfinite(row.reward)
    assert (row.policy, row.lives_in) == (policy, FAULTS["nan_gradient"].lives_in)


@pytest.mark.parametrize("policy", ["none", "random", "oracle"])
def test_a_cell_gives_the_same_numbers_twice(short: str, policy: str) -> None:
    cell = Cell(short, "fault", "lr_up", 30.0, 1)
    first, second = (runs.play(cell, policy)._replace(seconds=0.0) for _ in range(2))
    assert first == second


def test_a_healthy_run_on_which_nothing_is_done_ends_as_if_nobody_watched(short: str) -> None:
    cell = Cell(short, "healthy", "", 0.0, 0)
    watched = runs.play(cell, "guarded")
    assert watched.interventions == ()
    assert watched.reward == runs.play(cell, "none").reward


def test_the_oracle_undoes_what_can_be_undone_and_stops_before_what_cannot(short: str) -> None:
    undone = runs.play(Cell(short, "fault", "kl_coef_up", 100.0, 2), "oracle")
    assert undone.interventions == ((undone.onset, "rollback", True),)
    assert (undone.ran, undone.lost, undone.halted) == (24, 1, False)
    stopped = runs.play(Cell(short, "fault", "reward_constant", 1.0, 2), "oracle")
    assert (stopped.ran, stopped.halted) == (stopped.onset + 1, True)


def test_a_look_alike_of_the_whole_run_is_there_before_anybody_is_attached(
    short: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = list[float]()

    def noting(scene: Scene) -> Unwatched:
        found.append(scene.training.config.kl_coef)
        return Unwatched()

    monkeypatch.setitem(POLICIES, "noting", noting)
    runs.play(Cell(short, "healthy", "", 0.0, 0), "noting")
    runs.play(Cell(short, "lookalike", "kl_rises_with_reward", 0.0, 0), "noting")
    assert found[1] == pytest.approx(0.1 * found[0])


def test_halt_at_alarm_stops_and_turns_nothing(short: str) -> None:
    row = runs.play(Cell(short, "fault", "nan_reward", 1.0, 0), "halt_at_alarm")
    assert [name for _, name, _ in row.interventions] == ["halt"]
    assert row.halted
    assert row.alarm == row.interventions[0][0]
    assert row.lost == 0


def test_random_acts_at_its_rate_and_for_real(short: str) -> None:
    rows = [runs.play(Cell(short, "healthy", "", 0.0, seed), "random") for seed in range(12)]
    acts = [name for row in rows for _, name, ok in row.interventions if ok]
    assert 0.4 * RANDOM_PER_RUN <= len(acts) / len(rows) <= 1.8 * RANDOM_PER_RUN
    assert {"rollback", "lower_learning_rate", "raise_kl_coef", "shrink_clip"} >= set(acts)
    assert any(row.lost for row in rows)


# --- the whole benchmark ------------------------------------------------------------------------


def bench(folder: Path, **options: Any) -> int:
    made: dict[str, Any] = {
        "quick": True,
        "task": "short",
        "policy": ["oracle"],
        "fault": ["lr_up"],
        "jobs": 1,
        "out": folder,
    }
    return rescue.main(**{**made, **options})


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The policies of the runs that are played from now on."""
    played, play = list[str](), runs.play

    def counting(cell: Cell, policy: str) -> Row:
        played.append(policy)
        return play(cell, policy)

    monkeypatch.setattr(runs, "play", counting)
    return played


@pytest.mark.usefixtures("everywhere")
def test_the_benchmark_writes_its_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(tmp_path, as_json=True) == 0
    printed, said = capsys.readouterr()
    figures = json.loads(printed)
    assert figures["runs"] == 3
    assert figures["policies"]["oracle"]["false_healthy"] == {"value": None, "n": 0}
    assert "3 runs in 2 cells" in said
    with (tmp_path / "results.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["event"], row["policy"]) for row in rows] == [("", "none"), ("lr_up", "none"), ("lr_up", "oracle")]
    assert {row["healthy"] for row in rows} == {rows[0]["reward"]}
    assert {row["unwatched"] for row in rows[1:]} == {rows[1]["reward"]}
    assert (tmp_path / "table.md").read_text(encoding="utf-8").startswith("# Rescue benchmark")
    minidom.parse(str(tmp_path / "plot.svg"))  # noqa: S318 - our own file


@pytest.mark.usefixtures("everywhere")
def test_a_stopped_benchmark_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench(tmp_path)
    before = (tmp_path / "results.csv").read_text(encoding="utf-8")
    kept = (tmp_path / "runs.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "runs.jsonl").write_text("\n".join(kept[:-1]) + "\n" + kept[-1][:50], encoding="utf-8")
    played = counted(monkeypatch)
    bench(tmp_path)
    assert played == ["oracle"]
    after = (tmp_path / "results.csv").read_text(encoding="utf-8")
    assert [line.rsplit(",", 1)[0] for line in after.splitlines()] == [
        line.rsplit(",", 1)[0] for line in before.splitlines()
    ]
    assert "2 finished runs found" in capsys.readouterr().err


@pytest.mark.usefixtures("everywhere")
def test_changed_code_and_fresh_start_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench(tmp_path)
    played = counted(monkeypatch)
    bench(tmp_path, fresh=True)
    assert len(played) == 3
    capsys.readouterr()
    monkeypatch.setattr(store, "fingerprint", lambda: "another")
    bench(tmp_path)
    assert len(played) == 6
    assert "starting over" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"task": "nonsense"}, "task is 'nonsense'; allowed: reference, chain, tokens"),
        ({"fault": ["lr_up", "lr_down"]}, "fault is 'lr_down'; allowed: "),
        ({"policy": "nonsense"}, "policy is 'nonsense'; allowed: none, guarded, documented"),
        ({"split": "train"}, "split is 'train'; allowed: development, test"),
        ({"seeds": 0}, "seeds is 0; allowed: whole numbers above 0"),
    ],
)
def test_what_is_unknown_is_refused_with_what_is_allowed(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(gw.ConfigurationError, match=re.escape(said)):
        rescue.main(out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_splits_share_neither_seeds_nor_severities() -> None:
    plans = {}
    for split in ("development", "test"):
        asked = rescue.Options(rescue.FULL, tuple(TASKS), tuple(POLICIES), (), split)
        plans[split] = [job.cell for jobs in rescue.plan(asked) for job in jobs]
    ill = {split: [cell for cell in cells if cell.kind == "fault"] for split, cells in plans.items()}
    assert not {c.seed for c in plans["development"]} & {c.seed for c in plans["test"]}
    assert not {cell.task for cell in ill["development"]} & {rescue.HELD_OUT_TASK}
    assert {cell.task for cell in ill["test"]} == set(TASKS)
    assert {cell.event for cell in ill["test"]} == set(FAULTS)


def test_a_full_run_watches_enough_healthy_steps() -> None:
    asked = rescue.Options(rescue.FULL, tuple(TASKS), tuple(POLICIES), (), "test")
    jobs = [job for part in rescue.plan(asked) for job in part]
    watched = sum("guarded" in job.policies and job.cell.kind != "fault" for job in jobs)
    assert watched * 200 >= 60_000
    assert len({job.cell.key for job in jobs}) == len(jobs)


@pytest.mark.slow
def test_processes_give_the_same_numbers_as_one(tmp_path: Path) -> None:
    for jobs in (1, 2):
        bench(tmp_path / str(jobs), task="reference", jobs=jobs)
    one, two = ([json.loads(line) for line in (tmp_path / n / "runs.jsonl").read_text().splitlines()] for n in "12")
    assert [{**row, "seconds": 0} for row in one] == [{**row, "seconds": 0} for row in two]
