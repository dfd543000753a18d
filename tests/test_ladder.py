"""The ladder: which rung, how far back, how much of each limit, and when it ends; through observe only."""

from __future__ import annotations

import itertools
import json
import math
import random
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st

import grpo_watchdog as gw
from fakes import HEALTHY, FakeControls
from grpo_watchdog.errors import RulebookError

CALM = {**HEALTHY, "step_kl": 0.01, "grad_norm": 1.0, "entropy": 2.0}
SICK = {**CALM, "step_kl": 5.0}
WITHOUT_KL = {"step_kl": 5.0, "std_reward": 0.2, "mean_reward": 0.5}  # nothing that a dose could be judged by
BACK = {"rollback": True}
HASTY: dict[str, Any] = {
    "checkpoint_every": 2, "probation": 2, "keep": 4, "rollback_budget": 9, "recur_within": 10, "recover_after": 1000,
    "check_every": 0,
}  # fmt: skip


def rule(
    metric: str,
    edge: float,
    severity: str = "critical",
    *,
    do: Mapping[str, Any] | None = None,
    patience: int = 1,
    witnesses: Mapping[str, list[str]] | None = None,
) -> dict[str, Any]:
    """A rule that fires from an edge on and ends at once; a critical one escalates, unless told otherwise."""
    do = ({"escalate": True} if severity == "critical" else {}) if do is None else do
    text, bands = {"en": metric, "zh": metric}, [{"from": edge, "severity": severity, "do": do}]
    return {"kind": "band", "title": text, "source": "a test", "metric": metric, "for": patience, "keep_firing_for": 1,
            "bands": bands, **(witnesses or {})}  # fmt: skip


TROUBLE = {"trouble": rule("step_kl", 1.0)}


def written(folder: Path, rules: Mapping[str, Any], **policy: Any) -> Path:
    """A rulebook as a file."""
    text = {"en": "a test", "zh": "a test"}
    base = {"learning_rate": 1e-5, "kl_coef": 0.1, "clip_epsilon": 0.2}
    page = {"schema": 1, "name": "test", "title": text, "source": "a test", "base": base, "rules": rules,
            "policy": {**HASTY, **policy}}  # fmt: skip
    path = folder / "rules.yaml"
    path.write_text(json.dumps(page))
    return path


class Stage:
    """A fake trainer under a rulebook of its own; weights are the number of the last step."""

    def __init__(self, folder: Path, rules: Mapping[str, Any] = TROUBLE, *, save: bool = True, **policy: Any) -> None:
        self.controls, self.step, self.run_dir = FakeControls(), 0, folder / "run"
        book = written(folder, rules, **policy)
        self.dog = gw.Watchdog(book, self.controls, self.run_dir if save else None)

    def feed(self, row: Mapping[str, float], times: int = 1) -> list[gw.Verdict]:
        verdicts = []
        for _ in range(times):
            self.controls.weights = float(self.step)
            verdicts.append(self.dog.observe(self.step, row))
            self.step += 1
        return verdicts

    @property
    def now(self) -> tuple[float, float, float]:
        have = self.controls.settings
        return have["learning_rate"], have["kl_coef"], have["clip_epsilon"]

    def replays(self) -> bool:
        self.dog.close()
        return gw.replay(self.run_dir).differences == ()


def done(verdicts: Iterable[gw.Verdict]) -> list[str]:
    """What was done, scheduled checkpoints left out."""
    return [o.action for v in verdicts for o in v.actions if o.rule != "schedule"]


def close(*values: float) -> Any:  # noqa: ANN401 - what pytest compares by
    return pytest.approx(values)


# --- which rung ---------------------------------------------------------------------------------

FOUR = [BACK, {**BACK, "lower_learning_rate": 0.3}, {**BACK, "lower_learning_rate": 0.1, "raise_kl_coef": 3.0},
        {"halt": True}]  # fmt: skip


def test_each_time_that_trouble_comes_back_the_next_rung_is_climbed_and_the_last_one_halts(tmp_path: Path) -> None:
    stage, seen = Stage(tmp_path, ladder=FOUR), []
    for _ in range(4):
        stage.feed(CALM, 6)
        verdict = stage.feed(SICK)[0]
        seen.append((done([verdict]), stage.now))
    rolled, dosed = ["rollback"], ["rollback", "lower_learning_rate"]
    assert [names for names, _ in seen] == [rolled, dosed, [*dosed, "raise_kl_coef"], ["rollback", "halt"]]
    assert [now for _, now in seen[:3]] == [close(1e-5, 0.1, 0.2), close(3e-6, 0.1, 0.2), close(3e-7, 0.3, 0.2)]
    assert verdict.halt
    assert "the trouble came back after every rung of the ladder" in stage.dog.halted
    assert stage.replays()


@pytest.mark.parametrize(("calm", "dosed"), [(9, True), (10, False)])
def test_after_recur_within_the_ladder_begins_at_its_foot_again(tmp_path: Path, calm: int, *, dosed: bool) -> None:
    stage = Stage(tmp_path, ladder=FOUR, recur_within=10)
    stage.feed(CALM, 8)
    stage.feed(SICK)
    stage.feed(CALM, calm)
    assert done(stage.feed(SICK)) == (["rollback", "lower_learning_rate"] if dosed else ["rollback"])


def test_the_last_rung_is_climbed_again_until_the_budget_is_used(tmp_path: Path) -> None:
    stage = Stage(tmp_path, ladder=[{**BACK, "lower_learning_rate": 0.5}], rollback_budget=3)
    verdicts = []
    for _ in range(4):
        stage.feed(CALM, 6)
        verdicts += stage.feed(SICK)
    assert [v.halt for v in verdicts] == [False, False, False, True]
    assert "all 3 rollbacks of the budget are used" in stage.dog.halted
    assert stage.controls.weights == verdicts[-1].rolled_back_to  # it is halted in a proven state
    assert not stage.feed(SICK, 3)[-1].actions


def test_without_any_proven_checkpoint_and_without_doses_it_halts_and_says_why(tmp_path: Path) -> None:
    stage = Stage(tmp_path, ladder=[BACK], probation=50)
    stage.feed(CALM, 8)
    assert stage.feed(SICK)[0].halt
    assert "no checkpoint is proven yet" in stage.dog.halted


def test_on_divergence_halt_leaves_no_rung_that_rolls_back(tmp_path: Path) -> None:
    stage = Stage(tmp_path, ladder=FOUR, on_divergence="halt")
    stage.feed(CALM, 8)
    assert done(stage.feed(SICK)) == ["rollback", "halt"]
    assert "on_divergence is halt" in stage.dog.halted


@pytest.mark.parametrize("rung", [{"escalate": True}, {}, {"lower_learning_rate": 1.5}, {"raise_kl_coef": 0.5}])
def test_a_rung_that_says_nothing_or_turns_a_knob_the_wrong_way_is_refused(tmp_path: Path, rung: Any) -> None:  # noqa: ANN401
    with pytest.raises(RulebookError, match="rung"):
        gw.load(written(tmp_path, TROUBLE, ladder=[rung]))


def test_a_rule_that_escalates_needs_a_ladder(tmp_path: Path) -> None:
    with pytest.raises(RulebookError, match="no rung"):
        gw.load(written(tmp_path, TROUBLE))


# --- how far back -------------------------------------------------------------------------------


def test_trouble_that_comes_back_before_anything_newer_is_proven_goes_deeper(tmp_path: Path) -> None:
    stage = Stage(tmp_path, ladder=[BACK])
    stage.feed(CALM, 13)
    verdicts = stage.feed(SICK, 4)
    assert [v.rolled_back_to for v in verdicts[:3]] == [10, 8, 6]


def test_what_was_proven_since_the_rollback_is_trusted(tmp_path: Path) -> None:
    stage = Stage(tmp_path, ladder=[BACK])
    stage.feed(CALM, 13)
    assert stage.feed(SICK)[0].rolled_back_to == 10
    stage.feed(CALM, 6)
    back = stage.feed(SICK)[0].rolled_back_to
    assert back is not None
    assert 13 < back < 19


@pytest.mark.parametrize("patience", [1, 2, 5, 9])
def test_a_rollback_never_goes_to_what_was_saved_while_the_trouble_was_pending(tmp_path: Path, patience: int) -> None:
    rules = {"trouble": rule("step_kl", 1.0, patience=patience)}
    stage = Stage(tmp_path, rules, ladder=[BACK], checkpoint_every=1, probation=1, keep=30)
    stage.feed(CALM, 20)
    verdicts = stage.feed(SICK, patience)
    assert [v.rolled_back_to for v in verdicts[:-1]] == [None] * (patience - 1)
    back = verdicts[-1].rolled_back_to
    assert back is not None
    assert 17 <= back <= 19


def test_where_everything_kept_is_of_the_trouble_the_oldest_is_taken(tmp_path: Path) -> None:
    rules = {"trouble": rule("step_kl", 1.0, patience=9)}
    stage = Stage(tmp_path, rules, ladder=[BACK], checkpoint_every=1, probation=1, keep=3)
    stage.feed(CALM, 20)
    assert stage.feed(SICK, 9)[-1].rolled_back_to == 24  # 24, 25 and 26 are left


def test_a_fall_goes_back_to_where_the_reward_was_still_well(tmp_path: Path) -> None:
    fall = {"kind": "fall", "title": {"en": "f", "zh": "f"}, "source": "a test", "metric": "mean_reward", "window": 3,
            "share": 0.2, "sigmas": 0, "settle": 10, "severity": "critical", "do": {"escalate": True}}  # fmt: skip
    stage = Stage(tmp_path, {"fall": fall}, ladder=[BACK], checkpoint_every=1, probation=1, keep=60)
    rewards = [0.2 + 0.03 * step for step in range(20)] + [0.8] * 12 + [0.8 - 0.01 * step for step in range(1, 40)]
    verdicts = [stage.feed({"mean_reward": reward})[0] for reward in rewards]
    step, back = next((v.step, v.rolled_back_to) for v in verdicts if v.rolled_back_to is not None)
    assert step > 40  # it fell for a while before it counted: what was saved meanwhile is proven and not taken
    assert 0.8 - rewards[back] < 0.55 * (0.8 - rewards[step])  # nearer to the best than to what it had fallen to
    assert back < step - 5


@pytest.mark.parametrize("replay_data", [True, False])
def test_the_policy_says_whether_the_same_data_come_again(tmp_path: Path, *, replay_data: bool) -> None:
    stage = Stage(tmp_path, ladder=[BACK], replay_data=replay_data)
    stage.feed(CALM, 8)
    stage.feed(SICK)
    assert stage.controls.replayed == [replay_data]


# --- how much -----------------------------------------------------------------------------------

HOLD = {**BACK, "lower_learning_rate": 1.0, "raise_kl_coef": 1.0, "shrink_clip": 1.0}


def test_a_rung_of_1_changes_nothing_in_a_healthy_setting(tmp_path: Path) -> None:
    stage = Stage(tmp_path, ladder=[HOLD, {"halt": True}])
    stage.feed(CALM, 8)
    stage.feed(SICK)
    assert stage.now == (1e-5, 0.1, 0.2)


def test_a_rung_of_1_undoes_a_learning_rate_times_60_and_a_lost_kl(tmp_path: Path) -> None:
    stage = Stage(tmp_path, ladder=[HOLD, {"halt": True}])
    stage.feed(CALM, 8)
    stage.controls.settings |= {"learning_rate": 6e-4, "kl_coef": 0.0}
    stage.feed(SICK)
    assert stage.now == (1e-5, 0.1, 0.2)


@pytest.mark.parametrize("calm", [0, 1, 4])
def test_the_next_rung_starts_from_what_the_one_before_left_in_force(tmp_path: Path, calm: int) -> None:
    stage = Stage(tmp_path, ladder=[HOLD, {**BACK, "lower_learning_rate": 0.3}, {**BACK, "lower_learning_rate": 0.1}])
    stage.feed(CALM, 12)
    stage.controls.settings["learning_rate"] = 6e-4
    seen = []
    for _ in range(3):
        stage.feed(SICK)
        seen.append(stage.now[0])
        stage.feed(CALM, calm)
    assert seen == close(1e-5, 3e-6, 3e-7)


@pytest.mark.parametrize("patience", [1, 3])
def test_in_a_warm_up_a_rung_is_a_factor_on_the_rate_just_before_the_trouble(tmp_path: Path, patience: int) -> None:
    rules = {"trouble": rule("step_kl", 1.0, patience=patience)}
    stage = Stage(tmp_path, rules, ladder=[{**BACK, "lower_learning_rate": 0.5}])
    for step in range(10 + patience):
        stage.controls.settings["learning_rate"] = 1e-7 * (step + 1)
        verdict = stage.feed(CALM if step < 10 else SICK)[0]
    dose = next(o for o in verdict.actions if o.action == "lower_learning_rate")
    assert dose.after == pytest.approx(0.5 * 1e-6)  # step 9 was the last one before it began


def test_without_a_checkpoint_a_rung_that_holds_is_passed_over_for_one_that_changes_something(tmp_path: Path) -> None:
    stage = Stage(tmp_path, ladder=[HOLD, {**BACK, "lower_learning_rate": 0.3}], save=False)
    stage.feed(CALM, 8)
    assert done(stage.feed(SICK)) == ["lower_learning_rate"]
    assert stage.now[0] == pytest.approx(3e-6)


def test_a_knob_that_is_not_there_is_left_out_of_a_rung(tmp_path: Path) -> None:
    controls = FakeControls(without=("kl_coef",))
    book = written(tmp_path, TROUBLE, ladder=[{"raise_kl_coef": 2.0, "lower_learning_rate": 0.5}])
    dog = gw.Watchdog(book, controls)
    dog.observe(0, CALM)
    assert done([dog.observe(1, SICK)]) == ["lower_learning_rate"]


# --- a rung that only doses ---------------------------------------------------------------------

DOSES = [{"lower_learning_rate": 0.5}, {"lower_learning_rate": 0.2}, {"halt": True}]


def test_a_rung_without_a_rollback_waits_for_its_effect_and_then_climbs(tmp_path: Path) -> None:
    stage = Stage(tmp_path, ladder=DOSES, effect_within=5)
    stage.feed(CALM, 4)
    verdicts = stage.feed(WITHOUT_KL, 11)
    acts = [(v.step - 4, o.action, o.after) for v in verdicts for o in v.actions if o.rule == "trouble"]
    assert [(step, name) for step, name, _ in acts] == [
        (0, "lower_learning_rate"),
        (5, "lower_learning_rate"),
        (10, "rollback"),
        (10, "halt"),
    ]
    assert [after for _, name, after in acts if "rate" in name] == close(5e-6, 2e-6)


def test_a_rung_whose_rule_stops_in_time_is_the_last_one(tmp_path: Path) -> None:
    stage = Stage(tmp_path, ladder=DOSES, effect_within=5)
    stage.feed(CALM, 4)
    stage.feed(WITHOUT_KL, 4)
    assert not done(stage.feed(CALM, 20))
    assert stage.now[0] == pytest.approx(5e-6)


def test_a_dose_that_did_not_help_is_undone_and_the_next_rung_is_climbed(tmp_path: Path) -> None:
    stage = Stage(tmp_path, ladder=[{"raise_kl_coef": 3.0}, {"lower_learning_rate": 0.3}], effect_within=4)
    stage.feed(CALM, 4)
    verdicts = [v for size in range(5) for v in stage.feed({**SICK, "log_ratio": 1.0 + size})]
    assert done(verdicts[:-1]) == ["raise_kl_coef"]
    assert sorted(done(verdicts[-1:])) == ["lower_learning_rate", "restore_kl_coef"]
    assert stage.now == close(3e-6, 0.1, 0.2)
    reason = next(o.reason for o in verdicts[-1].actions if o.action == "restore_kl_coef")
    assert "did not fall" in reason
    assert stage.replays()


def test_a_dose_after_which_the_kl_falls_is_kept(tmp_path: Path) -> None:
    stage = Stage(tmp_path, ladder=[{"raise_kl_coef": 3.0}, {"lower_learning_rate": 0.3}], effect_within=4)
    stage.feed(CALM, 4)
    verdicts = [v for size in range(5) for v in stage.feed({**(SICK if size < 3 else CALM), "log_ratio": 6.0 - size})]
    assert done(verdicts) == ["raise_kl_coef"]
    assert stage.now == close(1e-5, 0.3, 0.2)


# --- letting up ---------------------------------------------------------------------------------


def test_a_limit_is_let_up_step_by_step_to_what_the_run_started_with_and_stays_where_more_is_set(
    tmp_path: Path,
) -> None:
    rung = {**BACK, "lower_learning_rate": 0.3, "raise_kl_coef": 2.0, "shrink_clip": 0.5}
    stage = Stage(tmp_path, ladder=[rung], rewarm=1.5, recover_after=6)
    stage.feed(CALM, 8)
    stage.controls.settings |= {"learning_rate": 6e-4, "kl_coef": 0.01, "clip_epsilon": 0.4}
    stage.feed(SICK)
    rates, kls, changed = [], [], []
    for _ in range(40):
        stage.feed(CALM)
        rates.append(stage.now[0])
        kls.append(stage.now[1])
        if len(rates) > 1 and rates[-1] != rates[-2]:
            changed.append(stage.step)
    assert sorted(set(rates)) == close(3e-6, 4.5e-6, 6.75e-6, 1e-5)
    assert sorted(set(kls), reverse=True) == close(0.2, 0.2 / 1.5, 0.1)
    assert rates == sorted(rates)
    assert [b - a for a, b in itertools.pairwise(changed)] == [6, 6]
    stage.feed(CALM, 60)
    assert stage.now == (1e-5, 0.1, 0.2)  # never beyond it
    assert stage.replays()


def test_a_limit_that_holds_nothing_any_more_is_let_go(tmp_path: Path) -> None:
    stage = Stage(tmp_path, ladder=[{**BACK, "lower_learning_rate": 0.3}], rewarm=1.5, recover_after=6)
    stage.feed(CALM, 8)
    stage.feed(SICK)
    stage.controls.settings["learning_rate"] = 2e-6  # the user's own, and below what is held
    assert "restore_learning_rate" in done(stage.feed(CALM, 8))
    assert stage.now[0] == 2e-6
    assert stage.replays()


def test_without_rewarm_a_limit_is_lifted_at_once(tmp_path: Path) -> None:
    stage = Stage(tmp_path, ladder=[{**BACK, "lower_learning_rate": 0.3}], recover_after=6)
    stage.feed(CALM, 8)
    stage.feed(SICK)
    assert "restore_learning_rate" in done(stage.feed(CALM, 8))
    assert stage.now[0] == 1e-5


# --- harm ---------------------------------------------------------------------------------------

HARM = {**TROUBLE, "harmful": rule("entropy", 10.0)}


def test_trouble_that_comes_back_and_does_no_harm_is_lived_with(tmp_path: Path) -> None:
    stage = Stage(tmp_path, HARM, ladder=[HOLD, {**BACK, "lower_learning_rate": 0.3}, {"halt": True}],
                  harm=["harmful"], recur_within=30)  # fmt: skip
    stage.feed(CALM, 8)
    assert stage.feed(SICK)[0].rolled_back_to is not None
    stage.feed(CALM, 2)
    returned = stage.step
    verdicts = stage.feed(SICK, 12)
    assert not done(verdicts)
    assert {v.level for v in verdicts} == {"critical"}
    assert not stage.dog.halted
    harmed = stage.feed({**SICK, "entropy": 20.0})[0]  # now it harms
    assert done([harmed]) == ["rollback", "lower_learning_rate"]
    assert harmed.rolled_back_to is not None
    assert harmed.rolled_back_to >= returned  # checkpoints were proven again meanwhile
    assert stage.replays()


def test_without_a_list_of_harm_what_comes_back_climbs_in_any_case(tmp_path: Path) -> None:
    stage = Stage(tmp_path, HARM, ladder=[HOLD, {**BACK, "lower_learning_rate": 0.3}])
    stage.feed(CALM, 8)
    stage.feed(SICK)
    stage.feed(CALM, 2)
    assert "lower_learning_rate" in done(stage.feed(SICK))


# --- witnesses ----------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["corroborated_by", "contradicted_by"])
def test_what_has_no_witness_or_a_contradiction_is_milder_and_asks_for_nothing(tmp_path: Path, field: str) -> None:
    rules = {
        "trouble": rule("step_kl", 1.0, witnesses={field: ["witness"]}),
        "witness": rule("grad_norm", 10.0, "notice"),
    }
    stage = Stage(tmp_path, rules, ladder=[BACK])
    seen, unseen = {**SICK, "grad_norm": 50.0}, SICK
    alone, acting = (unseen, seen) if field == "corroborated_by" else (seen, unseen)
    stage.feed(CALM, 8)
    since = stage.step
    verdicts = stage.feed(alone, 12)
    assert not done(verdicts)
    assert {v.level for v in verdicts} == {"warning"}
    found = next(f for f in verdicts[-1].findings if f.rule == "trouble")
    assert (found.severity, found.alone) == ("warning", True)
    state = stage.dog.state_dict()["ledger"]["entries"]
    assert any(step >= since and proven for _, step, _, proven, *_ in state)  # checkpoints are not held up
    assert done(stage.feed(acting)) == ["rollback"]


# --- early warnings, pause ----------------------------------------------------------------------

EARLY = {"checkpoint_now": True, "shorten_probation": 0.2}
WARNED = {**TROUBLE, "warned": rule("grad_norm", 10.0, "warning", do=EARLY)}


@pytest.mark.parametrize("warned", [True, False])
def test_an_early_warning_takes_a_checkpoint_and_shortens_its_probation(tmp_path: Path, *, warned: bool) -> None:
    stage = Stage(tmp_path, WARNED, ladder=[BACK], checkpoint_every=20, probation=10)
    stage.feed(CALM, 15)
    verdicts = stage.feed({**CALM, "grad_norm": 50.0 if warned else 1.0}, 3)
    assert done(verdicts) == (["checkpoint_now", "shorten_probation"] if warned else [])
    assert stage.now == (1e-5, 0.1, 0.2)
    assert stage.feed(SICK)[0].rolled_back_to == (15 if warned else 0)


def test_when_the_warning_is_over_the_probation_is_as_long_as_before(tmp_path: Path) -> None:
    stage = Stage(tmp_path, WARNED, ladder=[BACK], checkpoint_every=20, probation=10)
    stage.feed(CALM, 15)
    stage.feed({**CALM, "grad_norm": 50.0})
    stage.feed(CALM, 5)
    assert stage.feed(SICK)[0].rolled_back_to == 0


PAUSING = {"empty": rule("zero_std_fraction", 1.0, "critical", do={"pause": True})}
NOTHING = {**CALM, "zero_std_fraction": 1.0}


def test_the_optimizer_is_paused_while_there_is_nothing_to_learn_from(tmp_path: Path) -> None:
    stage = Stage(tmp_path, PAUSING)
    assert done(stage.feed({**CALM, "zero_std_fraction": 0.0}, 3)) == []
    assert done(stage.feed(NOTHING, 4)) == ["pause"]
    assert stage.controls.paused
    assert done(stage.feed({**CALM, "zero_std_fraction": 0.0}, 3)) == ["unpause"]
    assert not stage.controls.paused
    assert done(stage.feed(NOTHING)) == ["pause"]
    assert stage.replays()


def test_a_trainer_that_cannot_be_paused_is_told_of_once(tmp_path: Path) -> None:
    dog = gw.Watchdog(written(tmp_path, PAUSING))
    verdicts = [dog.observe(step, NOTHING) for step in range(6)]
    assert [(o.action, o.ok) for v in verdicts for o in v.actions] == [("pause", False)]


def test_loading_the_state_of_a_paused_run_pauses_it(tmp_path: Path) -> None:
    stage = Stage(tmp_path, PAUSING)
    stage.feed(NOTHING, 2)
    fresh = FakeControls()
    second = gw.Watchdog(tmp_path / "rules.yaml", fresh)
    second.load_state_dict(json.loads(json.dumps(stage.dog.state_dict())))
    assert fresh.paused
    second.observe(stage.step, {**CALM, "zero_std_fraction": 0.0})
    assert not fresh.paused


# --- the shipped rulebook: guarded --------------------------------------------------------------


def stream(spikes: Mapping[int, Mapping[str, float]], steps: int = 60, **options: Any) -> tuple[gw.Watchdog, list[Any]]:
    """A healthy stream with a little noise, and some values replaced at some steps."""
    rng, controls = random.Random(3), FakeControls()
    dog, verdicts = gw.Watchdog("guarded", controls, ratio_to="old", **options), []
    for step in range(steps):
        kl = 0.01 * math.exp(rng.gauss(0, 0.2))
        row = {**HEALTHY, "step_kl": kl, "grad_norm": math.exp(rng.gauss(0, 0.2)), "entropy": 2.0 - step / 1000,
               "mean_reward": 0.5 + rng.gauss(0, 0.02) + step / 500}  # fmt: skip
        changed = dict(spikes.get(step, {}))
        controls.taken = {"vetoes": changed.pop("vetoes", 0.0)}
        verdicts.append(dog.observe(step, {**row, **{name: row[name] * factor for name, factor in changed.items()}}))
    return dog, verdicts


@pytest.mark.parametrize(
    "spike",
    [{"step_kl": 1000.0}, {"grad_norm": 1000.0}, {"loss": math.nan, "vetoes": 1.0}, {"loss": math.nan},
     {"mean_reward": 0.5}],
    ids=str,
)  # fmt: skip
def test_one_spike_that_heals_is_no_reason_to_touch_a_run(tmp_path: Path, spike: dict[str, float]) -> None:
    dog, verdicts = stream({40: spike}, run_dir=tmp_path / "run", checkpoint_every=5, probation=5)
    assert any(v.findings for v in verdicts[40:])
    assert not {o.action for v in verdicts for o in v.actions} - {"checkpoint_now", "shorten_probation"}
    assert not dog.halted


@pytest.mark.parametrize("what", [{"step_kl": 1000.0}, {"loss": math.nan}], ids=str)
def test_what_stays_is_rolled_back(tmp_path: Path, what: dict[str, float]) -> None:
    _, verdicts = stream({40: what, 41: what}, run_dir=tmp_path / "run", checkpoint_every=5, probation=5)
    assert next(v.rolled_back_to for v in verdicts if v.rolled_back_to is not None) < 40


def test_trouble_after_every_rollback_ends_in_a_halt_and_no_ping_pong(tmp_path: Path) -> None:
    bad = {"loss": math.nan}
    spikes = {step: bad for start in range(40, 400, 8) for step in (start, start + 1)}
    dog, verdicts = stream(spikes, 400, run_dir=tmp_path / "run", checkpoint_every=2, probation=2)
    back = [v for v in verdicts if v.rolled_back_to is not None and not v.halt]
    assert dog.halted
    assert 1 <= len(back) <= dog.book.policy.rollback_budget


# --- memory -------------------------------------------------------------------------------------


def follow(stage: Stage, rows: Iterable[Mapping[str, float]]) -> list[Any]:
    seen = []
    for row in rows:
        verdict = stage.feed(row)[0]
        acts = [o._replace(detail="") for o in verdict.actions]  # ids of checkpoints count on in each folder
        seen.append((verdict.level, verdict.halt, verdict.rolled_back_to, acts, stage.now))
    return seen


def twin(folder: Path, stage: Stage) -> Stage:
    """Another stage that is handed what the first one remembers and has saved."""
    (folder / "twin").mkdir()
    other = Stage.__new__(Stage)
    other.controls, other.step, other.run_dir = FakeControls(), stage.step, folder / "twin/run"
    shutil.copytree(stage.run_dir / "checkpoints", other.run_dir / "checkpoints")
    other.dog = gw.Watchdog(folder / "rules.yaml", other.controls, other.run_dir)
    other.dog.load_state_dict(json.loads(json.dumps(stage.dog.state_dict())))
    return other


@pytest.mark.parametrize("pause_at", [9, 10, 12, 17])
def test_a_ladder_goes_on_from_what_it_remembered(tmp_path: Path, pause_at: int) -> None:
    stage = Stage(tmp_path, HARM, ladder=[HOLD, *FOUR[1:]], rewarm=1.5, recover_after=3, harm=["harmful"])
    harmed = {**SICK, "entropy": 20.0}
    rows = [CALM] * 8 + [SICK] + [CALM] * 3 + [SICK] * 4 + [harmed] + [CALM] * 4 + [harmed, CALM, CALM, harmed, CALM]
    follow(stage, rows[:pause_at])
    other = twin(tmp_path, stage)
    assert other.dog.state_dict() == stage.dog.state_dict()
    assert other.now == stage.now
    rest = follow(stage, rows[pause_at:])
    assert follow(other, rows[pause_at:]) == rest
    assert any(names for *_, names, _ in rest)
    assert other.replays()


# --- laws ---------------------------------------------------------------------------------------

LAW_RULES = {
    "trouble": rule("step_kl", 1.0),
    "slow": rule("grad_norm", 10.0, patience=2),
    "harmful": rule("entropy", 10.0, witnesses={"corroborated_by": ["trouble", "slow"]}),
    "empty": rule("zero_std_fraction", 1.0, do={"pause": True}, witnesses={"contradicted_by": ["trouble"]}),
    "warned": rule("std_advantage", 9.0, "warning", do={"checkpoint_now": True, "shorten_probation": 0.5}),
}
RUNGS = [BACK, HOLD, {**BACK, "lower_learning_rate": 0.3}, {"raise_kl_coef": 3.0, "shrink_clip": 0.5}, {"halt": True}]
ROWS = st.fixed_dictionaries(
    {},
    optional={
        "step_kl": st.sampled_from([0.01, 5.0, math.nan]),
        "grad_norm": st.sampled_from([1.0, 50.0]),
        "entropy": st.sampled_from([2.0, 20.0]),
        "zero_std_fraction": st.sampled_from([0.0, 1.0]),
        "std_advantage": st.sampled_from([1.0, 99.0]),
        "log_ratio": st.sampled_from([0.1, 3.0]),
    },
)
SETS = st.tuples(
    st.sampled_from(["learning_rate", "kl_coef", "clip_epsilon"]), st.sampled_from([1e-7, 6e-4, 0.05, 0.3, 2.0])
)
MOVES = st.lists(st.one_of(st.just({}), st.just({}), ROWS, ROWS, SETS), max_size=40)
POLICIES = st.fixed_dictionaries({
    "mode": st.sampled_from(["act", "act", "approve", "shadow"]),
    "shadow": st.lists(st.sampled_from(["trouble", "rollback", "lower_learning_rate", "checkpoint_now", "pause"]),
                       max_size=2),
    "rollback_budget": st.integers(0, 3), "recur_within": st.sampled_from([0, 4, 30]),
    "recover_after": st.sampled_from([2, 8]), "rewarm": st.sampled_from([None, 1.5]),
    "effect_within": st.integers(1, 4), "keep": st.integers(1, 3), "harm": st.sampled_from([[], ["harmful"]]),
    "approve_within": st.integers(1, 4), "approve_default": st.sampled_from(["yes", "no"]),
})  # fmt: skip


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(MOVES, st.lists(st.sampled_from(RUNGS), min_size=1, max_size=4), POLICIES)
@example([{}] * 6 + [{"step_kl": 5.0}] * 20, [BACK], {"rollback_budget": 2})
@example([{}] * 6 + [{"step_kl": 5.0}, {}, {}, {}] * 8, [HOLD, BACK], {"rollback_budget": 3, "recur_within": 30})
@example([{}] * 6 + [{"step_kl": 5.0}] * 4, [BACK], {"shadow": ["checkpoint_now"], "mode": "act"})
def test_whatever_comes_the_budget_holds_no_knob_is_turned_the_wrong_way_and_it_replays(
    moves: list[Any], ladder: list[Any], policy: dict[str, Any]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(Path(folder), LAW_RULES, ladder=ladder, **policy)
        own, rollbacks = dict(stage.controls.settings), 0
        for move in moves:
            if isinstance(move, tuple):
                own[move[0]] = stage.controls.settings[move[0]] = float(repr(move[1]))
                continue
            verdict = stage.feed({**CALM, **move})[0]
            assert not any("the watchdog failed" in text for text in verdict.notices)
            rollbacks += verdict.rolled_back_to is not None and not verdict.halt
            rate, kl, clip = stage.now
            assert rate <= own["learning_rate"]
            assert kl >= own["kl_coef"]
            assert clip <= own["clip_epsilon"]
            if policy.get("mode") == "shadow":
                assert stage.controls.settings == own
        assert rollbacks <= stage.dog.book.policy.rollback_budget
        event(f"{policy.get('mode')}: {rollbacks} rollbacks")
        assert stage.replays()
