"""The veto: a poisoned step changes nothing, a run that is only unusual is let go on."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fake_training import copied, differences
from grpo_watchdog.controls import NoControls, Veto
from grpo_watchdog.integrations.torch_loop import TorchControls
from grpo_watchdog.integrations.torch_veto import WINDOW, Baseline

VETO = Veto()
Make = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda groups: torch.optim.SGD(groups, lr=1e-3, weight_decay=0.1),
    "SGD momentum": lambda groups: torch.optim.SGD(groups, lr=1e-3, momentum=0.9, nesterov=True, weight_decay=0.1),
    "SGD fused": lambda groups: torch.optim.SGD(groups, lr=1e-3, momentum=0.9, fused=True),
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=1e-3, foreach=False, weight_decay=0.1),
    "AdamW foreach": lambda groups: torch.optim.AdamW(groups, lr=1e-3, foreach=True, weight_decay=0.1),
    "AdamW fused": lambda groups: torch.optim.AdamW(groups, lr=1e-3, fused=True, weight_decay=0.1),
    "AdamW tensor lr": lambda groups: torch.optim.AdamW(groups, lr=torch.tensor(1e-3), foreach=False),
    "Adam": lambda groups: torch.optim.Adam(groups, lr=1e-3, amsgrad=True),
    "Adafactor": lambda groups: torch.optim.Adafactor(groups, lr=1e-3),
}


class Run:
    """Gradients of any size, by hand; two groups and a schedule."""

    def __init__(self, kind: str = "AdamW", dtype: torch.dtype = torch.float32, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 3)).to(dtype)
        groups = [{"params": list(layer.parameters())} for layer in self.model]
        self.optimizer = OPTIMIZERS[kind]([groups[0], {**groups[1], "lr": 1e-4}])
        self.controls = TorchControls(model=self.model, optimizer=self.optimizer, **options)
        self.drawn = torch.Generator().manual_seed(1)

    def gradients(self, size: float = 1.0) -> None:
        for parameter in self.model.parameters():
            noise = torch.randn(parameter.shape, generator=self.drawn)
            parameter.grad = (noise * size).to(parameter.dtype)

    def step(self, size: float = 1.0) -> bool:
        """Step with a gradient of this size; return whether the weights moved."""
        self.gradients(size)
        before = self.state()[0]
        self.optimizer.step()
        return bool(differences(before, self.state()[0]))

    def state(self) -> Any:  # noqa: ANN401
        return copied([dict(self.model.state_dict()), self.optimizer.state_dict()])


def settled(kind: str = "AdamW", veto: Veto | None = VETO, **options: Any) -> Run:
    run = Run(kind, **options)
    run.controls.arm(veto)
    for _ in range(20):
        assert run.step()
    return run


@pytest.mark.parametrize("size", [math.nan, math.inf, 1e9])
@pytest.mark.parametrize("ceiling", ["before", "after", "none"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_vetoed_step_changes_no_bit(kind: str, ceiling: str, size: float) -> None:
    run, never = Run(kind, tripwires=True), Run(kind)
    for made in (run, never):
        if ceiling == "before":
            made.controls.knobs["learning_rate"].hold(1e-5)
        made.controls.arm(VETO)
        for _ in range(20):
            made.step()
        if ceiling == "after":
            made.controls.knobs["learning_rate"].hold(1e-5)
    run.controls.signals()
    run.gradients(size)
    kept = copied([p.grad for p in run.model.parameters()])
    run.optimizer.step()
    assert not differences(run.state(), never.state()), "no weight, no moment, no counter, no rate"
    assert not differences([p.grad for p in run.model.parameters()], kept), "a loop may look at them"
    seen = run.controls.signals()
    assert (seen["vetoes"], seen["weights_touched"], seen["param_change"]) == (1.0, 0.0, 0.0)
    never.gradients()
    assert run.step() == never.step() is True
    assert run.controls.knobs["learning_rate"].check() is None
    assert not differences(run.optimizer.state_dict()["param_groups"], never.optimizer.state_dict()["param_groups"])


def test_one_gradient_that_is_not_finite_among_many_is_enough() -> None:
    run = settled()
    run.gradients()
    gradient = next(run.model.parameters()).grad
    assert gradient is not None
    gradient[1, 2] = math.nan
    before = run.state()
    run.optimizer.step()
    assert not differences(run.state(), before)
    assert run.controls.vetoed() == ["gradient norm nan: the optimizer step was skipped"]
    assert run.controls.vetoed() == []


def test_an_absurd_gradient_is_told_with_what_is_usual() -> None:
    run = settled()
    assert not run.step(1e9)
    (told,) = run.controls.vetoed()
    assert told.startswith("gradient norm ")
    assert told.endswith("of the last 20 steps: the optimizer step was skipped")
    assert " times the median " in told


def test_gradients_that_are_never_finite_are_always_vetoed_and_told_briefly() -> None:
    run = settled()
    assert not any(run.step(math.nan) for _ in range(200))
    assert run.controls.signals()["vetoes"] == 200
    told = run.controls.vetoed()
    assert len(told) == 17
    assert told[-1] == "and 184 more"


@pytest.mark.parametrize("size", [10.0, 400.0, 1e-6, 0.0])
def test_an_unusual_gradient_is_let_through(size: float) -> None:
    run = settled("SGD")
    for _ in range(30):
        run.step(size)
    assert run.controls.signals()["vetoes"] == 0


def test_a_scale_that_really_changed_is_let_through_after_the_bound() -> None:
    run = settled("SGD")
    moved = [run.step(5000.0) for _ in range(200)]
    assert moved == [False] * 3 + [True] * 197
    assert all(run.step(1.0) for _ in range(10)), "and so is the way back"


@pytest.mark.parametrize("most", [0, 1, 5])
def test_the_bound_is_the_one_asked_for(most: int) -> None:
    run = settled("SGD", Veto(most=most))
    assert [run.step(1e5) for _ in range(8)] == [False] * most + [True] * (8 - most)


def test_rare_spikes_are_all_vetoed() -> None:
    run = settled("SGD")
    moved = [run.step(1e7 if step % 30 == 0 else 1.0) for step in range(300)]
    assert [step for step, m in enumerate(moved) if not m] == list(range(0, 300, 30))


def test_a_run_that_learns_from_few_batches_learns() -> None:
    """Nine batches of ten without any advantage leave rounding noise: the tenth is absurd beside them, and the run."""
    run = Run("SGD")
    run.controls.arm(VETO)
    moved = [run.step(1.0 if step % 10 == 9 else 1e-6) for step in range(400)]
    learned = [moved[step] for step in range(9, 400, 10)]
    assert learned.count(False) <= 3
    assert all(learned[4:])


def test_the_first_steps_are_never_absurd() -> None:
    run = Run("SGD")
    run.controls.arm(VETO)
    assert all(run.step(size) for size in (1e-4, 1e4, 1e-4, 1e3, 1e-4, 10.0, 1e-4, 1e-4, 1e-4))
    assert not run.step(math.nan)


def test_dry_vetoes_count_and_change_no_bit() -> None:
    sizes = [1.0] * 20 + [1e9, 1.0, math.nan, 1.0, 1e9]
    for kind in OPTIMIZERS:
        dry, free = Run(kind), Run(kind)
        dry.controls.arm(Veto(dry=True))
        for size in sizes:
            dry.step(size)
            free.step(size)
            assert not differences(dry.state(), free.state()), kind
        assert dry.controls.signals() == {"vetoes": 3.0}
        assert [t.rsplit(": ", 1)[1] for t in dry.controls.vetoed()] == [
            "the optimizer step would have been skipped"
        ] * 3


def test_only_an_armed_veto_vetoes() -> None:
    run = settled(veto=None)
    assert run.step(1e9)
    assert run.controls.signals() == {}
    run.controls.arm(VETO)
    assert not run.step(math.nan)
    run.controls.arm(None)
    assert run.step(1e9)
    assert run.controls.signals() == {"vetoes": 1.0}
    assert run.controls.signals() == {}
    run.controls.arm(VETO)
    run.controls.detach()
    run.step(math.nan)
    assert run.controls.signals() == {"vetoes": 0.0}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("by_hand", [False, True])
def test_a_grad_scaler_that_looks_for_its_scale_trips_nothing(*, fused: bool, by_hand: bool) -> None:
    """A fused optimizer is handed scaled gradients, and steps that the scaler itself skips."""

    def train(*, armed: bool) -> tuple[Any, dict[str, float]]:
        run = Run("AdamW fused" if fused else "AdamW")
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=3)
        if armed:
            run.controls.arm(VETO)
        x = torch.linspace(-1, 1, 12).reshape(3, 4)
        for step in range(80):
            run.optimizer.zero_grad()
            scaler.scale((run.model(x) ** 2).mean() * (math.nan if step == 60 else 1.0)).backward()
            if by_hand:
                scaler.unscale_(run.optimizer)
            scaler.step(run.optimizer)
            scaler.update()
        return [run.state(), scaler.state_dict()], run.controls.signals()

    watched, seen = train(armed=True)
    assert not differences(watched, train(armed=False)[0])
    assert seen == {"vetoes": 0.0}


def test_an_absurd_gradient_under_a_grad_scaler_is_vetoed() -> None:
    for kind in ("AdamW", "AdamW fused"):
        run, scaler = Run(kind), torch.amp.GradScaler("cpu", init_scale=2.0**8)
        run.controls.arm(VETO)
        x = torch.linspace(-1, 1, 12).reshape(3, 4)
        for step in range(30):
            run.optimizer.zero_grad()
            before = run.state()
            scaler.scale((run.model(x) ** 2).mean() * (1e7 if step == 25 else 1.0)).backward()
            scaler.step(run.optimizer)
            scaler.update()
            assert bool(differences(run.state(), before)) == (step != 25)


def test_accumulated_gradients_are_judged_at_the_step() -> None:
    run = settled("SGD")
    x = torch.ones(3, 4)
    run.optimizer.zero_grad()
    for part in range(4):
        ((run.model(x) ** 2).mean() * (math.nan if part == 1 else 1.0)).backward()
    before = run.state()
    run.optimizer.step()
    assert not differences(run.state(), before)
    assert run.controls.signals()["vetoes"] == 1


def test_a_step_that_computes_its_own_gradients_is_left_alone() -> None:
    run = settled("SGD")

    def closure() -> float:
        run.gradients()
        return 0.0

    run.gradients(math.nan)
    run.optimizer.step(closure)
    run.gradients(math.nan)
    run.optimizer.step(closure=closure)
    assert run.controls.signals()["vetoes"] == 0
    assert all(bool(p.isfinite().all()) for p in run.model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_norm_that_half_precision_cannot_hold_is_no_infinity(dtype: torch.dtype) -> None:
    run = Run("SGD", dtype)
    run.controls.arm(VETO)
    for _ in range(12):
        run.step(1.5e4)
    assert run.controls.signals()["vetoes"] == 0
    run.step(math.inf)
    assert run.controls.signals()["vetoes"] == 1


def test_sparse_and_missing_gradients_are_judged_too() -> None:
    embedding, unused = torch.nn.Embedding(10, 3, sparse=True), torch.nn.Linear(2, 2)
    model = torch.nn.ModuleList([embedding, unused])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controls = TorchControls(model=model, optimizer=optimizer)
    controls.arm(VETO)
    optimizer.step()
    for factor in (1.0, math.nan):
        optimizer.zero_grad()
        (embedding(torch.tensor([1, 1, 4])).sum() * factor).backward()
        optimizer.step()
    assert controls.signals() == {"vetoes": 1.0}
    assert bool(embedding.weight.isfinite().all())


def test_what_has_no_norm_is_said_once_and_lets_the_training_go_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = settled("SGD")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "_foreach_norm", None)
        assert run.step()
        assert run.step()
    assert caplog.text.count("optimizer steps are not vetoed any more: TypeError") == 1


def test_after_a_rollback_what_was_let_through_is_absurd_again(tmp_path: Path) -> None:
    run = settled("SGD")
    run.controls.save(tmp_path)
    assert [run.step(1e8) for _ in range(5)] == [False, False, False, True, True]
    run.controls.restore(tmp_path)
    assert [run.step(1e8) for _ in range(4)] == [False, False, False, True]


@given(st.lists(st.floats(0, 1e30), max_size=200), st.integers(0, 5))
def test_no_more_than_the_bound_are_refused_within_a_window(norms: list[float], most: int) -> None:
    baseline, veto = Baseline(), Veto(most=most)
    refused = [baseline.judge(norm, veto).refused for norm in norms]
    assert not any(refused[:10])
    assert all(sum(refused[i : i + WINDOW]) <= most for i in range(len(refused)))


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=100), st.floats(1e-20, 1e20))
def test_the_judgement_knows_no_unit(norms: list[float], unit: float) -> None:
    unit = 2.0 ** round(math.log2(unit))
    one, other = Baseline(), Baseline()
    for norm in norms:
        assert one.judge(norm, VETO).refused == other.judge(norm * unit, VETO).refused


def test_no_controls_veto_nothing(tmp_path: Path) -> None:
    nothing = NoControls()
    nothing.arm(VETO)
    nothing.restore(tmp_path, replay_data=False)
    assert (nothing.signals(), nothing.vetoed()) == ({}, [])
