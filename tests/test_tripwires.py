"""Tripwires: exactly 0 while only the optimizer writes, more as soon as anything else does."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import grpo_watchdog as gw
from fake_training import Training, attaching, differences
from grpo_watchdog.integrations.torch_loop import TorchControls
from grpo_watchdog.integrations.torch_spaced import Lane

TOUCHED = ("weights_touched", "moments_touched", "reference_touched")
Make = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda groups: torch.optim.SGD(groups, lr=1e-2),
    "SGD momentum": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=1e-2, foreach=False),
    "AdamW foreach": lambda groups: torch.optim.AdamW(groups, lr=1e-2, foreach=True, amsgrad=True),
    "AdamW fused": lambda groups: torch.optim.AdamW(groups, lr=1e-2, fused=True),
    "Adafactor": lambda groups: torch.optim.Adafactor(groups, lr=1e-2),
    "RMSprop": lambda groups: torch.optim.RMSprop(groups, lr=1e-2, centered=True, momentum=0.5),
}


class Run:
    """Two groups, a schedule, a reference; gradients of the two halves of a batch accumulate."""

    def __init__(self, kind: str = "AdamW", dtype: torch.dtype = torch.float32, *, tripwires: bool = True) -> None:
        torch.manual_seed(0)
        first, last = self.first, self.last = torch.nn.Linear(4, 70), torch.nn.Linear(70, 90)
        self.model = torch.nn.Sequential(first, torch.nn.Tanh(), last).to(dtype)
        self.reference = torch.nn.Linear(4, 4).requires_grad_(requires_grad=False).eval()
        groups: list[dict[str, Any]] = [{"params": list(half.parameters())} for half in (first, last)]
        groups[1]["lr"] = 1e-3
        self.optimizer = OPTIMIZERS[kind](groups)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 30)
        self.controls = TorchControls(
            model=self.model, optimizer=self.optimizer, scheduler=self.scheduler, reference=self.reference,
            tripwires=tripwires,
        )  # fmt: skip

    @property
    def weight(self) -> torch.Tensor:
        """The large one: 6300 elements, so that only some of them are looked at."""
        return self.last.weight.data

    def moment(self, name: str) -> torch.Tensor:
        found: torch.Tensor = self.optimizer.state[self.first.weight][name]
        return found

    def step(self) -> None:
        self.optimizer.zero_grad()
        for _ in range(2):
            x = torch.randn(3, 4, dtype=self.weight.dtype)
            (self.model(x) ** 2).mean().backward()
        self.optimizer.step()
        self.scheduler.step()


# ── what is healthy ───────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_nothing_is_touched_in_a_healthy_training(kind: str, dtype: torch.dtype) -> None:
    run = Run(kind, dtype)
    assert run.controls.signals() == dict.fromkeys(TOUCHED, 0.0), "no step, no param_change"
    for step in range(50):
        run.step()
        if step == 20:
            run.controls.knobs["learning_rate"].hold(1e-5)
        if step % 3 == 0:
            seen = run.controls.signals()
            assert [seen[name] for name in TOUCHED] == [0.0, 0.0, 0.0]
            assert seen["param_change"] < 1
            assert seen["param_change"] > 0 or (dtype is torch.bfloat16 and step > 20), "too small a step for it"
    assert set(run.controls.signals()) == {*TOUCHED, "param_change"}
    assert "param_change" not in run.controls.signals()


@pytest.mark.parametrize("kind", ["SGD momentum", "AdamW fused"])
def test_watching_changes_no_bit(kind: str) -> None:
    watched, unwatched = Run(kind), Run(kind, tripwires=False)
    for run in (watched, unwatched):
        torch.manual_seed(5)
        for _ in range(20):
            run.step()
            run.controls.signals()
    assert unwatched.controls.signals() == {}
    assert not differences(dict(watched.model.state_dict()), dict(unwatched.model.state_dict()))
    assert not differences(watched.optimizer.state_dict(), unwatched.optimizer.state_dict())


def test_the_change_of_a_step_is_that_of_the_weights() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(30, 30)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controls = TorchControls(model=model, optimizer=optimizer, tripwires=True)
    changes = []
    for size in (1.0, 7.0, 2.0):
        before = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter) * size
        optimizer.step()
        after = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        changes.append(float((after - before).norm() / before.norm()))
    assert controls.signals()["param_change"] == pytest.approx(max(changes), rel=1e-5), "the largest since the last"


# ── what is not ───────────────────────────────────────────────────────────────────────────────────────────────────
def scaled(run: Run) -> None:
    run.weight.mul_(1.01)


def zeroed(run: Run) -> None:
    run.first.bias.data.zero_()


def replaced(run: Run) -> None:
    run.first.weight.data = torch.randn(70, 4)


def to_nan(run: Run) -> None:
    run.weight.fill_(math.nan)


def moments_scaled(run: Run) -> None:
    run.moment("exp_avg_sq").mul_(1.001)


def moments_zeroed(run: Run) -> None:
    run.moment("exp_avg").zero_()


def moments_cleared(run: Run) -> None:
    run.optimizer.state.clear()


def moments_replaced(run: Run) -> None:
    run.optimizer.state[run.first.weight]["exp_avg"] = torch.ones(70, 4)


def reference_scaled(run: Run) -> None:
    run.reference.weight.data.mul_(1.001)


def reference_loaded(run: Run) -> None:
    run.reference.load_state_dict(torch.nn.Linear(4, 4).state_dict())


WRITES = [
    (scaled, "weights_touched"), (zeroed, "weights_touched"), (replaced, "weights_touched"),
    (to_nan, "weights_touched"), (moments_scaled, "moments_touched"), (moments_zeroed, "moments_touched"),
    (moments_cleared, "moments_touched"), (moments_replaced, "moments_touched"),
    (reference_scaled, "reference_touched"), (reference_loaded, "reference_touched"),
]  # fmt: skip


@pytest.mark.parametrize("seen_by", ["signals", "the next step"])
@pytest.mark.parametrize(("write", "name"), WRITES)
def test_a_write_between_two_steps_is_seen_once(write: Callable[[Run], None], name: str, seen_by: str) -> None:
    run = Run("AdamW")
    for _ in range(3):
        run.step()
    run.controls.signals()
    write(run)
    if seen_by == "the next step":
        run.step()
        run.step()
    seen = run.controls.signals()
    assert {n for n in TOUCHED if seen[n] > 0} == {name}
    if write is to_nan:
        assert seen[name] == math.inf
    if write is moments_cleared:
        assert seen[name] == 1
    if write is not to_nan:
        run.step()
    after = run.controls.signals()
    assert [n for n in TOUCHED if after[n] > 0] == ([name] if name == "reference_touched" else []), "told once"


def test_weights_that_the_optimizer_itself_made_nan_were_touched_by_nobody() -> None:
    run = Run("SGD")
    run.step()
    run.weight.grad = None
    for parameter in run.model.parameters():
        parameter.grad = torch.full_like(parameter, math.nan)
    run.optimizer.step()
    run.step()
    seen = run.controls.signals()
    assert seen["param_change"] == math.inf
    assert [seen[name] for name in TOUCHED] == [0.0, 0.0, 0.0]


def test_what_is_written_before_the_first_step_is_the_users() -> None:
    run = Run("AdamW")
    scaled(run)
    run.controls.signals()
    scaled(run)
    run.step()
    assert run.controls.signals()["weights_touched"] == 0


def test_a_step_that_raises_halfway_is_no_write_of_somebody_else() -> None:
    run = Run("SGD")
    run.step()

    def halfway() -> float:
        scaled(run)
        raise MemoryError("in the middle of a step")

    with pytest.raises(MemoryError):
        run.optimizer.step(halfway)
    assert run.controls.signals()["weights_touched"] == 0
    run.step()
    assert run.controls.signals()["weights_touched"] == 0
    scaled(run)
    assert run.controls.signals()["weights_touched"] > 0, "and it is watched again"


def test_parameters_that_join_later_are_watched_from_then_on() -> None:
    run = Run("AdamW")
    run.step()
    head = torch.nn.Parameter(torch.ones(5))
    run.optimizer.add_param_group({"params": [head], "lr": 1e-3})
    head.grad = torch.ones(5)
    run.optimizer.step()
    assert [run.controls.signals()[name] for name in TOUCHED] == [0.0, 0.0, 0.0]
    head.data.zero_()
    assert run.controls.signals()["weights_touched"] > 0


def test_what_cannot_be_gathered_is_said_once_and_does_not_raise(caplog: pytest.LogCaptureFixture) -> None:
    run = Run("SGD")
    run.optimizer.param_groups[0]["params"][0] = "no tensor"
    run.controls._tripwires._before_step = lambda: 1 / 0  # type: ignore[union-attr, method-assign]  # noqa: SLF001
    run.optimizer.param_groups[0]["params"].pop(0)
    run.step()
    run.step()
    assert caplog.text.count("the tripwires are off: ZeroDivisionError") == 1
    assert run.controls.signals() == {}


def test_weights_of_several_types_are_measured_together() -> None:
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(200).to(t)) for t in (torch.float32, torch.float64, torch.bfloat16)]
    optimizer = torch.optim.AdamW(weights, lr=0.1)
    controls = TorchControls(model=torch.nn.ParameterList(weights), optimizer=optimizer, tripwires=True)
    before = torch.cat([w.detach().double() for w in weights])
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    after = torch.cat([w.detach().double() for w in weights])
    seen = controls.signals()
    assert seen["param_change"] == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-4)
    assert (seen["weights_touched"], seen["moments_touched"]) == (0.0, 0.0)
    weights[2].data.mul_(2)
    optimizer.state[weights[1]]["exp_avg"].mul_(2)
    weights[0].grad = None
    optimizer.step()
    seen = controls.signals()
    assert seen["weights_touched"] > 0.3
    assert seen["moments_touched"] > 0.3


@given(
    shapes=st.lists(st.sampled_from([(1,), (7,), (4, 5), (70, 90), (5000,), (9, 8, 80)]), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    odd=st.sampled_from(["plain", "transposed", "gaps"]),
    seed=st.integers(0, 1000),
)
def test_a_lane_sees_a_write_of_a_whole_tensor_and_nothing_else(
    shapes: list[tuple[int, ...]], dtype: torch.dtype, odd: str, seed: int
) -> None:
    torch.manual_seed(seed)
    tensors = [torch.randn(shape).to(dtype) + 0.1 for shape in shapes]
    if odd == "transposed":
        tensors = [t.transpose(0, -1) for t in tensors]
    if odd == "gaps":
        tensors = [torch.stack([t, t], -1)[..., 0] for t in tensors]
    lane = Lane(lambda: [("weights", t) for t in tensors], lambda: True)
    lane.keep()
    assert lane.touched() is None
    tensors[seed % len(tensors)].mul_(1.1)
    touched = lane.touched()
    assert touched is not None
    assert 0 < float(touched) <= 0.11


# ── our own rollback ──────────────────────────────────────────────────────────────────────────────────────────────
def saved(controls: TorchControls, folder: Path) -> Path:
    folder.mkdir()
    controls.save(folder)
    return folder


@pytest.mark.parametrize("replay_data", [True, False])
def test_our_own_rollback_trips_nothing(tmp_path: Path, *, replay_data: bool) -> None:
    run = Run("AdamW")
    for step in range(12):
        run.step()
        if step == 5:
            folder = saved(run.controls, tmp_path / "kept")
    before = run.weight.clone()
    run.controls.signals()
    run.controls.restore(folder, replay_data=replay_data)
    assert not torch.equal(run.weight, before)
    assert [run.controls.signals()[name] for name in TOUCHED] == [0.0, 0.0, 0.0]
    run.step()
    assert [run.controls.signals()[name] for name in TOUCHED] == [0.0, 0.0, 0.0]
    scaled(run)
    assert run.controls.signals()["weights_touched"] > 0


def test_a_restore_that_fails_trips_nothing(tmp_path: Path) -> None:
    run = Run("AdamW")
    run.step()
    with pytest.raises(gw.CheckpointError):
        run.controls.restore(tmp_path)
    assert [run.controls.signals()[name] for name in TOUCHED] == [0.0, 0.0, 0.0]


# ── data that is not replayed ─────────────────────────────────────────────────────────────────────────────────────
def controls_of(training: Training, **options: Any) -> TorchControls:
    return TorchControls(
        model=training.model, optimizer=training.optimizer, scheduler=training.scheduler, scaler=training.scaler,
        **options,
    )  # fmt: skip


def test_without_replay_the_data_goes_on_and_all_else_comes_back(tmp_path: Path) -> None:
    training = Training(1, scaled=True)
    controls = controls_of(
        training, state={"accumulator": training.accumulator}, data={"sampler": training.sampler}, tripwires=True
    )
    for _ in range(5):
        training.step()
    folder, then = saved(controls, tmp_path / "kept"), training.snapshot()
    for _ in range(5):
        training.step()
    now = training.snapshot()
    controls.restore(folder, replay_data=False)
    passing = {"sampler", "python", "numpy", "torch"}
    after = training.snapshot()
    for name, value in after.items():
        assert not differences(value, now[name] if name in passing else then[name], name)
        assert differences(then[name], now[name]) or name == "accumulator", "they had moved"
    controls.restore(folder)
    assert not differences(training.snapshot(), then)


def test_a_restore_without_replay_that_fails_leaves_everything_as_it_was(tmp_path: Path) -> None:
    training = Training(1)

    def refuse(_: object) -> None:
        raise RuntimeError("I would rather not")

    controls = controls_of(training, state={"stubborn": (lambda: 1, refuse)}, data={"sampler": training.sampler})
    folder = saved(controls, tmp_path / "kept")
    training.step()
    before = training.snapshot()
    with pytest.raises(gw.CheckpointError, match="stubborn refused its state"):
        controls.restore(folder, replay_data=False)
    assert not differences(training.snapshot(), before)


def test_data_may_have_been_handed_over_as_state_before(tmp_path: Path) -> None:
    training = Training(1)
    folder = saved(controls_of(training, state={"sampler": training.sampler}), tmp_path / "kept")
    expected = training.sampler.get_state()
    training.step()
    controls_of(training, data={"sampler": training.sampler}).restore(folder)
    assert torch.equal(training.sampler.get_state(), expected)


@pytest.mark.parametrize(
    ("handed", "said"),
    [
        ({"data": {"rng.torch": torch.Generator()}}, "data: the name 'rng.torch' is taken"),
        ({"data": {"scheduler": torch.Generator()}}, "data: the name 'scheduler' is taken"),
        ({"data": {"a": torch.Generator()}, "state": {"a": torch.Generator()}}, "data: the name 'a' is taken"),
        ({"state": {"knobs": torch.Generator()}}, "state: the name 'knobs' is taken"),
        ({"data": [torch.Generator()]}, "data must be a dict"),
        ({"data": {"loader": object()}}, "loader is a object"),
    ],
)
def test_data_is_refused_by_the_same_rules_as_state(handed: dict[str, Any], said: str) -> None:
    training = Training(1)
    with pytest.raises(gw.ConfigurationError, match=said):
        gw.attach(model=training.model, optimizer=training.optimizer, scheduler=training.scheduler, **handed)


# ── the settings come back ────────────────────────────────────────────────────────────────────────────────────────
def turned(training: Training) -> dict[str, Any]:
    return {"kl_coef": gw.attr(training.config, "beta"), "clip_epsilon": gw.attr(training.config, "epsilon")}


@pytest.mark.parametrize("held", [False, True])
def test_a_setting_that_was_overwritten_comes_back_as_it_was_at_the_checkpoint(tmp_path: Path, *, held: bool) -> None:
    training = Training(1)
    controls = controls_of(training, knobs=turned(training))
    knob = controls.knobs["kl_coef"]
    training.config.beta = 0.3
    if held:
        knob.hold(0.5)
    with knob.lifted():
        folder = saved(controls, tmp_path / "kept")
    training.config.beta *= 100
    training.config.epsilon = math.nan
    controls.restore(folder)
    assert knob.check() is None
    assert (training.config.beta, training.config.epsilon) == (0.5 if held else 0.3, 0.2)
    knob.release()
    assert training.config.beta == 0.3


def test_a_checkpoint_without_settings_is_restored_and_leaves_them(tmp_path: Path) -> None:
    """As one of an earlier version, or of a run in which nothing was to be turned."""
    training = Training(1)
    without, with_knobs = controls_of(training), controls_of(training, knobs=turned(training))
    old, new = saved(without, tmp_path / "old"), saved(with_knobs, tmp_path / "new")
    training.config.beta = 0.7
    with_knobs.restore(old)
    assert training.config.beta == 0.7
    without.restore(new)
    assert training.config.beta == 0.7
    controls_of(training, knobs={"kl_coef": gw.attr(training.config, "beta")}).restore(new)
    assert (training.config.beta, training.config.epsilon) == (0.1, 0.2)


@pytest.fixture
def attach() -> Iterator[Callable[..., gw.Watchdog]]:
    yield from attaching()


def test_a_rollback_brings_the_settings_back_under_the_dose(tmp_path: Path, attach: Callable[..., gw.Watchdog]) -> None:
    training = Training(1)
    handed = {"model": training.model, "optimizer": training.optimizer, "run_dir": tmp_path}
    dog = attach(**handed, **turned(training), probation=2, checkpoint_every=100, recover_after=3)
    for step in range(6):
        training.step()
        dog.observe(step, {"log_ratio": 0.0})
    training.config.epsilon *= 100
    training.step()
    assert dog.observe(6, {"log_ratio": 25.0}).rolled_back_to == 0
    assert (training.config.beta, training.config.epsilon) == (2.0, 0.2)
