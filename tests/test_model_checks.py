"""The look at the model: the reference, what is trained, what is finite, and how far the weights moved."""

from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import grpo_watchdog as gw
from grpo_watchdog.integrations.torch_checks import SAMPLE
from grpo_watchdog.integrations.torch_loop import TorchControls

HEALTHY = {"log_ratio": 0.0}


class Policy(torch.nn.Module):
    """A frozen trunk with an adapter beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = torch.nn.Linear(4, 4)
        self.lora_A = torch.nn.Linear(4, 2, bias=False)
        self.lora_B = torch.nn.Linear(2, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.trunk(x) + self.lora_B(self.lora_A(x))
        return found


def adapted() -> Policy:
    model = Policy()
    model.trunk.requires_grad_(requires_grad=False)
    return model


Frozen = TypeVar("Frozen", bound=torch.nn.Module)


def frozen(model: Frozen) -> Frozen:
    return model.requires_grad_(requires_grad=False).eval()


def controls(model: torch.nn.Module, reference: torch.nn.Module | None = None, **options: Any) -> TorchControls:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    return TorchControls(**{"model": model, "optimizer": optimizer, "reference": reference, **options})


def found(made: TorchControls, name: str) -> tuple[bool | None, str]:
    check = next(c for c in made.inspect() if c.name == name)
    return check.passed, check.detail


def test_a_healthy_training_passes() -> None:
    torch.manual_seed(0)
    model = adapted()
    reference = frozen(Policy())
    made = controls(model, reference)
    assert [(c.name, c.passed) for c in made.inspect()] == [
        ("reference", True), ("trainable", True), ("parameters", True), ("optimizer_state", True),
    ]  # fmt: skip
    assert found(made, "trainable")[1] == "16 parameters are trained; LoRA adapters only"


# ── the reference ─────────────────────────────────────────────────────────────────────────────────────────────────
def the_policy_itself(model: torch.nn.Module) -> torch.nn.Module:
    return model


def sharing_a_weight(model: torch.nn.Module) -> torch.nn.Module:
    other = frozen(Policy())
    assert isinstance(model, Policy)
    other.lora_B.weight.data = model.lora_B.weight.data
    return other


def not_frozen(_: torch.nn.Module) -> torch.nn.Module:
    return Policy().eval()


def in_train_mode(_: torch.nn.Module) -> torch.nn.Module:
    return frozen(Policy()).train()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (the_policy_itself, "it is the policy itself"),
        (sharing_a_weight, "shares trained weights with it"),
        (not_frozen, "it is not frozen"),
        (in_train_mode, "it is in train mode"),
    ],
)
def test_a_wrong_reference_is_found_at_attach(
    make: Callable[[torch.nn.Module], torch.nn.Module], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = adapted()
    reference = make(model)
    passed, detail = found(controls(model, reference), "reference")
    assert passed is False
    assert said in detail
    gw.attach(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1e-3), reference=reference)
    assert f"model check reference: {detail}" in caplog.text


def test_sharing_frozen_weights_with_the_reference_is_fine() -> None:
    """As adapters do: the trunk is one, and nobody trains it."""
    model, reference = adapted(), frozen(Policy())
    reference.trunk = model.trunk.eval()
    assert found(controls(model, reference), "reference")[0] is True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("size", [3, 300])
def test_one_small_step_of_the_reference_is_found(dtype: torch.dtype, size: int) -> None:
    """Its norm may stay the same to the last bit, and overflows in half precision."""
    torch.manual_seed(1)
    reference = frozen(torch.nn.Linear(size, size)).to(dtype)
    with torch.no_grad():
        reference.weight.mul_(1000)
    made = controls(torch.nn.Linear(2, 2), reference)
    assert found(made, "reference")[0] is True
    step = torch.where(torch.rand(size, size) < 0.5, 1.01, 1 / 1.01).to(dtype)
    with torch.no_grad():
        reference.weight.mul_(step)
    assert found(made, "reference") == (False, "the reference: its weights changed since attach")


def test_a_change_that_leaves_the_norm_is_found() -> None:
    reference = frozen(torch.nn.Linear(3, 3))
    made = controls(torch.nn.Linear(2, 2), reference)
    reference.weight.data.neg_()
    assert found(made, "reference")[0] is False


def test_a_reference_that_is_not_finite_has_not_changed() -> None:
    reference = frozen(torch.nn.Linear(2, 2))
    with torch.no_grad():
        reference.weight[0, 0] = float("nan")
    assert found(controls(torch.nn.Linear(2, 2), reference), "reference")[0] is True


# ── what is trained ───────────────────────────────────────────────────────────────────────────────────────────────
def test_training_more_than_the_adapters_is_found() -> None:
    passed, detail = found(controls(Policy()), "trainable")
    assert passed is False
    assert "2 tensors outside the LoRA adapters are trained, trunk.bias first" in detail


def test_what_the_optimizer_misses_is_found() -> None:
    model = Policy()
    optimizer = torch.optim.SGD(model.trunk.parameters(), lr=0.1)
    passed, detail = found(controls(model, optimizer=optimizer), "trainable")
    assert passed is False
    assert "2 trainable tensors are not in this optimizer, lora_A.weight first" in detail


def test_a_change_of_what_is_trained_is_found() -> None:
    model = adapted()
    made = controls(model)
    assert found(made, "trainable")[0] is True
    model.trunk.bias.requires_grad_()
    passed, detail = found(made, "trainable")
    assert passed is False
    assert "what is trained changed since attach: trunk.bias" in detail


# ── what is finite ────────────────────────────────────────────────────────────────────────────────────────────────
def test_weights_and_moments_that_are_not_finite_are_named() -> None:
    model = adapted()
    made = controls(model)
    model(torch.ones(1, 4)).sum().backward()
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    made = controls(model, optimizer=optimizer)
    with torch.no_grad():
        optimizer.state[model.lora_B.weight]["exp_avg"][0, 1] = float("nan")
    assert found(made, "optimizer_state") == (False, "exp_avg of lora_B.weight is not finite")
    assert found(made, "parameters")[0] is True
    with torch.no_grad():
        model.trunk.weight[1, 1] = float("-inf")
    assert found(made, "parameters") == (False, "trunk.weight is not finite")


# ── how far the weights moved ─────────────────────────────────────────────────────────────────────────────────────
def exactly(now: list[torch.Tensor], then: list[torch.Tensor]) -> float:
    moved = sum(float(((a.double() - b.double()) ** 2).sum()) for a, b in zip(now, then, strict=True))
    return float((moved / sum(float((b.double() ** 2).sum()) for b in then)) ** 0.5)


def values(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape).to(parameter.dtype)
    optimizer.step()


def build(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> torch.nn.Module:
    model = torch.nn.Module()
    for number, shape in enumerate(shapes):
        model.register_parameter(f"p{number}", torch.nn.Parameter(torch.randn(shape).to(dtype) * (number + 1)))
    return model


@given(
    shapes=st.lists(
        st.sampled_from([(), (1,), (0,), (7,), (4, 5), (SAMPLE,), (2, 3, 4), (64, 64)]), min_size=1, max_size=5
    ).filter(lambda shapes: any(s != (0,) for s in shapes)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_the_movement_of_small_tensors_is_exact(shapes: list[tuple[int, ...]], dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    model = build(shapes, dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    made = TorchControls(model=model, optimizer=optimizer, check_every=1)
    start = values(model)
    for _ in range(3):
        before = values(model)
        train(model, optimizer)
    seen = made.measure()
    assert seen["param_change"] == pytest.approx(exactly(values(model), before), rel=1e-4, abs=1e-9)
    assert seen["param_drift"] == pytest.approx(exactly(values(model), start), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize(
    "shapes",
    [
        [(300, 300)],
        [(4096, 256), (256,), (3, 5)],
        [(100_003,), (64, 64, 8)],
        [(4096, 64), (128, 4096)],
        [(1000, 1000), (64, 64)],
    ],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_the_movement_of_large_tensors_is_estimated(shapes: list[tuple[int, ...]], *, transposed: bool) -> None:
    """Large and small tensors beside each other count by their size, not by the size of their sample."""
    torch.manual_seed(4)
    model = build(shapes, torch.float32)
    if transposed:
        for parameter in model.parameters():
            parameter.data = parameter.data.transpose(0, -1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    made = TorchControls(model=model, optimizer=optimizer, check_every=1)
    start = values(model)
    train(model, optimizer)
    middle = values(model)
    train(model, optimizer)
    seen = made.measure()
    assert seen["param_change"] == pytest.approx(exactly(values(model), middle), rel=0.2)
    assert seen["param_drift"] == pytest.approx(exactly(values(model), start), rel=0.2)


def test_movement_in_some_columns_only_is_seen() -> None:
    """With 4096 columns, every 4096th element would lie in the first one."""
    model = build([(1024, 4096)], torch.float32)
    (weight,) = model.parameters()
    made = TorchControls(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    start = values(model)
    with torch.no_grad():
        weight[:, 1:1000] += 1.0
    assert made.measure()["param_drift"] == pytest.approx(exactly(values(model), start), rel=0.2)


def test_drift_is_taken_from_the_reference_where_it_fits() -> None:
    torch.manual_seed(0)
    model, reference, other = torch.nn.Linear(3, 3), frozen(torch.nn.Linear(3, 3)), frozen(torch.nn.Linear(3, 4))
    expected = exactly(values(model), values(reference))
    assert controls(model, reference).measure()["param_drift"] == pytest.approx(expected, rel=1e-5)
    assert controls(model, other).measure()["param_drift"] == 0


def test_param_change_is_measured_only_so_often() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    made = TorchControls(model=model, optimizer=optimizer, check_every=4)
    assert "param_change" not in made.measure()
    seen = []
    for _ in range(9):
        train(model, optimizer)
        seen.append(made.measure()["param_change"])
    assert len(set(seen)) == 3
    assert seen[0] == seen[3] != seen[4] == seen[7] != seen[8]


def test_a_model_with_nothing_to_train_is_watched() -> None:
    model = frozen(torch.nn.Linear(2, 2))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    made = TorchControls(model=model, optimizer=optimizer, check_every=1)
    optimizer.step()
    assert made.measure() == {}


def test_what_cannot_be_sampled_does_not_raise_into_the_training(caplog: pytest.LogCaptureFixture) -> None:
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gw.attach(model=model, optimizer=optimizer, check_every=1)
    model.named_parameters = None  # type: ignore[assignment]
    optimizer.step()
    optimizer.step()
    assert caplog.text.count("param_change is not measured any more: TypeError") == 1


def test_the_figures_reach_the_verdict_and_the_diagnosis() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    dog = gw.attach(model=model, optimizer=optimizer, reference=torch.nn.Linear(3, 3))
    train(model, optimizer)
    dog.observe(0, HEALTHY)
    verdict = dog.observe(1, {"log_ratio": 25.0})
    (incident,) = verdict.incidents
    (reference,) = (c for c in incident.causes if c.cause == "reference_not_frozen")
    assert any("it is not frozen" in text for text in reference.supported)


def test_checks_copy_no_more_than_samples() -> None:
    """40 MB of weights: attach, a measured step and a look take a few samples each."""
    model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024, bias=False) for _ in range(10)))
    transposed = next(model.parameters())
    transposed.data = transposed.data.t()
    reference = frozen(torch.nn.Sequential(*(torch.nn.Linear(1024, 1024, bias=False) for _ in range(10))))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with torch.profiler.profile(profile_memory=True) as profile:
        made = TorchControls(model=model, optimizer=optimizer, reference=reference, check_every=1)
        made.inspect()
        made.measure()
        optimizer.step()
    largest = max(abs(event.self_cpu_memory_usage) for event in profile.key_averages())
    assert largest < 5_000_000, "less than two of the ten tensors in all"
