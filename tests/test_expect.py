"""What the user announces is not taken for trouble: levels are forgotten, limits let go, weights taken as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import grpo_watchdog as gw
from fakes import FakeControls
from grpo_watchdog.lab.training import TASKS

STEADY = {"mean_reward": 0.5, "std_reward": 0.2, "step_kl": 1e-3}


def acted(verdict: gw.Verdict) -> set[str]:
    return {outcome.action for outcome in verdict.actions if outcome.action != "checkpoint_now"}


@pytest.mark.parametrize("told", [False, True])
def test_a_learning_rate_that_is_raised_on_purpose(told: bool, tmp_path: Path) -> None:  # noqa: FBT001
    torch.set_num_threads(1)
    training = TASKS["tokens"](1)
    seen = set[str]()
    with training.attach(tmp_path, rules="guarded", checkpoint_every=5, probation=5) as dog:
        for step in range(50):
            if step == 40:
                training.make_sick(20.0)
                if told:
                    dog.expect("learning_rate")
            seen |= acted(dog.observe(step, training.train_one_step()))
    assert ("rollback" in seen) != told
    assert gw.replay(tmp_path).differences == ()


@pytest.mark.parametrize("told", [False, True])
def test_weights_that_are_written_on_purpose(told: bool, tmp_path: Path) -> None:  # noqa: FBT001
    torch.set_num_threads(1)
    training = TASKS["tokens"](1)
    seen = set[str]()
    with training.attach(tmp_path, rules="guarded", checkpoint_every=5, probation=5) as dog:
        for step in range(40):
            if step == 30:
                for parameter in (*training.policy.parameters(), *training.reference.parameters()):
                    parameter.data.mul_(1.15)
                if told:
                    dog.expect("weights_touched", "reference_touched")
            verdict = dog.observe(step, training.train_one_step())
            seen |= {finding.rule for finding in verdict.findings}
    assert ({"weights_touched", "reference_touched"} <= seen) != told
    assert gw.replay(tmp_path).differences == ()


def test_a_limit_on_what_changes_on_purpose_is_let_go(tmp_path: Path) -> None:
    controls = FakeControls()
    with gw.Watchdog("documented", controls, tmp_path) as dog:
        dog.observe(0, {"log_ratio": 6.0})
        assert controls.settings["learning_rate"] == 1e-6
        assert controls.settings["kl_coef"] == 0.5
        dog.expect("learning_rate")
        assert controls.settings["learning_rate"] == 1e-5
        assert controls.settings["kl_coef"] == 0.5
    assert gw.replay(tmp_path).differences == ()
    assert gw.read_run(tmp_path).doses == {"raise_kl_coef": 0.5}


def test_an_unknown_name_is_refused_with_what_is_allowed() -> None:
    with gw.Watchdog("documented") as dog, pytest.raises(gw.ConfigurationError, match="did you mean mean_reward"):
        dog.expect("mean_rewards")


def test_a_witness_that_comes_long_after_is_of_something_else(tmp_path: Path) -> None:
    """A reference that was moved long ago and one gradient spike now are two things, and no reason to roll back."""
    controls = FakeControls()
    with gw.Watchdog("guarded", controls, tmp_path, checkpoint_every=10, probation=5) as dog:
        for step in range(120):
            controls.taken = {"reference_touched": 0.1 if step >= 40 else 0.0}
            spike = 100.0 if step == 90 else 1.0 + 0.01 * (step % 7)
            verdict = dog.observe(step, {**STEADY, "grad_norm": spike})
            assert acted(verdict) == set()


def test_a_witness_that_comes_with_it_counts(tmp_path: Path) -> None:
    controls = FakeControls()
    with gw.Watchdog("guarded", controls, tmp_path, checkpoint_every=10, probation=5) as dog:
        seen = set[str]()
        for step in range(60):
            controls.taken = {"reference_touched": 0.1 if step >= 40 else 0.0}
            spike = 100.0 if step == 42 else 1.0 + 0.01 * (step % 7)
            seen |= acted(dog.observe(step, {**STEADY, "grad_norm": spike}))
    assert "rollback" in seen
