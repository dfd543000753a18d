from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

import transformers
import trl

import grpo_watchdog as gw
from grpo_watchdog.drill import DrillReport
from grpo_watchdog.lab.trl_toy import toy_trainer

KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora": True},
    "lora, no reference": {"lora": True, "beta": 0.0, "num_iterations": 1},
    "full, no reference": {"beta": 0.0},
    "no clip": {"loss_type": "cispo", "epsilon_high": 5.0},
    "sequences": {"importance_sampling_level": "sequence", "steps_per_generation": 4},
}
UNPROVEN = {"full, no reference": {"kl_coef"}, "no clip": {"clip_epsilon"}}


class Drilling(transformers.TrainerCallback):
    """Drills in the middle of the training."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.dog: gw.Watchdog | None = None
        self.report: DrillReport | None = None

    def on_step_end(self, args: object, state: Any, control: object, **_: object) -> None:  # noqa: ANN401, ARG002
        if state.global_step == self.step:
            assert self.dog is not None
            self.report = self.dog.drill()


@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_trainer_passes(tmp_path: Path, kind: str) -> None:
    dog = gw.attach(toy_trainer(tmp_path, max_steps=20, **KINDS[kind]), rules="guarded")
    report = dog.drill()
    assert report.passed, str(report)
    assert {p.what for p in report.proofs if p.result == "unproven"} == UNPROVEN.get(kind, set())
    assert len(report.proofs) == 9
    assert not list(tmp_path.glob("checkpoint-*"))


def everything_of(folder: Path, when: str, **settings: Any) -> list[Any]:
    mid = Drilling(7)
    trainer: Any = toy_trainer(folder, max_steps=12, callbacks=[mid] if when == "mid" else [], **settings)
    dog = gw.attach(trainer, rules="guarded", checkpoint_every=5)
    mid.dog = dog
    attributes = set(vars(trainer))
    if when == "before":
        assert dog.drill().passed
        assert set(vars(trainer)) == attributes
    trainer.train()
    assert mid.report is None or mid.report.passed, str(mid.report)
    inner = trainer.optimizer.optimizer
    logs = [
        {k: v for k, v in row.items() if "time" not in k and "second" not in k} for row in trainer.state.log_history
    ]
    return [
        [p.tolist() for p in trainer.model.parameters() if p.requires_grad],
        [torch.as_tensor(v).tolist() for state in inner.state.values() for v in state.values()],
        torch.get_rng_state().tolist(),
        logs,
        trainer.state.num_input_tokens_seen,
        sorted(path.name for path in folder.iterdir()),
    ]


@pytest.mark.parametrize("kind", ["full", "lora, no reference", "sequences"])
def test_a_drill_leaves_no_trace(tmp_path: Path, kind: str) -> None:
    never, before, mid = (everything_of(tmp_path / when, when, **KINDS[kind]) for when in ("never", "before", "mid"))
    for undrilled, first, middle in zip(never, before, mid, strict=True):
        assert undrilled == first
        assert undrilled == middle


class DeafTrainer(trl.GRPOTrainer):  # type: ignore[misc, name-defined]
    """Takes its coefficient from the arguments: what is written on the trainer later, nobody reads."""

    beta: float

    def _compute_loss(self, model: Any, inputs: Any) -> Any:  # noqa: ANN401
        held, self.beta = self.beta, self.args.beta
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self.beta = held


def test_a_coefficient_nobody_reads_fails(tmp_path: Path) -> None:
    dog = gw.attach(toy_trainer(tmp_path, trainer_class=DeafTrainer), rules="guarded")
    assert [p.what for p in dog.drill().proofs if p.result == "fail"] == ["kl_coef"]


def test_a_hook_that_rewrites_the_rate_fails(tmp_path: Path) -> None:
    trainer: Any = toy_trainer(tmp_path)
    dog = gw.attach(trainer, rules="guarded")

    def rewrite(optimizer: torch.optim.Optimizer, *_: object) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 1e-2

    trainer.optimizer.register_step_pre_hook(rewrite)
    report = dog.drill()
    assert not report.passed
    assert "learning_rate" in [p.what for p in report.proofs if p.result == "fail"]


def test_rewards_that_cannot_be_had_leave_the_rest_proven(tmp_path: Path) -> None:
    def broken(**_: object) -> list[float]:
        raise ConnectionError("the reward service is away")

    trainer: Any = toy_trainer(tmp_path)
    dog = gw.attach(trainer, rules="guarded")
    trainer.reward_funcs[0] = broken
    report = dog.drill()
    assert report.passed
    told = {p.what: p.detail for p in report.proofs if p.result == "unproven"}
    assert set(told) == {"kl_coef", "clip_epsilon"}
    assert "the reward service is away" in told["kl_coef"]
