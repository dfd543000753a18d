"""Rollback: everything or nothing, bit by bit the same as a run resumed by hand."""

import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import grpo_watchdog as gw
from fake_training import HEALTHY, Training, attaching, copied, differences

SICK = {"log_ratio": 25.0}  # documented: roll back, learning rate 1e-7, KL coefficient 2.0
BAND_2 = {"log_ratio": 12.0}  # documented: learning rate 5e-7, KL coefficient 1.0, clip 0.1


Attach = Callable[..., gw.Watchdog]


@pytest.fixture
def attach() -> Iterator[Attach]:
    yield from attaching()


def parts(training: Training, **handed: Any) -> dict[str, Any]:
    """Return what a loop hands over; with names, only these besides the model, the optimizer and the scheduler."""
    return {
        "model": training.model, "optimizer": training.optimizer, "scheduler": training.scheduler,
        "scaler": training.scaler, "state": handed or training.handed_over(),
    }  # fmt: skip


def knobs(training: Training) -> dict[str, Any]:
    return {"kl_coef": gw.attr(training.config, "beta"), "clip_epsilon": gw.attr(training.config, "epsilon")}


def spoil(training: Training) -> None:
    """Do to a training what a divergence does."""
    with torch.no_grad():
        for parameter in training.model.parameters():
            parameter.mul_(50).add_(torch.randn_like(parameter))
            parameter.grad = torch.full_like(parameter, float("nan"))


@pytest.mark.parametrize("damage", [False, True])
@pytest.mark.parametrize(("scaled", "accumulate"), [(False, 1), (True, 1), (False, 3), (True, 3)])
def test_after_a_rollback_the_run_is_the_one_resumed_by_hand(
    tmp_path: Path, attach: Attach, *, scaled: bool, accumulate: int, damage: bool
) -> None:
    """The second step to 12 is in no checkpoint: its clip and KL doses must still be in force after the restore."""
    training = Training(1, scaled=scaled, accumulate=accumulate)
    policy = {"checkpoint_every": 5, "probation": 4, "recover_after": 1000, "keep": 100}
    dog = attach(**parts(training), **knobs(training), run_dir=tmp_path, **policy)
    for step in range(23):
        training.step()
        assert dog.observe(step, BAND_2 if step == 17 else HEALTHY).rolled_back_to is None
    if damage:
        spoil(training)
    training.step()
    verdict = dog.observe(23, SICK)
    assert verdict.rolled_back_to == 10
    assert not verdict.halt
    gradients = [p.grad for p in training.model.parameters()]
    assert all(g is None or bool(g.isfinite().all()) for g in gradients)
    assert (training.config.beta, training.config.epsilon) == (2.0, 0.1)
    assert [o.after for o in verdict.actions if o.action == "lower_learning_rate"] == [pytest.approx(1e-7)]

    after = [training.snapshot()]
    for step in range(24, 44):
        training.step()
        after.append(training.snapshot())
        assert dog.observe(step, HEALTHY).rolled_back_to is None

    resumed = Training(2, scaled=scaled, accumulate=accumulate)
    (folder,) = tmp_path.glob("checkpoints/ckpt-*-step-10")
    resumed.resume_by_hand(folder)
    resumed.config.beta, resumed.config.epsilon, resumed.ceiling = 2.0, 0.1, 1e-7
    by_hand = [resumed.snapshot()]
    for _ in range(20):
        resumed.step()
        by_hand.append(resumed.snapshot())
    for number, (one, other) in enumerate(zip(after, by_hand, strict=True)):
        assert not differences(one, other), f"{number} steps after the rollback"
    assert differences(after[0], after[-1]), "something moved"


def test_without_doses_twenty_steps_repeat_those_of_the_healthy_run(tmp_path: Path, attach: Attach) -> None:
    """What followed the checkpoint the first time follows again, when the doses change nothing."""
    mild = tmp_path / "mild.yaml"
    mild.write_text(
        "schema: 1\nname: mild\nextends: documented\nrules:\n  log_ratio:\n"
        "    bands: [{above: 20, severity: critical, do: {rollback: true}}]\n"
    )
    training = Training(5)
    dog = attach(**parts(training), run_dir=tmp_path / "run", rules=mild, probation=4, checkpoint_every=100)
    first = []
    for step in range(25):
        training.step()
        first.append(training.snapshot())
        dog.observe(step, HEALTHY)
    assert dog.observe(25, SICK).rolled_back_to == 0
    for step in range(1, 21):
        training.step()
        assert not differences(training.snapshot(), first[step])
        dog.observe(step, HEALTHY)


def test_the_gradients_of_the_sick_model_are_gone(tmp_path: Path, attach: Attach) -> None:
    training = Training(1)
    head = torch.nn.Parameter(torch.ones(2))  # trained, but no part of the model
    training.optimizer.add_param_group({"params": [head]})
    dog = attach(model=training.model, optimizer=training.optimizer, run_dir=tmp_path, probation=1)
    for step in range(3):
        dog.checkpoint(step)
        dog.observe(step, HEALTHY)
    spoil(training)
    head.grad = torch.full_like(head, float("inf"))
    assert dog.observe(3, SICK).rolled_back_to is not None
    assert all(p.grad is None for p in (*training.model.parameters(), head))


class Stubborn:
    """Refuses its state: at once, or after it took half of it, or even its own of before."""

    def __init__(self, manner: str) -> None:
        self.manner, self.values, self.calls = manner, [1, 2], 0

    def state_dict(self) -> dict[str, Any]:
        return {"values": list(self.values)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.calls += 1
        if self.manner == "at once" or (self.manner == "halfway" and self.calls == 1):
            if self.manner == "halfway":
                self.values[0] = state["values"][0]
            raise RuntimeError("I would rather not")
        self.values = list(state["values"])


@pytest.mark.parametrize("manner", ["at once", "halfway"])
@pytest.mark.parametrize("name", ["a_first", "z_last"])
def test_an_object_that_refuses_leaves_the_others_alone(tmp_path: Path, attach: Attach, manner: str, name: str) -> None:
    training, stubborn = Training(1), Stubborn(manner)
    handed = {**({name: stubborn} if name == "a_first" else {}), **training.handed_over(), name: stubborn}
    dog = attach(**parts(training, **handed), run_dir=tmp_path, probation=2, checkpoint_every=100)
    for step in range(6):
        training.step()
        assert not dog.observe(step, HEALTHY).halt
    spoil(training)
    stubborn.values = [7, 8]
    before, gradients = training.snapshot(), [p.grad for p in training.model.parameters()]
    verdict = dog.observe(6, SICK)
    assert verdict.halt
    assert verdict.rolled_back_to is None
    assert f"{name} refused its state: RuntimeError: I would rather not" in dog.halted
    assert not differences(training.snapshot(), before)
    assert all(a is b for a, b in zip(gradients, (p.grad for p in training.model.parameters()), strict=True))
    assert stubborn.values == [7, 8], "even the one that refused is as it was"
    assert ("this is not as it was" in dog.halted) == (manner == "at once")


def healthy_run(run_dir: Path) -> None:
    training = Training(1)
    with gw.attach(**parts(training), run_dir=run_dir, probation=2, checkpoint_every=100) as dog:
        for step in range(6):
            training.step()
            dog.observe(step, HEALTHY)


def another_shape(training: Training) -> None:
    training.model[4] = torch.nn.Linear(16, 3)


def another_type(training: Training) -> None:
    training.model[4].bfloat16()


def another_layer(training: Training) -> None:
    training.model.append(torch.nn.Linear(2, 2))


def another_optimizer(training: Training) -> None:
    training.optimizer = torch.optim.AdamW(training.model.parameters())
    training.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(training.optimizer, T_max=200)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (another_shape, "4.weight is float32 of shape (2, 16) in the checkpoint and float32 of shape (3, 16) here"),
        (another_type, "4.weight is float32 of shape (2, 16) in the checkpoint and bfloat16 of shape (2, 16) here"),
        (another_layer, "5.bias, 5.weight in only one of the checkpoint and this training"),
        (another_optimizer, "optimizer refused its state: ValueError"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path, change: Any, said: str) -> None:  # noqa: ANN401
    healthy_run(tmp_path)
    training = Training(2)
    change(training)
    before = training.snapshot()
    with pytest.raises(gw.ConfigurationError) as caught:
        gw.attach(**parts(training), run_dir=tmp_path, resume=True)
    assert said in str(caught.value)
    assert not differences(training.snapshot(), before)


def test_a_state_that_is_not_handed_over_again_is_missed(tmp_path: Path) -> None:
    healthy_run(tmp_path)
    training = Training(2)
    with pytest.raises(gw.ConfigurationError, match="accumulator in only one of"):
        gw.attach(**parts(training, sampler=training.sampler), run_dir=tmp_path, resume=True)


def test_resuming_in_a_new_process_goes_on_where_the_checkpoint_was(tmp_path: Path, attach: Attach) -> None:
    healthy_run(tmp_path)
    original = Training(1)
    original.step()  # the checkpoint was taken after step 0
    expected = original.snapshot()
    for _ in range(3):
        original.step()
    later = original.snapshot()
    training = Training(9)
    dog = attach(**parts(training), run_dir=tmp_path, resume=True)
    assert dog.resumed_from == 0
    assert not differences(training.snapshot(), expected)
    for _ in range(3):
        training.step()
    assert not differences(training.snapshot(), later)


def test_every_random_number_generator_that_is_handed_over_comes_back(tmp_path: Path, attach: Attach) -> None:
    handed: dict[str, Any] = {
        "torch": torch.Generator().manual_seed(1),
        "legacy": np.random.RandomState(2),
        "python": random.Random(3),
        **{k.__name__: np.random.Generator(k(4)) for k in (np.random.PCG64, np.random.PCG64DXSM, np.random.MT19937,
                                                           np.random.Philox, np.random.SFC64)},
    }  # fmt: skip

    def draw() -> list[float]:
        return [float(torch.rand((), generator=handed["torch"])), handed["python"].gauss(0, 1)] + [
            float(g.normal()) for name, g in handed.items() if name not in {"torch", "python"}
        ]

    training = Training(1)
    dog = attach(**parts(training, **handed), run_dir=tmp_path, probation=1, checkpoint_every=9)
    draw()
    dog.observe(0, HEALTHY)
    expected = [draw(), draw()]
    dog.observe(1, HEALTHY)
    assert dog.observe(2, SICK).rolled_back_to == 0
    assert [draw(), draw()] == expected


def test_a_model_of_odd_parts_comes_back(tmp_path: Path, attach: Attach) -> None:
    """Tied weights, bfloat16, an empty parameter, a mask of -inf, state that is no tensor, versions of modules."""

    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
            self.two.weight = self.one.weight
            self.empty = torch.nn.Parameter(torch.zeros(0, 3))
            self.norm = torch.nn.BatchNorm1d(3)
            self.register_buffer("mask", torch.full((2, 2), float("-inf")).triu(1))
            self.seen = {"rows": 5}

        def get_extra_state(self) -> object:
            return dict(self.seen)

        def set_extra_state(self, state: Any) -> None:  # noqa: ANN401
            self.seen = state

    model = Odd().bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def train() -> None:
        optimizer.zero_grad()
        model.norm(model.two(model.one(torch.ones(4, 3, dtype=torch.bfloat16)))).sum().backward()
        optimizer.step()
        model.seen["rows"] += 4

    train()
    dog = attach(model=model, optimizer=optimizer, run_dir=tmp_path, probation=1, checkpoint_every=50)
    assert all(o.ok for o in dog.observe(0, HEALTHY).actions)
    kept = copied([dict(model.state_dict()), optimizer.state_dict()])
    train()
    dog.observe(1, HEALTHY)
    assert dog.observe(2, SICK).rolled_back_to == 0
    assert not differences([dict(model.state_dict()), optimizer.state_dict()], kept)
    assert model.one.weight is model.two.weight
    (folder,) = tmp_path.glob("checkpoints/ckpt-*")
    loaded = torch.load(folder / "model.pt", weights_only=True)
    assert vars(loaded)["_metadata"]["norm"] == {"version": 2}
