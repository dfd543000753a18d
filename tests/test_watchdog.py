"""What the watchdog does over a run: doses, rollbacks, budgets, recovery, resuming; through observe only."""

from __future__ import annotations

import copy
import itertools
import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import grpo_watchdog as gw
from fakes import HEALTHY, FakeControls
from grpo_watchdog.controls import Check, DialKnob, dial, item

SICK = {**HEALTHY, "log_ratio": 25.0}
FIRST_BAND = {**HEALTHY, "log_ratio": 6.0}


def started(folder: Path, controls: FakeControls | None = None, **options: Any) -> tuple[gw.Watchdog, FakeControls]:
    controls = controls or FakeControls()
    options = {"checkpoint_every": 10, "probation": 5, **options}
    return gw.Watchdog("documented", controls, folder / "run", **options), controls


def feed(dog: gw.Watchdog, controls: FakeControls, row: dict[str, float], steps: range) -> list[gw.Verdict]:
    verdicts = []
    for step in steps:
        controls.weights = float(step)
        verdicts.append(dog.observe(step, row))
    return verdicts


def names(verdict: gw.Verdict) -> list[str]:
    return [outcome.action for outcome in verdict.actions]


def test_the_third_band_rolls_back_to_the_newest_proven_checkpoint_and_goes_on_with_its_doses(tmp_path: Path) -> None:
    dog, controls = started(tmp_path)
    feed(dog, controls, HEALTHY, range(33))
    verdict = feed(dog, controls, SICK, range(33, 34))[0]
    assert verdict.level == "critical"
    assert not verdict.halt
    assert names(verdict) == ["rollback", "lower_learning_rate", "raise_kl_coef"]
    assert verdict.rolled_back_to == 20  # 30 was taken, but only 3 healthy observations followed
    assert controls.weights == 20.0
    assert controls.settings == {"learning_rate": 1e-7, "kl_coef": 2.0, "clip_epsilon": 0.2}
    assert feed(dog, controls, HEALTHY, range(34, 35))[0].level == "ok"


def test_steps_may_start_again_after_a_rollback(tmp_path: Path) -> None:
    dog, controls = started(tmp_path)
    feed(dog, controls, HEALTHY, range(33))
    back = feed(dog, controls, SICK, range(33, 34))[0].rolled_back_to
    assert back == 20
    assert not feed(dog, controls, HEALTHY, range(21, 40))[0].notices
    assert any("went back" in text for text in dog.observe(3, HEALTHY).notices)


def test_trouble_soon_after_a_rollback_goes_deeper_and_halts_where_nothing_is_deeper(tmp_path: Path) -> None:
    dog, controls = started(tmp_path, rollback_budget=5)
    feed(dog, controls, HEALTHY, range(33))
    verdicts = feed(dog, controls, SICK, range(33, 37))
    assert [v.rolled_back_to for v in verdicts] == [20, 10, 0, 0]
    assert [v.halt for v in verdicts] == [False, False, False, True]
    assert "no older checkpoint is proven" in dog.halted


def test_the_budget_of_rollbacks_ends_in_a_halt_at_the_restored_state(tmp_path: Path) -> None:
    dog, controls = started(tmp_path, rollback_budget=1, recur_within=0)
    feed(dog, controls, HEALTHY, range(33))
    assert not feed(dog, controls, SICK, range(33, 34))[0].halt
    feed(dog, controls, HEALTHY, range(34, 60))
    last = feed(dog, controls, SICK, range(60, 61))[0]
    assert last.halt
    assert "all 1 rollbacks" in dog.halted
    assert last.rolled_back_to is not None
    assert controls.weights == float(last.rolled_back_to)
    assert all(v.halt and not v.actions for v in feed(dog, controls, HEALTHY, range(61, 70)))


def test_on_divergence_halt_restores_and_halts(tmp_path: Path) -> None:
    dog, controls = started(tmp_path, on_divergence="halt")
    feed(dog, controls, HEALTHY, range(20))
    verdict = feed(dog, controls, SICK, range(20, 21))[0]
    assert verdict.halt
    assert verdict.rolled_back_to == controls.weights == 10
    assert dog.halted.endswith("on_divergence is halt")


def test_without_a_proven_checkpoint_the_run_halts_and_nothing_is_restored(tmp_path: Path) -> None:
    dog, controls = started(tmp_path)
    feed(dog, controls, HEALTHY, range(3))
    verdict = feed(dog, controls, SICK, range(3, 4))[0]
    assert verdict.halt
    assert verdict.rolled_back_to is None
    assert controls.weights == 3.0
    assert "no checkpoint is proven yet" in dog.halted


def test_a_warning_discards_the_checkpoints_that_are_not_yet_proven(tmp_path: Path) -> None:
    dog, controls = started(tmp_path)
    feed(dog, controls, HEALTHY, range(22))  # 20 is a candidate
    feed(dog, controls, FIRST_BAND, range(22, 23))
    feed(dog, controls, HEALTHY, range(23, 60))
    kept = sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir())
    assert not any(name.endswith("step-20") for name in kept)


def test_doses_are_lifted_after_recover_after_healthy_observations_and_later_each_time(tmp_path: Path) -> None:
    dog, controls = started(tmp_path, recover_after=20)
    spans = []
    step = 0
    for _ in range(3):
        feed(dog, controls, FIRST_BAND, range(step, step + 3))
        assert controls.settings == {"learning_rate": 1e-6, "kl_coef": 0.5, "clip_epsilon": 0.2}
        begun = step + 3
        step = begun
        while controls.settings["learning_rate"] != 1e-5:
            feed(dog, controls, HEALTHY, range(step, step + 1))
            step += 1
        assert controls.settings == {"learning_rate": 1e-5, "kl_coef": 0.1, "clip_epsilon": 0.2}
        spans.append(step - begun)
    assert spans[0] < spans[1] < spans[2]
    assert spans[1] - spans[0] == 20


def test_a_kl_dose_that_does_not_lower_the_kl_is_taken_back_with_the_reason(tmp_path: Path) -> None:
    dog, controls = started(tmp_path, effect_within=5, cooldown=8)
    verdicts = [dog.observe(step, {**FIRST_BAND, "log_ratio": 6.0 + step / 10}) for step in range(20)]
    changes = [(v.step, o.action, o.after) for v in verdicts for o in v.actions if "kl" in o.action]
    assert changes == [
        (0, "raise_kl_coef", 0.5),
        (5, "restore_kl_coef", 0.1),
        (13, "raise_kl_coef", 0.5),
        (18, "restore_kl_coef", 0.1),
    ]
    assert controls.settings["learning_rate"] == 1e-6
    reason = next(o.reason for v in verdicts for o in v.actions if o.action == "restore_kl_coef")
    assert "did not fall" in reason


def test_a_higher_band_overrides_the_cooldown_of_a_dose_that_was_taken_back(tmp_path: Path) -> None:
    dog, controls = started(tmp_path, effect_within=5, cooldown=1000)
    for step in range(8):
        dog.observe(step, {**FIRST_BAND, "log_ratio": 6.0 + step / 10})
    assert controls.settings["kl_coef"] == 0.1
    dog.observe(8, {**HEALTHY, "log_ratio": 12.0})
    assert controls.settings["kl_coef"] == 1.0


def test_a_missing_knob_is_said_at_attach_and_its_dose_left_out(tmp_path: Path) -> None:
    dog, controls = started(tmp_path, FakeControls(without=("kl_coef",)))
    assert any("no kl_coef knob" in line and "raise_kl_coef cannot be given" in line for line in dog.briefing)
    assert names(feed(dog, controls, FIRST_BAND, range(1))[0]) == ["lower_learning_rate"]


def test_a_base_far_from_the_documents_is_said_at_attach_and_scaled_targets_say_what_they_do(tmp_path: Path) -> None:
    absolute = gw.Watchdog("documented", FakeControls(learning_rate=3e-4), tmp_path / "absolute")
    assert any("learning_rate is 0.0003, the document's 1e-05" in line for line in absolute.briefing)
    assert any("learning_rate 0.0003 to 1e-06" in line for line in absolute.briefing)
    scaled = gw.Watchdog("documented", FakeControls(learning_rate=3e-4), tmp_path / "scaled", targets="scaled")
    assert any("learning_rate 0.0003 to 3e-05, kl_coef 0.1 to 0.5" in line for line in scaled.briefing)
    assert not any("the document's" in line for line in scaled.briefing)


@pytest.mark.parametrize("fault", ["restore", "save", "inspect"])
def test_a_trainer_that_fails_under_us_is_an_outcome_or_a_halt_never_an_exception(tmp_path: Path, fault: str) -> None:
    dog, controls = started(tmp_path)
    if fault == "save":
        controls.fail.add(fault)
    feed(dog, controls, HEALTHY, range(33))
    controls.fail.add(fault)
    verdict = feed(dog, controls, SICK, range(33, 34))[0]
    if fault == "inspect":
        assert not verdict.halt
        return
    assert verdict.halt
    assert controls.weights == 33.0
    failed = [o for o in verdict.actions if not o.ok]
    assert ("the fake cannot restore" in failed[0].detail) if fault == "restore" else not failed


def test_a_knob_whose_setter_raises_is_a_failed_outcome(tmp_path: Path) -> None:
    class Stuck:
        beta = 0.1
        broken = False

        def write(self, value: float) -> None:
            if self.broken:
                raise RuntimeError("frozen")
            self.beta = value

    stuck, controls = Stuck(), FakeControls(without=("kl_coef",))
    controls.knobs["kl_coef"] = DialKnob(dial((lambda: stuck.beta, stuck.write), "kl_coef"), "max")
    dog, _ = started(tmp_path, controls)
    stuck.broken = True
    verdict = dog.observe(0, FIRST_BAND)
    failed = next(o for o in verdict.actions if o.action == "raise_kl_coef")
    assert not failed.ok
    assert "frozen" in failed.detail


def test_somebody_who_overwrites_a_held_knob_is_named_and_overruled(tmp_path: Path) -> None:
    dog, controls = started(tmp_path)
    feed(dog, controls, FIRST_BAND, range(1))
    controls.settings["kl_coef"] = 0.05  # an adaptive controller, say
    verdict = feed(dog, controls, FIRST_BAND, range(1, 2))[0]
    told = next(o for o in verdict.actions if o.action == "raise_kl_coef")
    assert not told.ok
    assert "somebody set it to 0.05" in told.detail
    assert controls.settings["kl_coef"] == 0.5


def test_a_failed_model_check_is_a_notice_once_and_evidence_in_the_incident(tmp_path: Path) -> None:
    controls = FakeControls()
    controls.checks = [Check("reference", passed=False, detail="the reference: it is not frozen")]
    dog, _ = started(tmp_path, controls, probation=1, checkpoint_every=1)
    feed(dog, controls, HEALTHY, range(5))
    verdict = feed(dog, controls, SICK, range(5, 6))[0]
    assert verdict.incidents[0].causes[0].cause == "reference_not_frozen"
    assert verdict.incidents[0].causes[0].supported == ("the reference: it is not frozen",)
    assert [c.name for c in verdict.incidents[0].checks] == ["reference"]


def test_one_divergence_is_one_incident_though_its_root_deepens() -> None:
    dog = gw.Watchdog("documented")
    ids = set()
    ramp = [0.5, 1.5, 2.0, 3.0, 4.5, 6.0, 11.0, 9.0, 6.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0]
    for step, size in enumerate(ramp):
        row = {
            "kl_penalty": size,
            "log_ratio": size,
            "mean_ratio": math.exp(size),
            "loss": size**3,
            "policy_loss": size**2,
        }
        verdict = dog.observe(step, row)
        assert len(verdict.incidents) <= 1, [i.rule for i in verdict.incidents]
        ids |= {incident.id for incident in verdict.incidents}
        if size == 11.0:
            assert verdict.incidents[0].rule == "log_ratio"
            assert verdict.incidents[0].since == 1
    assert ids == {1}


def test_an_error_inside_the_watchdog_is_a_notice_and_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    dog = gw.Watchdog("documented")
    monkeypatch.setattr("grpo_watchdog.plan.Planner.plan", lambda *_: 1 / 0)
    with caplog.at_level(logging.ERROR, "grpo_watchdog"):
        verdict = dog.observe(0, HEALTHY)
    assert verdict.level == "notice"
    assert "division by zero" in verdict.notices[0]


def test_a_listener_that_fails_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    calls = []

    def listener(step: gw.Step, verdict: gw.Verdict) -> None:  # noqa: ARG001
        calls.append(step.number)
        raise ValueError("no")

    dog = gw.Watchdog("documented", listeners=[listener])
    with caplog.at_level(logging.ERROR, "grpo_watchdog"):
        dog.observe(0, HEALTHY)
        dog.observe(1, HEALTHY)
    assert calls == [0]


def test_a_folder_that_holds_a_run_is_refused_and_untouched(tmp_path: Path) -> None:
    dog, controls = started(tmp_path)
    feed(dog, controls, HEALTHY, range(5))
    dog.close()
    before = (tmp_path / "run/journal.jsonl").read_bytes()
    with pytest.raises(gw.ConfigurationError, match="already holds a run: pass resume=True"):
        started(tmp_path)
    assert (tmp_path / "run/journal.jsonl").read_bytes() == before
    with pytest.raises(gw.ConfigurationError, match="holds no run"):
        gw.Watchdog("documented", FakeControls(), tmp_path / "other", resume=True)


def test_a_halted_run_is_resumed_from_its_checkpoint_with_its_doses(tmp_path: Path) -> None:
    dog, controls = started(tmp_path, on_divergence="halt")
    feed(dog, controls, HEALTHY, range(33))
    assert feed(dog, controls, SICK, range(33, 34))[0].halt
    del dog  # the process ends without close

    fresh = FakeControls()
    again, _ = started(tmp_path, fresh, resume=True)
    assert again.resumed_from == 20
    assert fresh.weights == 20.0
    assert fresh.settings == {"learning_rate": 1e-7, "kl_coef": 2.0, "clip_epsilon": 0.2}
    assert not again.halted
    assert feed(again, fresh, HEALTHY, range(21, 22))[0].level == "ok"
    again.close()
    assert not gw.replay(tmp_path / "run").differences


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"probaton": 3}, "did you mean probation"),
        ({"probation": 0}, "probation"),
        ({"on_divergence": "explode"}, "rollback"),
        ({"ratio_to": "sampler"}, "allowed: reference, old"),
        ({"dims": 0}, "dims is 0"),
        ({"rules": "documentd"}, "did you mean documented"),
    ],
)
def test_bad_options_say_what_is_allowed(options: dict[str, Any], said: str) -> None:
    with pytest.raises(gw.ConfigurationError, match=said):
        gw.Watchdog(**options)


def test_the_ratio_to_the_old_policy_never_meets_the_drift_from_the_reference() -> None:
    row = {"mean_log_prob_current": -100.0, "mean_log_prob_ref": -160.0, "mean_ratio": 1.0}
    assert gw.Watchdog("documented").observe(0, row).level == "critical"
    dog = gw.Watchdog("documented", ratio_to="old")
    assert dog.observe(0, row).level == "ok"
    assert "log_ratio" in {b.rule for b in dog.blind()}


def test_blindness_is_named_with_its_reason() -> None:
    dog = gw.Watchdog("documented")
    for step in range(200):
        dog.observe(step, {"log_ratio": 0.0, "mean_ratio": 1.0 + step / 1000})
    blind = {b.rule: b.reason for b in dog.blind()}
    assert blind["loss"] == "never given"
    assert blind["log_ratio"].startswith("frozen: log_ratio = 0")
    assert "mean_ratio" not in blind


def test_many_dimensions_get_a_word_about_the_unit(tmp_path: Path) -> None:
    dog = gw.Watchdog("documented", run_dir=tmp_path / "run", dims=263 * 196 * 50)
    assert any("2,577,400 dimensions" in line for line in dog.briefing)
    dog.observe(0, {"mean_log_prob_current": -2577400.0, "mean_log_prob_ref": -2577401.0})
    dog.close()
    assert gw.read_run(tmp_path / "run").frame()["log_prob_per_dim"].tolist() == [-1.0]


def test_the_other_actions_of_a_rulebook_are_done_once_each_time_a_rule_fires(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "schema: 1\nname: mine\nextends: documented\nrules:\n  long:\n    kind: outside\n"
        "    title: {en: long, zh: long}\n    source: ours\n    metric: completion_length\n    high: 10\n"
        "    severity: warning\n    keep_firing_for: 1\n"
        "    do: {checkpoint_now: true, checkpoint_more_often: 2, tighten_grad_norm: 0.5}\n"
    )
    controls = FakeControls()
    controls.settings["grad_norm_limit"] = 1.0
    controls.knobs["grad_norm_limit"] = DialKnob(item(controls.settings, "grad_norm_limit"), "min")
    dog = gw.Watchdog(tmp_path / "mine.yaml", controls, tmp_path / "run", checkpoint_every=20, probation=5)
    feed(dog, controls, HEALTHY, range(2))
    verdicts = feed(dog, controls, {**HEALTHY, "completion_length": 20.0}, range(2, 5))
    assert [names(v) for v in verdicts] == [["tighten_grad_norm", "checkpoint_now", "checkpoint_more_often"], [], []]
    assert controls.settings["grad_norm_limit"] == 0.5
    later = feed(dog, controls, {**HEALTHY, "completion_length": 1.0}, range(5, 40))
    taken = [v.step for v in later if "checkpoint_now" in names(v)]
    assert [b - a for a, b in itertools.pairwise(taken)] == [10] * (len(taken) - 1)


def test_a_checkpoint_after_which_trouble_came_back_is_not_trusted_again(tmp_path: Path) -> None:
    dog, controls = started(tmp_path, rollback_budget=9, recur_within=30)
    feed(dog, controls, HEALTHY, range(33))
    backs = [v.rolled_back_to for v in feed(dog, controls, SICK, range(33, 35))]
    assert backs == [20, 10]
    feed(dog, controls, HEALTHY, range(35, 37))  # too few for anything new to be proven
    assert feed(dog, controls, SICK, range(37, 38))[0].rolled_back_to == 0
    assert [p.name for p in (tmp_path / "run/checkpoints").glob("ckpt-*")] == ["ckpt-000001-step-0"]


def test_a_refused_attach_leaves_nothing_on_the_optimizer(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/journal.jsonl").write_text("something\n")
    before = copy.copy(optimizer.__dict__["_optimizer_step_pre_hooks"])
    for options in ({"run_dir": tmp_path / "run"}, {"dims": -1}, {"nonsense": 1}):
        with pytest.raises(gw.ConfigurationError):
            gw.attach(model=model, optimizer=optimizer, **options)
    assert optimizer.__dict__["_optimizer_step_pre_hooks"] == before


def test_causes_are_judged_by_the_settings_before_our_own_doses(tmp_path: Path) -> None:
    dog, controls = started(tmp_path)
    feed(dog, controls, FIRST_BAND, range(1))
    verdict = feed(dog, controls, {**HEALTHY, "log_ratio": 12.0}, range(1, 2))[0]
    cause = verdict.incidents[0].causes[0]
    assert cause.cause == "learning_rate_too_high"
    assert cause.supported == ("learning_rate 1e-05 > 1e-06",)


def test_a_second_trouble_in_the_middle_of_a_first_is_an_incident_of_its_own() -> None:
    dog = gw.Watchdog("documented")
    row = {"log_ratio": 12.0, "kl_penalty": 12.0, "loss": 30.0}
    for step in range(3):
        dog.observe(step, row)
    verdict = dog.observe(3, {**row, "loss": math.nan})
    assert [(i.id, i.rule, i.severity, i.since) for i in verdict.incidents] == [
        (2, "nonfinite", "critical", 3),
        (1, "log_ratio", "warning", 0),
    ]


def test_a_standing_warning_without_a_dose_holds_up_neither_checkpoints_nor_recovery(tmp_path: Path) -> None:
    dog, controls = started(tmp_path, recover_after=20)
    row = {**HEALTHY, "mean_reward": 1.5}  # outside the document's range for the whole run
    feed(dog, controls, row, range(33))
    verdict = feed(dog, controls, {**row, "log_ratio": 25.0}, range(33, 34))[0]
    assert verdict.rolled_back_to == 20
    feed(dog, controls, row, range(34, 60))
    assert controls.settings["learning_rate"] == 1e-5


def test_trouble_after_newer_checkpoints_were_proven_goes_to_the_newest_of_them(tmp_path: Path) -> None:
    dog, controls = started(tmp_path, keep=1, recur_within=1000)
    feed(dog, controls, HEALTHY, range(33))
    assert feed(dog, controls, SICK, range(33, 34))[0].rolled_back_to == 20
    feed(dog, controls, HEALTHY, range(34, 70))
    verdict = feed(dog, controls, SICK, range(70, 71))[0]
    assert not verdict.halt
    assert verdict.rolled_back_to is not None
    assert verdict.rolled_back_to > 33


def test_warnings_and_notices_are_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "grpo_watchdog")
    dog, controls = started(tmp_path)
    row = {**HEALTHY, "mean_reward": 1.5, "mean_advantage": 0.0}
    verdicts = feed(dog, controls, row, range(10))
    assert caplog.text.count("step 0: warning: Mean reward outside 0 to 1: mean_reward 1.5 (limit 1)") == 1
    assert caplog.text.count("Mean advantage is 0: arithmetic") == 1
    assert [len(v.notices) for v in verdicts] == [1] + [0] * 9


def test_resuming_where_no_checkpoint_is_whole_is_refused_and_where_none_was_proven_is_said(tmp_path: Path) -> None:
    dog, controls = started(tmp_path)
    feed(dog, controls, HEALTHY, range(3))
    dog.close()
    again, _ = started(tmp_path, resume=True)
    assert again.resumed_from is None
    assert any("nothing is restored" in line for line in again.briefing)
    feed(again, controls, HEALTHY, range(3, 40))
    again.close()
    for path in (tmp_path / "run/checkpoints").glob("*/weights.json"):
        path.write_text("7")
    with pytest.raises(gw.DamagedError, match="no proven checkpoint is whole"):
        started(tmp_path, resume=True)


def test_a_resumed_run_takes_checkpoints_as_asked_now_and_drops_doses_of_knobs_that_are_gone(tmp_path: Path) -> None:
    dog, controls = started(tmp_path, checkpoint_every=0)
    feed(dog, controls, FIRST_BAND, range(2))
    dog.close()
    again, fresh = started(tmp_path, FakeControls(without=("kl_coef",)), resume=True, recover_after=5)
    assert any("there is no kl_coef knob any more" in line for line in again.briefing)
    actions = [name for v in feed(again, fresh, HEALTHY, range(2, 40)) for name in names(v)]
    assert actions.count("checkpoint_now") == 4
    assert actions.count("restore_learning_rate") == 1
    assert "restore_kl_coef" not in actions


@pytest.mark.parametrize("step", [np.int64(5), torch.tensor(5), 5.0, "five", None])
def test_a_checkpoint_that_the_loop_asks_for_never_raises(tmp_path: Path, step: Any) -> None:  # noqa: ANN401
    dog, controls = started(tmp_path, checkpoint_every=0)
    outcome = dog.checkpoint(step)
    assert outcome.ok == (step not in ("five", None))
    feed(dog, controls, HEALTHY, range(6, 20))
    dog.close()
    assert started(tmp_path, resume=True)[0].resumed_from == (5 if outcome.ok else None)


def test_a_knob_that_takes_only_in_part_is_held_once_and_let_go(tmp_path: Path) -> None:
    trainer, controls = SimpleNamespace(beta=0.1), FakeControls(without=("kl_coef",))

    def write(value: float) -> None:
        trainer.beta = min(value, 0.3)

    controls.knobs["kl_coef"] = DialKnob(dial((lambda: trainer.beta, write), "kl_coef"), "max")
    dog, _ = started(tmp_path, controls, recover_after=10)
    verdicts = feed(dog, controls, FIRST_BAND, range(5)) + feed(dog, controls, HEALTHY, range(5, 40))
    told = [o for v in verdicts for o in v.actions if o.action == "raise_kl_coef"]
    assert [o.ok for o in told] == [False]
    assert "reads 0.3 after it was held at 0.5" in told[0].detail
    assert trainer.beta == 0.1


def test_a_checkpoint_holds_the_users_settings_and_never_our_doses(tmp_path: Path) -> None:
    class WithSettings(FakeControls):
        def save(self, folder: Path) -> None:
            (folder / "settings.json").write_text(json.dumps(self.settings))

        def restore(self, folder: Path, *, replay_data: bool = True) -> None:  # noqa: ARG002
            self.settings.update(json.loads((folder / "settings.json").read_text()))

    dog, controls = started(tmp_path, WithSettings(), recover_after=60)
    feed(dog, controls, FIRST_BAND, range(1))
    feed(dog, controls, HEALTHY, range(1, 40))
    assert controls.settings["kl_coef"] == 0.5
    feed(dog, controls, SICK, range(40, 41))
    assert controls.settings == {"learning_rate": 1e-7, "kl_coef": 2.0, "clip_epsilon": 0.2}
    feed(dog, controls, HEALTHY, range(41, 110))
    assert controls.settings == {"learning_rate": 1e-5, "kl_coef": 0.1, "clip_epsilon": 0.2}


def test_loading_a_state_puts_its_doses_in_force(tmp_path: Path) -> None:
    first, controls = started(tmp_path)
    feed(first, controls, FIRST_BAND, range(2))
    fresh = FakeControls()
    second = gw.Watchdog("documented", fresh, tmp_path / "second")
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert fresh.settings == {"learning_rate": 1e-6, "kl_coef": 0.5, "clip_epsilon": 0.2}
    feed(second, fresh, FIRST_BAND, range(2, 30))
    second.close()
    assert not gw.replay(tmp_path / "second").differences


def test_nothing_is_scaled_from_zero(tmp_path: Path) -> None:
    dog, controls = started(tmp_path, FakeControls(learning_rate=0.0), targets="scaled")
    assert any("learning_rate is 0 at attach" in line for line in dog.briefing)
    controls.settings["learning_rate"] = 1e-4  # the warm-up goes on
    feed(dog, controls, FIRST_BAND, range(1))
    assert controls.settings["learning_rate"] == 1e-6


def test_candidates_do_not_fill_the_disk(tmp_path: Path) -> None:
    dog, controls = started(tmp_path, checkpoint_every=1, probation=50, keep=2)
    feed(dog, controls, HEALTHY, range(200))
    assert len(list((tmp_path / "run/checkpoints").glob("ckpt-*"))) <= 5


def test_an_interrupted_action_is_written_down_and_the_run_still_replays(tmp_path: Path) -> None:
    class Interrupted(FakeControls):
        def save(self, folder: Path) -> None:
            if self.weights == 10.0:
                raise KeyboardInterrupt
            super().save(folder)

    dog, controls = started(tmp_path, Interrupted())
    feed(dog, controls, HEALTHY, range(10))
    with pytest.raises(KeyboardInterrupt):
        feed(dog, controls, HEALTHY, range(10, 11))
    feed(dog, controls, HEALTHY, range(11, 40))
    dog.close()
    assert not gw.replay(tmp_path / "run").differences
    assert [a["detail"] for a in gw.read_run(tmp_path / "run").actions if not a["ok"]] == [
        "interrupted: KeyboardInterrupt"
    ]


def test_a_run_killed_before_its_first_entry_does_not_lock_its_folder(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/journal.jsonl").write_text('{"kind":"sta')
    with started(tmp_path)[0] as dog:
        dog.observe(0, HEALTHY)
    assert gw.read_run(tmp_path / "run").rows == 1
