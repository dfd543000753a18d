"""The toy trainer is a real trl.GRPOTrainer that learns; its faults are real ones."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("trl")
pytest.importorskip("peft")

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl.trainer.grpo_trainer import GRPOTrainer

from grpo_watchdog.lab.trl_toy import (
    LETTERS,
    GradientFault,
    LearningRateFault,
    WeightFault,
    repeat_reward,
    reward_of,
    toy_trainer,
)

NOTHING: Any = SimpleNamespace()
LETTER_ROWS = st.lists(st.sampled_from(LETTERS), min_size=1, max_size=8)


def named(trainer: GRPOTrainer) -> dict[str, torch.Tensor]:
    assert trainer.model is not None
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


def weights(trainer: GRPOTrainer) -> list[torch.Tensor]:
    return list(named(trainer).values())


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def logged(trainer: GRPOTrainer, name: str) -> dict[int, float]:
    return {int(row["step"]): row[name] for row in trainer.state.log_history if name in row}


class Weights(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Keeps the weights as they are at the beginning of each step."""

    def __init__(self) -> None:
        self.seen: list[list[torch.Tensor]] = []

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        del args, state, control
        self.seen.append([weight.detach().clone() for weight in kwargs["model"].parameters()])


# --- the trainer --------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True])
def test_it_learns_in_silence(tmp_path: Path, capfd: pytest.CaptureFixture[str], *, lora: bool) -> None:
    trainer = toy_trainer(tmp_path, max_steps=60, lora=lora)
    trainer.train()
    rewards = reward_of(trainer)
    assert len(rewards) == 30  # a batch of samples serves two updates
    assert sum(rewards[:3]) / 3 < 0.25
    assert sum(rewards[-3:]) / 3 > 0.6
    assert capfd.readouterr() == ("", "")
    assert [p.exists() for p in (tmp_path / "base", tmp_path / "checkpoint-60")] == [True, False]


def test_two_of_one_seed_come_to_the_same_weights_and_one_of_another_to_others(tmp_path: Path) -> None:
    one, other = (toy_trainer(tmp_path / name, seed=3, max_steps=6) for name in "ab")
    third = toy_trainer(tmp_path / "c", seed=4, max_steps=6)
    assert same(weights(one), weights(other))
    for trainer in (one, third, other):  # what runs between them changes nothing
        trainer.train()
    assert same(weights(one), weights(other))
    assert reward_of(one) == reward_of(other)
    assert reward_of(one) != reward_of(third)


def test_only_adapters_are_trained_with_lora(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, max_steps=4, lora=True)
    before = named(trainer)
    trainer.train()
    moved = [name for name, weight in named(trainer).items() if not torch.equal(weight, before[name])]
    assert moved
    assert all("lora" in name for name in moved)


def test_settings_and_the_class_are_the_callers(tmp_path: Path) -> None:
    class Mine(GRPOTrainer):  # type: ignore[misc, unused-ignore]
        pass

    trainer = toy_trainer(
        tmp_path, max_steps=4, trainer_class=Mine, num_iterations=1, steps_per_generation=2, learning_rate=1e-2
    )
    trainer.train()
    assert type(trainer) is Mine
    args: Any = trainer.args
    assert (args.beta, args.steps_per_generation, args.learning_rate) == (0.04, 2, 1e-2)
    assert len(reward_of(trainer)) == 2


def test_rewards_that_are_no_number_are_nan() -> None:
    rows = [{"reward": 0.5}, {"loss": 1.0}, {"reward": None}, {"reward": math.nan}]
    rewards = reward_of(SimpleNamespace(state=SimpleNamespace(log_history=rows)))  # type: ignore[arg-type]
    assert rewards[0] == 0.5
    assert [math.isnan(reward) for reward in rewards] == [False, True, True]


@given(asked=LETTER_ROWS, given_=st.lists(st.sampled_from(LETTERS), max_size=8))
def test_the_reward_is_1_for_the_right_answer_alone(asked: list[str], given_: list[str]) -> None:
    right, answer = repeat_reward([" ".join([*asked, "="])] * 2, [" ".join(asked), " ".join(given_)])
    assert right == 1.0
    assert answer is not None
    assert 0.0 <= answer <= 1.0
    assert (answer == 1.0) == (asked == given_)


# --- the faults ---------------------------------------------------------------------------------


def test_a_faulty_rate_is_the_schedules_times_the_factor_to_the_end(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"lr_scheduler_type": "linear", "warmup_steps": 0, "learning_rate": 1e-3}
    trainer = toy_trainer(tmp_path, max_steps=10, callbacks=[LearningRateFault(4, 10.0)], **settings)
    trainer.train()
    seen = list(logged(trainer, "learning_rate").values())
    assert seen == pytest.approx([1e-3 * (1 - n / 10) * (10.0 if n >= 4 else 1.0) for n in range(10)])


@given(back=st.integers(0, 5), doubled=st.booleans(), inside=st.booleans())
def test_a_rollback_neither_cures_a_faulty_rate_nor_multiplies_it_twice(
    back: int, *, doubled: bool, inside: bool
) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    fault = LearningRateFault(3, 100.0)
    states: list[tuple[dict[str, Any], dict[str, Any]]] = []
    used: list[float] = []

    def one(step: int) -> None:
        if not inside:
            states.append(saved())
        for _ in range(1 + doubled):
            fault.on_step_begin(NOTHING, TrainerState(global_step=step), NOTHING, lr_scheduler=schedule)
        if inside:  # a checkpoint that is taken while the faulty rate is in the optimizer
            states.append(saved())
        used.append(optimizer.param_groups[0]["lr"] * (1 + schedule.last_epoch))
        optimizer.step()
        schedule.step()

    def saved() -> tuple[dict[str, Any], dict[str, Any]]:
        return json.loads(json.dumps(optimizer.state_dict())), json.loads(json.dumps(schedule.state_dict()))

    for step in range(6):
        one(step)
    optimizer.load_state_dict(states[back][0])
    schedule.load_state_dict(states[back][1])
    for step in range(6, 10):  # the trainer's count goes on
        one(step)
    assert used == pytest.approx([1.0] * 3 + [100.0] * 7)


def test_one_nan_gradient_makes_one_weight_nan_and_then_the_model(tmp_path: Path) -> None:
    kept = Weights()
    trainer = toy_trainer(tmp_path, max_steps=8, callbacks=[kept, GradientFault(2)])
    with pytest.raises(RuntimeError, match="probability tensor contains"):  # the sampler's own words
        trainer.train()
    bad = [sum(int(weight.isnan().sum()) for weight in row) for row in kept.seen]
    assert bad[:4] == [0, 0, 0, 1]
    assert bad[4] > 1000
    assert len(bad) == 5  # the sampler finds out at the next batch of samples


def test_noise_comes_once_and_only_onto_what_is_trained(tmp_path: Path) -> None:
    before, after = Weights(), Weights()
    fault = WeightFault(2, scale=1.0)
    trainer = toy_trainer(tmp_path, max_steps=4, lora=True, callbacks=[before, fault, after])
    trainer.train()
    assert [same(a, b) for a, b in zip(before.seen, after.seen, strict=True)] == [True, True, False, True]
    names = list(named(trainer))
    changed = [name for name, a, b in zip(names, before.seen[2], after.seen[2], strict=True) if not torch.equal(a, b)]
    assert changed == [name for name in names if "lora" in name]


@pytest.mark.parametrize("kind", [GradientFault, WeightFault])
def test_what_has_happened_does_not_happen_again(kind: type[GradientFault | WeightFault]) -> None:
    fault, later = kind(3), kind(3)
    happened = [fault.due(TrainerState(global_step=step)) for step in (2, 3, 4, 3)]
    assert happened == [False, True, False, False]
    assert later.state_dict() != fault.state_dict()
    later.load_state_dict(json.loads(json.dumps(fault.state_dict())))
    assert not later.due(TrainerState(global_step=5))
    assert later.state_dict() == fault.state_dict()


def test_a_rate_switched_up_ruins_the_run(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, max_steps=70, callbacks=[LearningRateFault(40)])
    trainer.train()
    rewards = reward_of(trainer)
    assert sum(rewards[17:20]) / 3 > 0.6
    assert sum(rewards[-5:]) / 5 < 0.25
