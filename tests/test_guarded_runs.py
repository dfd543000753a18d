"""The guarded rulebook on a real training, where a review found that it could go wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import grpo_watchdog as gw
from fakes import FakeControls
from grpo_watchdog.cli import main
from grpo_watchdog.lab.training import TASKS

OFTEN: dict[str, Any] = {"rules": "guarded", "checkpoint_every": 5, "probation": 5}


def poison(training: Any) -> None:  # noqa: ANN401
    def spoil(gradients: list[torch.Tensor]) -> list[torch.Tensor]:
        for gradient in gradients:
            gradient.fill_(torch.nan)
        return gradients

    training.interference["clipped_gradient"] = spoil


def test_a_gradient_that_stays_nan_does_not_freeze_the_run_for_ever(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    training = TASKS["tokens"](2)
    with training.attach(tmp_path, **OFTEN) as dog:
        for step in range(120):
            if step == 30:
                poison(training)
            verdict = dog.observe(step, training.train_one_step())
            if verdict.halt:
                break
        assert verdict.halt
        assert verdict.step < 100
        assert all(bool(p.isfinite().all()) for p in training.policy.parameters())
    assert gw.replay(tmp_path).differences == ()


def test_one_nan_gradient_is_skipped_and_nothing_else_is_done(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    training = TASKS["tokens"](2)
    done = list[str]()
    with training.attach(tmp_path, **OFTEN) as dog:
        for step in range(60):
            if step == 30:
                poison(training)
            verdict = dog.observe(step, training.train_one_step())
            training.interference.clear()
            done += [o.action for o in verdict.actions if o.action != "checkpoint_now"]
    assert done == ["veto"]


def test_after_a_no_nothing_is_proven_while_the_trouble_lasts(tmp_path: Path) -> None:
    controls = FakeControls()
    steady = {"mean_reward": 0.5, "std_reward": 0.2}
    with gw.Watchdog(
        "guarded", controls, tmp_path, mode="approve", approve=lambda _: False, checkpoint_every=5, probation=5
    ) as dog:
        for step in range(100):
            controls.taken = {"weights_touched": 0.5 if step >= 40 else 0.0}
            dog.observe(step, steady)
    proven = gw.read_run(tmp_path).proven
    assert proven
    assert max(proven) < 40


def test_the_mode_of_the_call_goes_over_that_of_the_rulebook(tmp_path: Path) -> None:
    book = tmp_path / "mine.yaml"
    book.write_text("schema: 1\nname: mine\nextends: guarded\npolicy: {mode: shadow}\nrules: {}\n")
    policy = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    for given, wanted in ((None, "shadow"), ("act", "act")):
        with gw.attach(model=policy, optimizer=optimizer, rules=book, mode=given) as dog:
            assert dog.book.policy.mode == wanted


def test_without_a_run_dir_guarded_says_that_nothing_can_be_restored() -> None:
    with gw.Watchdog("guarded", FakeControls()) as dog:
        assert any("nothing to restore from" in line for line in dog.briefing)


def test_a_report_tells_what_was_asked_and_answered(tmp_path: Path) -> None:
    with gw.Watchdog("documented", FakeControls(), tmp_path, mode="approve", approve=lambda _: False) as dog:
        dog.observe(0, {"log_ratio": 6.0})
    told = gw.report(tmp_path)
    assert "question 1: lower_learning_rate 1e-06, raise_kl_coef 0.5?" in told
    assert "question 1: no (answered)" in told


def test_a_state_that_is_not_paused_lets_a_paused_trainer_go(tmp_path: Path) -> None:
    controls = FakeControls()
    usual = {"zero_std_fraction": 0.1, "std_reward": 0.2, "mean_reward": 0.5}
    with gw.Watchdog("guarded", controls, tmp_path) as dog:
        before = dog.state_dict()
        for step in range(40):
            dog.observe(
                step, usual if step < 30 else {**usual, "zero_std_fraction": 1.0, "std_reward": 0.0, "mean_reward": 0.0}
            )
        assert controls.paused
        dog.load_state_dict(before)
        assert not controls.paused


@pytest.mark.parametrize(("given", "said"), [
    ({"rules": "guarded", "ladder": []}, "asks to escalate, and policy.ladder has no rung"),
    ({"mode": "approve"}, "nobody to ask"),
    ({"mode": "approve", "approve": "yes"}, "approve is 'yes'; allowed: a function"),
])  # fmt: skip
def test_what_cannot_work_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(gw.ConfigurationError, match=said):
        gw.Watchdog(**given)


def test_an_answer_to_what_is_no_run_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["approve", str(tmp_path), "yes"]) == 1
    assert "holds no run" in capsys.readouterr().err
