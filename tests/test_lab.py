"""The lab: its trainings learn, its faults are real, and what is said to cure them does."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import grpo_watchdog as gw
from grpo_watchdog.integrations.torch_codec import encode
from grpo_watchdog.integrations.torch_state import part
from grpo_watchdog.lab.faults import FAULTS, LOOKALIKES, Fault, Injection
from grpo_watchdog.lab.injection import Lookalike
from grpo_watchdog.lab.training import TASKS, GrpoTraining
from grpo_watchdog.metrics import METRICS

ONSET = 4  # early, and late enough for Adam to have moments
HAPPENINGS: list[Fault | Lookalike] = [*FAULTS.values(), *LOOKALIKES.values()]
EVENTS = [(task, event) for event in HAPPENINGS for task in sorted(event.tasks)]
FAULTY = [(task, fault) for fault in FAULTS.values() for task in sorted(fault.tasks)]


def named(value: object) -> str:
    """The id of a test's parameter."""
    return value.name if isinstance(value, Fault | Lookalike) else str(value)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trained(training: GrpoTraining, steps: int, before: Callable[[int], object] = abs) -> list[Any]:
    """Train, and return the metrics of each step as floats."""
    rows = []
    for step in range(steps):
        before(step)
        rows.append({name: float(value) for name, value in training.train_one_step().items()})
    return rows


def struck(task: str, event: Fault | Lookalike, severity: float, steps: int) -> tuple[list[Any], GrpoTraining]:
    """Train with an event from ONSET on."""
    training = TASKS[task](0)
    injection = Injection(event, severity, ONSET)
    return trained(training, steps, lambda step: injection.before_step(training, step)), training


def weights(training: GrpoTraining) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in training.policy.parameters()])


def everything(training: GrpoTraining) -> str:
    """All that a fault may touch, the weights and moments of the policy and the data left out, in words."""
    state = training.state_dict()
    groups = [{k: v for k, v in group.items() if k != "params"} for group in training.optimizer.param_groups]
    rest = (vars(training.config), groups, state["reference"], state["sampler"], sorted(training.interference))
    flags = (training.lr_factor, training.numeric, training.reference_frozen, training.restarted_at)
    hooks = [len(p._backward_hooks or ()) for p in training.policy.parameters()]  # noqa: SLF001
    return repr((rest, flags, hooks, sorted(training.set_aside), training.scheduler.base_lrs))


# --- the trainings ------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_a_task_learns_early(task: str) -> None:
    training = TASKS[task](0)
    start = training.true_reward(1024)
    trained(training, 60)
    assert 0.2 < start < 0.3
    assert training.true_reward(1024) > 1.4 * start


@pytest.mark.slow
@pytest.mark.parametrize(("task", "plateau"), [("reference", 0.42), ("chain", 0.9), ("tokens", 0.88)])
def test_a_whole_run_ends_high_on_every_seed(task: str, plateau: float) -> None:
    for seed in range(4):
        training = TASKS[task](seed)
        assert training.task == task
        trained(training, training.steps)
        assert training.true_reward() > plateau


@pytest.mark.parametrize("task", TASKS)
def test_a_run_is_the_same_bit_for_bit_and_uses_no_global_randomness(task: str) -> None:
    torch.manual_seed(1)
    one, first = TASKS[task](3), torch.get_rng_state()
    rows = trained(one, 5)
    assert torch.equal(first, torch.get_rng_state())
    torch.manual_seed(2)
    two = TASKS[task](3)
    assert trained(two, 5) == rows
    assert torch.equal(weights(one), weights(two))
    assert not torch.equal(weights(one), weights(TASKS[task](4)))


@pytest.mark.parametrize("task", TASKS)
def test_the_evaluation_leaves_the_training_alone(task: str) -> None:
    one, two = TASKS[task](0), TASKS[task](0)
    trained(one, 3)
    trained(two, 3, lambda _: two.true_reward(64))
    assert torch.equal(weights(one), weights(two))


@pytest.mark.parametrize("task", TASKS)
def test_metrics_are_canonical_and_the_loss_is_what_it_says(task: str) -> None:
    training = TASKS[task](0)
    for row in trained(training, 5):
        assert set(row) <= set(METRICS)
        assert all(math.isfinite(value) for value in row.values())
        kl = row["kl_penalty"] if training.ratio_to == "reference" else row["kl"]
        bonus = training.config.entropy_coef * row.get("entropy", 0.0)
        assert row["loss"] == pytest.approx(row["policy_loss"] + row["kl_coef"] * kl - bonus, abs=1e-12)
        if training.ratio_to == "old":
            assert row["log_ratio"] == 0.0
            assert row["sampler_mismatch"] < 1e-5
            assert row["step_kl"] > 0.0
            assert 0.0 < row["ess"] <= 1.0


def test_what_a_metric_of_the_real_counterpart_does_not_log_is_not_logged() -> None:
    names = {task: set(trained(TASKS[task](0), 1)[0]) for task in TASKS}
    assert not names["reference"] & {"step_kl", "ess", "entropy", "sampler_mismatch"}
    assert names["tokens"] - names["chain"] == {"entropy", "completion_length", "truncated_fraction"}


@pytest.mark.parametrize("task", TASKS)
def test_state_comes_back_whole(task: str) -> None:
    training = TASKS[task](0)
    trained(training, 2)
    training.sampler.spread = 1.5
    training.sampler.go_stale()
    encode(training.state_dict(), "training")  # refuses what cannot be stored
    state = training.state_dict()
    rows = trained(training, 3)
    training.sampler.follow()
    training.sampler.spread = 1.0
    training.load_state_dict(state)
    assert trained(training, 3) == rows


def test_handed_over_state_can_be_attached(tmp_path: Path) -> None:
    training = TASKS["tokens"](0)
    with training.attach(tmp_path / "run", rules="documented", checkpoint_every=2) as dog:
        watched = [dog.observe(step, training.train_one_step()).level for step in range(4)]
    unwatched = TASKS["tokens"](0)
    trained(unwatched, 4)
    assert len(watched) == 4
    assert torch.equal(weights(training), weights(unwatched))
    assert isinstance(dog, gw.Watchdog)


# --- faults and look-alikes ---------------------------------------------------------------------


def test_every_fault_says_what_it_is() -> None:
    for name, fault in FAULTS.items():
        assert (name, bool(fault.causes)) == (fault.name, True)
        assert fault.severities
        assert fault.test_severities
        assert fault.tasks <= set(TASKS)
        if len(fault.severities) > 1:
            assert not set(fault.severities) & set(fault.test_severities)


@pytest.mark.parametrize(("task", "fault"), FAULTY, ids=named)
def test_a_fault_of_any_size_changes_the_training_from_its_onset_on(task: str, fault: Fault) -> None:
    healthy = TASKS[task](0)
    well = trained(healthy, ONSET + 2)
    for severity in {*fault.severities, *fault.test_severities}:
        ill, training = struck(task, fault, severity, ONSET + 2)
        assert ill[:ONSET] == well[:ONSET]
        assert not torch.equal(weights(training), weights(healthy))


@pytest.mark.parametrize(("task", "event"), EVENTS, ids=named)
def test_the_end_puts_everything_back_but_the_weights(task: str, event: Fault | Lookalike) -> None:
    training = TASKS[task](0)
    trained(training, 2)
    before = everything(training)
    event.end(training)  # nothing to end yet
    assert everything(training) == before
    if event.name == "warm_restart":
        return  # a warm-up ends by itself
    event.begin(training, event.severities[-1] if isinstance(event, Fault) else 1.0)
    event.end(training)
    if event.name not in ("lr_up", "lr_spike"):
        assert everything(training) == before
    assert training.lr_factor == 1.0
    assert training.optimizer.param_groups[0]["lr"] == pytest.approx(training.scheduler.get_last_lr()[0])


@pytest.mark.parametrize(("task", "event"), [e for e in EVENTS if e[1].lasts is not None], ids=named)
def test_what_ends_by_itself_ends_in_time(task: str, event: Fault | Lookalike) -> None:
    assert event.lasts is not None
    training = TASKS[task](0)
    training.train_one_step()
    before = everything(training)
    injection = Injection(event, event.severities[0] if isinstance(event, Fault) else 1.0, 1)
    for step in range(1, event.lasts + 1):
        injection.before_step(training, step)
    if event.name not in ("lr_spike", "weights_corrupted", "weights_flipped", "moments_corrupted"):
        assert everything(training) != before
    injection.before_step(training, event.lasts + 1)
    assert training.optimizer.param_groups[0]["lr"] == pytest.approx(training.scheduler.get_last_lr()[0])
    if event.name != "lr_spike":  # whose factor is taken out by a division
        assert everything(training) == before


@pytest.mark.parametrize(("task", "event"), [f for f in FAULTY if f[1].lives_in == "process"], ids=named)
def test_what_is_handed_over_cures_what_lives_in_the_process(task: str, event: Fault) -> None:
    training, healthy = TASKS[task](0), TASKS[task](0)
    trained(training, 3)
    trained(healthy, 3)
    saved = handed_over(training)
    event.begin(training, event.severities[-1])
    trained(training, 2)
    for state, put in saved:
        put(state)
    assert trained(training, 3) == trained(healthy, 3)


def handed_over(training: GrpoTraining) -> list[tuple[Any, Callable[[Any], object]]]:
    """A copy of each state that a watchdog would save, with what puts it back."""
    owned = [training.policy, training.optimizer, training.scheduler, training.stream]
    parts = [part(str(i), owner) for i, owner in enumerate([*owned, *training.handed_over().values()])]
    return [(copy.deepcopy(p.get()), p.put) for p in parts]


def test_a_rollback_does_not_cure_a_learning_rate_that_sits_in_the_schedule() -> None:
    training = TASKS["chain"](0)
    trained(training, 2)
    saved = handed_over(training)
    FAULTS["lr_up"].begin(training, 10.0)
    trained(training, 1)
    for state, put in saved:
        put(state)
    trained(training, 1)
    healthy = TASKS["chain"](0)
    trained(healthy, 3)
    assert training.optimizer.param_groups[0]["lr"] == pytest.approx(10.0 * healthy.optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("task", ["chain", "tokens"])
def test_a_wrong_sampler_shows_in_the_mismatch(task: str) -> None:
    for name in ("sampler_temperature", "stale_sampler"):
        rows, _ = struck(task, FAULTS[name], FAULTS[name].severities[-1], ONSET + 4)
        assert rows[-1]["sampler_mismatch"] > 10.0 * rows[0]["sampler_mismatch"]


@pytest.mark.parametrize("task", TASKS)
def test_no_fault_of_the_service_or_the_sampler_shows_in_the_true_reward(task: str) -> None:
    training = TASKS[task](0)
    reward = training.true_reward(256)
    for name in ("reward_constant", "reward_hack", "sampler_temperature", "identical_samples", "low_precision"):
        FAULTS[name].begin(training, FAULTS[name].severities[0])
    assert training.true_reward(256) == reward


@pytest.mark.parametrize("task", TASKS)
def test_a_policy_of_nan_is_worth_nothing_and_trains_on(task: str) -> None:
    _, training = struck(task, FAULTS["nan_reward"], 1.0, ONSET + 3)
    assert bool(weights(training).isnan().all())
    assert training.true_reward(64) == 0.0


@pytest.mark.parametrize("task", TASKS)
def test_identical_samples_are_identical(task: str) -> None:
    rows, _ = struck(task, FAULTS["identical_samples"], 1.0, ONSET + 1)
    assert rows[-1]["zero_std_fraction"] == 1.0
    assert rows[0]["zero_std_fraction"] < 0.5


@pytest.mark.parametrize("task", TASKS)
def test_a_resume_changes_nothing(task: str) -> None:
    rows, _ = struck(task, LOOKALIKES["resume"], 1.0, ONSET + 3)
    assert rows == trained(TASKS[task](0), ONSET + 3)


def test_a_warm_restart_warms_up_again_and_goes_on() -> None:
    _, training = struck("chain", LOOKALIKES["warm_restart"], 1.0, ONSET + 1)
    config, rates = training.config, training.scheduler.get_last_lr()
    assert rates[0] == pytest.approx(2 * config.learning_rate / config.warmup_steps, rel=0.01)
    trained(training, config.warmup_steps)
    assert training.optimizer.param_groups[0]["lr"] > 0.9 * config.learning_rate


@pytest.mark.slow
@pytest.mark.parametrize("task", sorted(LOOKALIKES["solved"].tasks))
def test_an_easy_run_is_solved_before_its_end(task: str) -> None:
    training = TASKS[task](0)
    injection = Injection(LOOKALIKES["solved"])
    rows = trained(training, 150, lambda step: injection.before_step(training, step))
    assert sum(row["mean_reward"] for row in rows[-10:]) > 9.8
    assert sum(row["zero_std_fraction"] for row in rows[-10:]) > 8.8


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_a_spike_heals_by_itself(task: str) -> None:
    training, healthy = TASKS[task](0), TASKS[task](0)
    injection = Injection(LOOKALIKES["spike"], onset=80)
    trained(training, training.steps, lambda step: injection.before_step(training, step))
    trained(healthy, healthy.steps)
    assert training.true_reward() > 0.93 * healthy.true_reward()
