"""The learning-rate ceiling: it holds under every scheduler, leaves no trace in it, and lifts cleanly."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as lrs

import grpo_watchdog as gw
from fake_training import HEALTHY, copied, differences

BAND_1 = {"log_ratio": 6.0}  # documented: learning rate to 1e-6
CEILING = 1e-6
BASES = (1e-3, 1e-4)

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "none": lambda _: None,
    "LambdaLR": lambda o: lrs.LambdaLR(o, lambda step: 1 / (1 + 0.1 * step)),
    "LambdaLR per group": lambda o: lrs.LambdaLR(o, [lambda step: 0.99**step, lambda step: 0.9**step]),
    "MultiplicativeLR": lambda o: lrs.MultiplicativeLR(o, lambda _: 0.97),
    "StepLR": lambda o: lrs.StepLR(o, 7),
    "MultiStepLR": lambda o: lrs.MultiStepLR(o, [5, 12, 12, 25]),
    "ConstantLR": lambda o: lrs.ConstantLR(o, 0.5, 15),
    "LinearLR": lambda o: lrs.LinearLR(o, 0.01, total_iters=30),
    "ExponentialLR": lambda o: lrs.ExponentialLR(o, 0.95),
    "PolynomialLR": lambda o: lrs.PolynomialLR(o, 50, power=2.0),
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, 40),
    "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 6, 2),
    "CyclicLR": lambda o: lrs.CyclicLR(o, list(BASES), [5e-3, 5e-4], step_size_up=6, cycle_momentum=False),
    "CyclicLR with momentum": lambda o: lrs.CyclicLR(o, list(BASES), [5e-3, 5e-4], step_size_up=6, cycle_momentum=True),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, list(BASES), total_steps=60, cycle_momentum=False),
    "OneCycleLR with momentum": lambda o: lrs.OneCycleLR(o, list(BASES), total_steps=60),
    "ReduceLROnPlateau": lambda o: lrs.ReduceLROnPlateau(o, patience=2),
    "SequentialLR": lambda o: lrs.SequentialLR(
        o, [lrs.LinearLR(o, 0.1, total_iters=12), lrs.CosineAnnealingLR(o, 40)], milestones=[12]
    ),
    "ChainedScheduler": lambda o: lrs.ChainedScheduler([lrs.ConstantLR(o, 0.1, 14), lrs.ExponentialLR(o, 0.95)]),
}
Make = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda groups: torch.optim.SGD(groups, lr=BASES[0]),
    "SGD momentum": lambda groups: torch.optim.SGD(groups, lr=BASES[0], momentum=0.9, nesterov=True, weight_decay=0.01),
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=BASES[0], foreach=False),
    "AdamW foreach": lambda groups: torch.optim.AdamW(groups, lr=BASES[0], foreach=True),
    "AdamW fused": lambda groups: torch.optim.AdamW(groups, lr=BASES[0], fused=True),
    "AdamW tensor lr": lambda groups: torch.optim.AdamW(tensors(groups), lr=torch.tensor(BASES[0]), foreach=False),
    "AdamW tensor lr fused": lambda groups: torch.optim.AdamW(tensors(groups), lr=torch.tensor(BASES[0]), fused=True),
    "Adafactor": lambda groups: torch.optim.Adafactor(groups, lr=BASES[0]),
}
ALL_SCHEDULES, SOME_SCHEDULES = {"SGD momentum", "AdamW foreach", "AdamW tensor lr"}, {"none", "MultiplicativeLR"}
CASES = [
    pytest.param(schedule, kind, id=f"{schedule}, {kind}")
    for schedule in SCHEDULERS
    for kind in OPTIMIZERS
    if kind in ALL_SCHEDULES or schedule in SOME_SCHEDULES
]


def tensors(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**g, "lr": torch.tensor(g["lr"])} if "lr" in g else g for g in groups]


class Run:
    """Least squares on fixed data with two parameter groups: as deterministic as it gets."""

    def __init__(self, kind: str = "SGD momentum", schedule: str = "none", *, scaled: bool = False) -> None:
        torch.manual_seed(3)
        self.first, self.last = torch.nn.Linear(4, 5), torch.nn.Linear(5, 1)
        self.model = torch.nn.Sequential(self.first, torch.nn.Tanh(), self.last)
        weights, rest = list(self.first.parameters()), list(self.last.parameters())
        self.optimizer = OPTIMIZERS[kind]([{"params": weights}, {"params": rest, "lr": BASES[1]}])
        self.scheduler = SCHEDULERS[schedule](self.optimizer)
        self.scaler = torch.amp.GradScaler("cpu") if scaled else None
        self.x = torch.linspace(-1, 1, 24).reshape(6, 4)
        self.count = 0

    def attach(self, **policy: Any) -> gw.Watchdog:
        scheduler = self.scheduler
        policy = {"recover_after": 4, **policy}
        return gw.attach(model=self.model, optimizer=self.optimizer, scheduler=scheduler, scaler=self.scaler, **policy)

    def backward(self) -> None:
        loss = ((self.model(self.x) - self.x.sum(1, keepdim=True)) ** 2).mean()
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def update(self) -> None:
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def advance(self) -> None:
        self.count += 1
        if isinstance(self.scheduler, lrs.ReduceLROnPlateau):
            self.scheduler.step(1.0 / min(self.count, 6))
        elif self.scheduler is not None:
            self.scheduler.step()

    def step(self, ceiling: float | None = None) -> None:
        self.optimizer.zero_grad()
        self.backward()
        with capped_by_hand(self.optimizer, ceiling):
            self.update()
        self.advance()

    def rates(self) -> list[float]:
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def schedule(self) -> Any:  # noqa: ANN401
        groups = [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
        return copied([groups, self.scheduler.state_dict() if self.scheduler is not None else None])

    def weights(self) -> Any:  # noqa: ANN401
        return copied(dict(self.model.state_dict()))


@contextmanager
def capped_by_hand(optimizer: torch.optim.Optimizer, ceiling: float | None) -> Iterator[None]:
    if ceiling is None:
        yield
        return
    own = copied([group["lr"] for group in optimizer.param_groups])
    for group, base in zip(optimizer.param_groups, BASES, strict=True):
        write(group, min(float(group["lr"]), ceiling * (base / BASES[0])))
    yield
    for group, rate in zip(optimizer.param_groups, own, strict=True):
        write(group, rate)


def write(group: dict[str, Any], rate: Any) -> None:  # noqa: ANN401
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(float(rate))
    else:
        group["lr"] = rate


def compare(watched: Run, dog: gw.Watchdog, unwatched: Run, by_hand: Run, steps: int = 40) -> list[tuple[int, str]]:
    """Run all three, band 1 on step 10; return what was done. The schedule and every update are compared on the way."""
    ceiling, done = None, []
    for step in range(steps):
        watched.step()
        unwatched.step()
        by_hand.step(ceiling)
        assert not differences(watched.schedule(), unwatched.schedule()), f"the schedule on step {step}"
        assert not differences(watched.weights(), by_hand.weights()), f"the update of step {step}"
        verdict = dog.observe(step, BAND_1 if step == 10 else HEALTHY)
        assert not verdict.halt
        for outcome in verdict.actions:
            assert outcome.ok, outcome
            done.append((step, outcome.action))
            if outcome.action == "lower_learning_rate":
                ceiling = CEILING
            if outcome.action == "restore_learning_rate":
                ceiling = None
    return done


@pytest.mark.parametrize(("schedule", "kind"), CASES)
def test_the_update_is_capped_and_the_schedule_goes_on_as_if_nothing_had_been(schedule: str, kind: str) -> None:
    watched, unwatched, by_hand = (Run(kind, schedule) for _ in range(3))
    done = compare(watched, watched.attach(), unwatched, by_hand)
    assert [action for _, action in done] == ["lower_learning_rate", "restore_learning_rate"]
    capped, free = done[0][0], done[1][0]
    assert capped == 10
    assert capped + 5 < free < 35, "some steps capped, and some after it was lifted"


def test_two_groups_that_share_one_tensor_keep_their_schedule() -> None:
    """AdamW's default lr tensor is one object in all groups: putting back in order would leave the ceiling in it."""

    def make() -> Run:
        run = Run()
        halves = [{"params": list(run.first.parameters())}, {"params": list(run.last.parameters())}]
        run.optimizer = torch.optim.AdamW(halves, lr=torch.tensor(1e-3), foreach=False)
        run.scheduler = lrs.StepLR(run.optimizer, 7)
        run.optimizer.param_groups[1]["initial_lr"] = torch.tensor(1e-4)  # its ceiling is another one
        assert run.optimizer.param_groups[0]["lr"] is run.optimizer.param_groups[1]["lr"]
        return run

    watched, unwatched = make(), make()
    dog = watched.attach()
    for step in range(12):
        before = watched.weights()
        watched.step()
        unwatched.step()
        dog.observe(step, BAND_1)
        assert not differences(watched.schedule(), unwatched.schedule())
        if step:
            moved = max(
                float((a - b).abs().max()) for a, b in zip(before.values(), watched.weights().values(), strict=True)
            )
            assert 0 < moved < 2 * CEILING


@pytest.mark.parametrize("kind", ["AdamW", "AdamW fused", "SGD momentum"])
def test_a_grad_scaler_changes_nothing(kind: str) -> None:
    watched, unwatched, by_hand = (Run(kind, "CosineAnnealingLR", scaled=True) for _ in range(3))
    assert len(compare(watched, watched.attach(), unwatched, by_hand)) == 2


@pytest.mark.parametrize("each_micro_step", [True, False])
def test_gradient_accumulation_is_capped_and_raises_no_false_alarm(*, each_micro_step: bool) -> None:
    watched, by_hand = Run("AdamW", "ExponentialLR"), Run("AdamW", "ExponentialLR")
    dog = watched.attach(recover_after=1000)
    ceiling, observations = None, 0
    done: list[gw.Outcome] = []
    for micro in range(8 * 12):
        for run in (watched, by_hand):
            run.backward()
        last = micro % 8 == 7
        if last:
            watched.update()
            with capped_by_hand(by_hand.optimizer, ceiling):
                by_hand.update()
            for run in (watched, by_hand):
                run.advance()
                run.optimizer.zero_grad()
        assert not differences(watched.weights(), by_hand.weights())
        if each_micro_step or last:
            done += dog.observe(observations, BAND_1 if micro >= 15 else HEALTHY).actions
            ceiling = CEILING if done else None
            observations += 1
    assert [(o.action, o.ok) for o in done] == [("lower_learning_rate", True)]


def test_a_step_that_raises_leaves_the_schedule_alone() -> None:
    """No post-hook runs then; a chainable scheduler that reads the capped rate would stay there for good."""
    watched, unwatched = Run("SGD", "ExponentialLR"), Run("SGD", "ExponentialLR")
    dog = watched.attach()
    dog.observe(0, BAND_1)

    def out_of_memory() -> float:
        raise MemoryError("in the middle of a step")

    for step in range(1, 5):
        for run in (watched, unwatched):
            with pytest.raises(MemoryError, match="in the middle"):
                run.optimizer.step(out_of_memory)
            run.advance()
        assert not differences(watched.schedule(), unwatched.schedule())
        assert all(o.ok for o in dog.observe(step, BAND_1).actions)


def test_a_scheduler_made_after_attaching_works_without_a_warning() -> None:
    run = Run("SGD")
    dog = run.attach()
    run.scheduler = lrs.ExponentialLR(run.optimizer, 0.9)
    dog.observe(0, BAND_1)
    before = run.weights()
    run.step()
    assert run.rates() == [BASES[0] * 0.9, BASES[1] * 0.9]
    gradient = run.first.bias.grad
    assert gradient is not None
    assert torch.equal(run.weights()["0.bias"], before["0.bias"].add(gradient, alpha=-CEILING))


def test_a_hook_that_raises_the_rate_in_the_step_is_reported() -> None:
    run = Run("SGD momentum")
    dog = run.attach()

    def defy(optimizer: torch.optim.Optimizer, *_: object) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 5e-4

    run.optimizer.register_step_pre_hook(defy)
    assert all(o.ok for o in dog.observe(0, BAND_1).actions)
    run.step()
    (outcome,) = dog.observe(1, BAND_1).actions
    assert (outcome.action, outcome.ok) == ("lower_learning_rate", False)
    assert "raised the learning rate to 0.0005 inside the optimizer step" in outcome.detail
    assert run.rates() == [5e-4, 5e-4], "what somebody else wrote is theirs"


def test_an_optimizer_that_never_steps_is_reported() -> None:
    run, other = Run("SGD"), Run("SGD")
    dog = gw.attach(model=run.model, optimizer=torch.optim.SGD(run.model.parameters(), lr=1e-3))
    for step in range(40):
        other.step()
        assert dog.observe(step, HEALTHY).actions == ()
    assert [o.ok for o in dog.observe(40, BAND_1).actions] == [True]
    (outcome,) = dog.observe(41, BAND_1).actions
    assert not outcome.ok
    assert "is it the one that trains?" in outcome.detail
    assert dog.observe(42, BAND_1).actions == (), "said once"


def test_groups_added_later_are_capped_in_proportion_too() -> None:
    run = Run("SGD")
    dog = run.attach()
    extra = {rate: torch.nn.Parameter(torch.zeros(1)) for rate in (1e-2, 1e-3, 1e-5)}
    for rate, parameter in extra.items():
        run.optimizer.add_param_group({"params": [parameter], "lr": rate})
    dog.observe(0, BAND_1)
    for parameter in extra.values():
        parameter.grad = torch.ones(1)
    run.optimizer.step()
    moved = [-parameter.item() for parameter in extra.values()]
    assert moved == pytest.approx([CEILING, CEILING, CEILING / 100])
    assert run.rates() == [*BASES, 1e-2, 1e-3, 1e-5]


def test_a_rate_that_the_user_writes_while_it_is_capped_is_kept_and_capped() -> None:
    run = Run("SGD")
    dog = run.attach()
    dog.observe(0, BAND_1)
    bias = run.first.bias
    for rate, used in ((5e-2, CEILING), (3e-8, 3e-8), (float("nan"), CEILING), (float("inf"), CEILING)):
        run.optimizer.param_groups[0]["lr"] = rate
        before = bias.detach().clone()
        bias.grad = torch.full_like(bias, 1e3)
        run.optimizer.step()
        assert torch.equal(bias.detach(), before.add(bias.grad, alpha=-used))
        assert repr(run.rates()[0]) == repr(rate)
        assert all(o.ok for o in dog.observe(1, BAND_1).actions)


def test_a_second_watchdog_takes_over_and_the_first_one_says_so() -> None:
    run = Run("SGD", "ExponentialLR")
    first = run.attach()
    first.observe(0, BAND_1)
    second = run.attach()
    second.observe(0, {"log_ratio": 12.0})
    unwatched = Run("SGD", "ExponentialLR")
    for _ in range(3):
        run.step()
        unwatched.step()
        assert not differences(run.schedule(), unwatched.schedule())
    (outcome,) = first.observe(1, BAND_1).actions
    assert not outcome.ok
    assert "another watchdog" in outcome.detail
    assert all(o.ok for o in second.observe(1, BAND_1).actions)


def test_scaled_targets_step_down_from_where_a_one_cycle_schedule_goes() -> None:
    run = Run("SGD momentum", "OneCycleLR")
    dog = run.attach(targets="scaled")
    for _ in range(20):  # warmed up
        run.step()
    assert run.rates()[0] > BASES[0] / 10
    (outcome,) = dog.observe(0, BAND_1).actions
    assert outcome.action == "lower_learning_rate"
    assert outcome.after == pytest.approx(BASES[0] / 10)


def test_an_optimizer_that_finds_its_own_rate_has_no_such_knob() -> None:
    run = Run("SGD")
    run.optimizer.param_groups[0]["lr"] = None
    dog = run.attach()
    assert any("no learning_rate knob" in line for line in dog.briefing)
    assert dog.observe(0, BAND_1).actions == ()
