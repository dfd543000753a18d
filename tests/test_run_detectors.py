"""The kinds that hold a run against its own past: what makes them fire, what they take for healthy, what they keep."""

import json
import math
import statistics
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from grpo_watchdog.detectors import KINDS, Detector, Reading, detector
from grpo_watchdog.detectors.history import History
from grpo_watchdog.errors import RulebookError
from grpo_watchdog.rule import Rule
from grpo_watchdog.rulebook import from_json
from grpo_watchdog.watch import Watch

NAN, INF = math.nan, math.inf
TEXT = {"en": "x", "zh": "某"}
Rows = Sequence[Mapping[str, float]]
seeds = st.integers(0, 2**32 - 1)
odd = st.sampled_from([NAN, INF, -INF])


def rule(**fields: Any) -> Rule:
    """A rule as a rulebook would hold it."""
    whole = {"title": TEXT, "source": "tests", **fields}
    if fields["kind"] not in ("band", "saturation"):
        whole["severity"] = "warning"
    base = {"learning_rate": 1e-5, "kl_coef": 0.1, "clip_epsilon": 0.2}
    page = {"schema": 1, "name": "one", "title": TEXT, "source": "tests", "base": base, "rules": {"rule": whole}}
    return from_json(page).rules["rule"]


def make(**fields: Any) -> Detector:
    return detector(rule(**fields))


def fed(what: Detector, rows: Rows) -> list[Reading | None]:
    """The reading after each row; told that it fires after it did."""
    seen: list[Reading | None] = []
    firing = False
    for row in rows:
        seen.append(what.read(row, firing=firing))
        firing = bool(seen[-1] and seen[-1].rank)
    return seen


def ranks(what: Detector, rows: Rows) -> list[int | None]:
    return [None if reading is None else reading.rank for reading in fed(what, rows)]


def column(metric: str, values: Iterable[float]) -> list[dict[str, float]]:
    return [{metric: float(value)} for value in values]


def normal(seed: int, count: int) -> list[float]:
    return list(np.random.default_rng(seed).standard_normal(count).tolist())


# ── history ───────────────────────────────────────────────────────────────────────────────────────────────────────
@given(st.lists(st.floats(-1e6, 1e6) | odd, max_size=60), st.integers(1, 12))
def test_a_history_is_the_last_finite_values(values: list[float], size: int) -> None:
    kept = History(size)
    finite: list[float] = []
    for value in values:
        kept.add(value)
        finite += [value] if math.isfinite(value) else []
        assert list(kept.values) == finite[-size:]
        assert len(kept) == len(finite[-size:])
        if finite:
            assert kept.median() == statistics.median(finite[-size:])


def robust(values: Sequence[float]) -> float:
    """1.4826 times the (upper) median distance from the median."""
    middle = statistics.median(values)
    return 1.4826 * statistics.median_high([abs(value - middle) for value in values])


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60), st.integers(1, 20))
def test_the_deviation_is_one_taken_at_most_eight_values_ago(values: list[float], size: int) -> None:
    kept, recent = History(size), list[float]()
    for count, value in enumerate(values, start=1):
        kept.add(value)
        recent = [*recent[-8:], robust(values[max(0, count - size) : count])]
        assert kept.deviation() in recent


# ── surge ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def surge(**fields: Any) -> Detector:
    return make(**{"kind": "surge", "metric": "grad_norm", "by": 3, "sigmas": 6, **fields})


def norms(seed: int, count: int, spread: float = 0.2) -> list[float]:
    return [math.exp(spread * x) for x in normal(seed, count)]


def test_a_surge_is_a_factor_beyond_the_runs_own_level() -> None:
    for seed in range(20):
        assert not any(ranks(surge(), column("grad_norm", norms(seed, 300))))
        (*_, last) = fed(surge(), column("grad_norm", [*norms(seed, 40), 10.0]))
        assert last is not None
        assert last.rank == 1
        assert float(last.note.split()[-1]) == pytest.approx(1.0, abs=0.2)  # the note tells the level


def test_a_surge_looks_in_one_direction_only() -> None:
    calm = norms(0, 40)
    for direction, place in (("up", (1, 0)), ("down", (0, 1))):
        assert [ranks(surge(direction=direction), column("grad_norm", [*calm, x]))[-1] for x in (10, 0.1)] == [*place]


def test_a_surge_on_the_linear_scale_is_a_difference() -> None:
    rewards = [0.5 + 0.01 * x for x in normal(0, 40)]
    linear = {"metric": "mean_reward", "scale": "linear", "by": 0.2}
    assert [ranks(surge(**linear), column("mean_reward", [*rewards, 0.5 + by]))[-1] for by in (0.15, 0.3, -0.3)] == [
        0,
        1,
        0,
    ]
    below = [x - 0.5 for x in rewards]  # about 0: no logarithm, and none is needed
    assert ranks(surge(**linear), column("mean_reward", [*below, 0.3]))[-1] == 1


def test_noise_and_floor_raise_what_counts() -> None:
    wide = norms(1, 60, spread=1.0)
    assert ranks(surge(), column("grad_norm", [*wide, 10.0]))[-1] == 0  # 2.3 deviations
    assert ranks(surge(sigmas=0), column("grad_norm", [*wide, 10.0]))[-1] == 1
    tiny = [1e-6 * x for x in norms(2, 40)]
    assert [ranks(surge(floor=0.01), column("grad_norm", [*tiny, x]))[-1] for x in (0.009, 0.011)] == [0, 1]


def test_nothing_is_said_before_it_has_settled() -> None:
    for settle in (3, 8):
        steps = column("grad_norm", [1.0] * settle + [10.0])
        assert ranks(surge(settle=settle), steps)[-1] == 1
        assert ranks(surge(settle=settle), steps[1:])[-1] == 0


def test_the_level_stands_still_while_the_value_is_out_and_is_given_up_after_some_time() -> None:
    out = ranks(surge(accept_after=20), column("grad_norm", [1.0] * 40 + [10.0] * 60))
    assert out == [0] * 40 + [1] * 20 + [0] * 40
    back = ranks(surge(accept_after=20), column("grad_norm", [1.0] * 40 + [10.0] * 19 + [1.0, 10.0]))
    assert back[40:] == [1] * 19 + [0, 1]  # it did not become the level, and the count starts anew
    again = ranks(surge(accept_after=20), column("grad_norm", [1.0] * 40 + [10.0] * 60 + [100.0]))
    assert again[-1] == 1  # what was accepted is the level


def test_a_factor_of_1_and_a_window_that_never_settles_are_refused() -> None:
    for fields in ({"by": 1.0}, {"settle": 40}, {"by": 0.5}):
        with pytest.raises(RulebookError):
            surge(**fields)


@given(seeds, st.integers(-100, 100))
@settings(max_examples=40)
def test_the_unit_of_a_surge_does_not_matter(seed: int, power: int) -> None:
    values = [*norms(seed, 60, 0.5), *(5 * x for x in norms(seed + 1, 20)), *norms(seed, 20)]
    scaled = [math.ldexp(x, power) for x in values]
    assert ranks(surge(), column("grad_norm", scaled)) == ranks(surge(), column("grad_norm", values))


# ── moved ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def moved(**fields: Any) -> Detector:
    return make(**{"kind": "moved", "metrics": ["learning_rate_set", "learning_rate"], "direction": "up", **fields})


STEPS = 300
Schedule = Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]
SCHEDULES: dict[str, Schedule] = {
    "constant": lambda o: lr_scheduler.LambdaLR(o, lambda _: 1.0),
    "linear decay": lambda o: lr_scheduler.LinearLR(o, 1.0, 0.0, STEPS),
    "linear warm-up": lambda o: lr_scheduler.LinearLR(o, 1e-3, 1.0, 30),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 100),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 1e-4, total_steps=STEPS + 1),
    "warm restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 50, T_mult=2),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.98),
    "step": lambda o: lr_scheduler.StepLR(o, 40, 0.1),
    "steps": lambda o: lr_scheduler.MultiStepLR(o, [30, 90], 0.2),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 1e-6, 1e-4, step_size_up=20, cycle_momentum=False),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, STEPS, power=2.0),
    "warm-up from 0": lambda o: lr_scheduler.LambdaLR(o, lambda n: min(n / 40, 1.0)),
    "warm-up from 0 in ten steps, cosine": lambda o: lr_scheduler.LambdaLR(
        o, lambda n: n / 10 if n < 10 else 0.5 * (1 + math.cos(math.pi * n / STEPS))
    ),
    "warm-up from 0, inverse root": lambda o: lr_scheduler.LambdaLR(
        o, lambda n: min(n / 100, (100 / max(n, 1)) ** 0.5)
    ),
}


def schedule(name: str) -> list[float]:
    """The rates that a torch schedule gives over 300 steps."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-5)
    seen = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some schedules deprecate their own arguments from within
        rates = SCHEDULES[name](optimizer)
        for _ in range(STEPS):
            seen.append(float(optimizer.param_groups[0]["lr"]))
            optimizer.step()
            rates.step()
    return seen


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_schedule_moves_and_a_factor_of_3_beyond_its_most_does(name: str) -> None:
    rates = schedule(name)
    assert not any(ranks(moved(), column("learning_rate", rates)))
    for at in np.random.default_rng(len(name)).integers(10, STEPS, 5):
        touched = [*rates[:at], 3 * max(rates[:at])]
        assert ranks(moved(), column("learning_rate", touched)) == [0] * at + [1]


def test_a_schedule_that_jumps_is_taken_for_moved() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-5)
    rates, seen = lr_scheduler.ConstantLR(optimizer, factor=1 / 3, total_iters=50), []
    for _ in range(100):
        seen.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        rates.step()
    assert ranks(moved(), column("learning_rate", seen)) == [0] * 50 + [1] * 50  # why guarded asks for a witness


def test_down_is_below_the_least_so_far() -> None:
    coefficients = [0.1, 0.08, 0.12] * 10
    down = {"direction": "down", "factor": 3, "metrics": ["kl_coef"]}
    assert [ranks(moved(**down), column("kl_coef", [*coefficients, x]))[-1] for x in (0.03, 0.02, 1.0)] == [0, 1, 0]


def test_the_first_name_that_is_there_is_looked_at() -> None:
    both = [{"learning_rate_set": 1e-5, "learning_rate": 1e-6}] * 20
    lifted = {"learning_rate_set": 1e-5, "learning_rate": 1e-5}  # our own ceiling is let go: the setting did not move
    assert not any(ranks(moved(), [*both, lifted]))
    assert ranks(moved(), [*both, {**lifted, "learning_rate_set": 1e-4}])[-1] == 1


def test_a_setting_has_to_settle_and_is_accepted_in_the_end() -> None:
    assert ranks(moved(settle=8), column("learning_rate", [1.0] * 7 + [9.0])) == [0] * 8
    assert ranks(moved(settle=8), column("learning_rate", [1.0] * 8 + [9.0]))[-1] == 1
    seen = ranks(moved(accept_after=30), column("learning_rate", [1.0] * 20 + [9.0] * 50 + [27.0]))
    assert seen == [0] * 20 + [1] * 30 + [0] * 20 + [1]
    healed = ranks(moved(accept_after=30), column("learning_rate", [1.0] * 20 + [9.0] * 29 + [1.0] + [9.0] * 30))
    assert healed == [0] * 20 + [1] * 29 + [0] + [1] * 30


# ── jointly ───────────────────────────────────────────────────────────────────────────────────────────────────────
SIGNS = [{"metric": "zero_std_fraction", "at_least": 0.99}, {"metric": "std_reward", "at_most": 1e-5}]


@pytest.mark.parametrize(("share", "spread", "rank"), [
    (1.0, 0.0, 1), (0.99, 1e-5, 1), (0.98, 0.0, 0), (1.0, 0.1, 0), (0.1, 0.1, 0), (NAN, 0.0, 0), (1.0, NAN, 0),
    (INF, -INF, 1),
])  # fmt: skip
def test_all_signs_are_shown_at_once_or_none_counts(share: float, spread: float, rank: int) -> None:
    row = {"zero_std_fraction": share, "std_reward": spread}
    for firing in (False, True):
        reading = make(kind="jointly", signs=SIGNS).read(row, firing=firing)
        assert reading is not None
        assert reading.rank == rank


def test_a_missing_sign_starts_and_ends_nothing() -> None:
    watch = Watch("rule", rule(kind="jointly", signs=SIGNS, keep_firing_for=1))
    held = []
    for row in ({"zero_std_fraction": 1.0}, {"zero_std_fraction": 1.0, "std_reward": 0.0}, {"std_reward": 0.3}, {}):
        watch.update(row, 0)
        held.append(watch.held)
    assert held == [0, 1, 1, 1]


# ── fall ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def fall(**fields: Any) -> Detector:
    return make(
        **{"kind": "fall", "metric": "mean_reward", "window": 3, "share": 0.2, "sigmas": 5, "settle": 16, **fields}
    )


SLOW = {"window": 10, "share": 0.5, "sigmas": 6, "settle": 30}


def flat_rewards(seed: int) -> list[float]:
    return [0.5 + 0.05 * x for x in normal(seed, STEPS)]


def rising_rewards(seed: int) -> list[float]:
    return [0.2 + 0.6 * (1 - math.exp(-n / 100)) + 0.05 * x for n, x in enumerate(normal(seed, STEPS))]


def rare_rewards(seed: int) -> list[float]:
    """One success among the 64 samples of a batch, on every fifth batch or so: most differences are 0."""
    return list((np.random.default_rng(seed).binomial(64, 0.2 / 64, STEPS) / 64).tolist())


@pytest.mark.parametrize("rewards", [flat_rewards, rising_rewards, rare_rewards])
def test_noise_is_no_fall(rewards: Callable[[int], list[float]]) -> None:
    # Over 1000 other seeds, streams of 300 steps with any false alarm, quick and slow: flat 0.7 % and 0.1 %, rising and
    # rare none. Noise that is correlated from one batch to the next is not healthy to it: see the next test.
    quick = sum(any(ranks(fall(), column("mean_reward", rewards(seed)))) for seed in range(40))
    slow = sum(any(ranks(fall(**SLOW), column("mean_reward", rewards(seed)))) for seed in range(40))
    assert quick <= 2
    assert slow == 0


def test_noise_that_lasts_is_seldom_taken_for_a_fall() -> None:
    """Neighbouring differences tell too little of it: means that do not overlap tell more."""
    wandering = []
    for seed in range(20):
        rewards = normal(seed, STEPS)
        for n in range(1, STEPS):
            rewards[n] += 0.7 * rewards[n - 1]
        wandering.append(any(ranks(fall(), column("mean_reward", rewards))))
    assert sum(wandering) <= 4


@pytest.mark.parametrize("fields", [{}, SLOW])
def test_a_collapse_is_a_fall_and_points_before_it_began(fields: dict[str, Any]) -> None:
    for seed in range(20):
        healthy = rising_rewards(seed)
        healthy = [x for n, x in enumerate(healthy) if n < 200]
        broken = [0.2 + 0.05 * x for x in normal(seed + 1000, 20)]
        seen = fed(fall(**fields), column("mean_reward", [*healthy, *broken]))
        at = next(n for n, r in enumerate(seen) if r is not None and r.rank)
        reading = seen[at]
        assert reading is not None
        assert 200 <= at < 215
        assert at - reading.back < 200  # the newest observation that was still well
        assert reading.back < 40
        assert reading.note.startswith(f"the mean of {fields.get('window', 3)} was 0.")


def test_a_fall_is_not_forgotten_while_it_lasts_and_ends_with_the_recovery() -> None:
    well, ill = [0.8 + 0.02 * x for x in normal(0, 60)], [0.2 + 0.02 * x for x in normal(1, 200)]
    start = [0.1 + 0.01 * n for n in range(60)]
    seen = ranks(fall(), column("mean_reward", [*start, *well, *ill, *well]))
    assert seen[123:320] == [1] * 197
    assert not any(seen[323:])


def test_the_spread_of_a_batch_is_a_gain_that_counts() -> None:
    values = [0.5, 0.52] * 20 + [0.35] * 5
    assert any(ranks(fall(sigmas=0.1), column("mean_reward", values)))
    wide = [{"mean_reward": x, "std_reward": 2.0} for x in values]
    assert not any(ranks(fall(sigmas=0.1), wide))
    lost = [{"mean_reward": x, "std_reward": NAN} for x in values]
    assert ranks(fall(sigmas=0.1), lost) == ranks(fall(sigmas=0.1), column("mean_reward", values))


def test_rewards_that_were_all_alike_may_fall_too() -> None:
    assert any(ranks(fall(), column("mean_reward", [1.0] * 100 + [0.5] * 5)))


@given(seeds, st.integers(-60, 60), st.floats(-3, 3))
@settings(max_examples=40)
def test_the_unit_and_the_zero_of_a_reward_do_not_matter(seed: int, power: int, shift: float) -> None:
    values = [*rising_rewards(seed)[:100], *(0.3 + 0.1 * x for x in normal(seed, 30)), *rising_rewards(seed)[:60]]
    plain = ranks(fall(), column("mean_reward", values))
    assert ranks(fall(), column("mean_reward", [math.ldexp(x, power) for x in values])) == plain
    moved_by = ranks(fall(), column("mean_reward", [x + shift for x in values]))
    assert sum(a != b for a, b in zip(plain, moved_by, strict=True)) <= 1  # a sum rounds: one may lie on the edge


# ── flat ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def flat(**fields: Any) -> Detector:
    return make(**{"kind": "flat", "scope": "batch", **fields})


def batches(probabilities: Sequence[float], seed: int = 0, groups: int = 16, size: int = 8) -> list[dict[str, float]]:
    """Batches of 0/1 rewards, of tasks as hard as given, some a bit easier than others."""
    rng = np.random.default_rng(seed)
    rows = []
    for p in probabilities:
        odds = np.clip(p + 0.1 * rng.standard_normal((groups, 1)) * (0 < p < 1), 0, 1)
        rewards = (rng.random((groups, size)) < odds).astype(float)
        share = float((rewards.std(axis=1) == 0).mean())
        rows.append(
            {"zero_std_fraction": share, "std_reward": float(rewards.std()), "mean_reward": float(rewards.mean())}
        )
    return rows


def constant(reward: float, count: int = 5) -> list[dict[str, float]]:
    return [{"zero_std_fraction": 1.0, "std_reward": 0.0, "mean_reward": reward}] * count


@pytest.mark.parametrize("scope", ["batch", "group"])
@pytest.mark.parametrize("steps", [10, 40, 200])
def test_a_task_that_is_being_solved_is_not_flat(scope: str, steps: int) -> None:
    for seed in range(20):
        rows = batches([*[0.4] * 30, *np.linspace(0.4, 1.0, steps), *[1.0] * 30], seed)
        assert not any(ranks(flat(scope=scope), rows))


@pytest.mark.parametrize("reward", [0.0, 0.2, 1.0, -1.0])
def test_a_service_that_hands_out_one_number_is_flat_until_differences_are_back(reward: float) -> None:
    for seed in range(20):
        seen = ranks(flat(), [*batches([0.4] * 30, seed), *constant(reward), *batches([0.4] * 5, seed)])
        assert seen == [0] * 30 + [0, 0, 0, 1, 1] + [0] * 5  # three in a row are not yet beyond chance, after 30


def test_one_number_just_above_the_runs_best_passes_for_solved() -> None:
    rows = batches([0.4] * 30)
    best = max(row["mean_reward"] for row in rows[-8:])
    assert not any(ranks(flat(), [*rows, *constant(best + 0.01)]))  # what a task that is solved looks like, too
    assert any(ranks(flat(), [*rows, *constant(best - 0.01)]))
    assert any(ranks(flat(), [*rows, *constant(best + 0.5)]))


def test_equal_samples_within_different_groups_are_flat_by_group_only() -> None:
    rng = np.random.default_rng(0)
    copies = []
    for _ in range(5):
        rewards = (rng.random(16) < 0.5).astype(float)
        copies.append({"zero_std_fraction": 1.0, "std_reward": float(rewards.std()), "mean_reward": rewards.mean()})
    rows = [*batches([0.5] * 30), *copies]
    assert ranks(flat(scope="group"), rows) == [0] * 30 + [0, 0, 0, 1, 1]
    assert ranks(flat(), rows) == [0] * 35


def test_what_was_always_flat_is_not_news() -> None:
    assert not any(ranks(flat(), constant(0.0, 100)))
    mostly = batches([0.02] * 60, seed=1)  # too hard: most groups have no success at all
    assert statistics.median(row["zero_std_fraction"] for row in mostly) > 0.5
    assert not any(ranks(flat(), [*mostly, *constant(0.0)]))
    assert not any(ranks(flat(window=8), [*batches([0.4] * 7), *constant(0.0, 20)]))  # too few to tell
    assert any(ranks(flat(window=8), [*batches([0.4] * 8), *constant(0.0, 20)]))


@pytest.mark.parametrize(("groups", "size"), [(1, 4), (2, 4), (2, 8), (4, 8)])
@pytest.mark.parametrize("scope", ["batch", "group"])
def test_small_batches_that_are_flat_by_chance_are_no_trouble(scope: str, groups: int, size: int) -> None:
    rng = np.random.default_rng(groups * size)
    rows = []
    for _ in range(4000):
        hardness = rng.beta(0.5, 0.5, (groups, 1))
        rewards = (rng.random((groups, size)) < hardness).astype(float)
        equal = float((rewards.std(axis=1) == 0).mean())
        rows.append({"zero_std_fraction": equal, "std_reward": rewards.std(), "mean_reward": rewards.mean()})
    assert not any(ranks(flat(scope=scope), rows))


# ── loss identity ─────────────────────────────────────────────────────────────────────────────────────────────────
def losses(
    count: int, *, seed: int = 0, noise: float = 0.0, extra: float = 0.0, name: str = "kl"
) -> list[dict[str, float]]:
    """Rows of loss = policy_loss + 0.1 * KL + what nobody announced."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        policy, kl = rng.normal(scale=0.3), rng.uniform(0.2, 1.0)
        loss = policy + 0.1 * kl + noise * rng.normal() + extra
        rows.append({"loss": loss, "policy_loss": policy, name: kl, "kl_coef": 0.1})
    return rows


def identity(**fields: Any) -> Detector:
    return make(**{"kind": "loss_identity", **fields})


@pytest.mark.parametrize("name", ["kl", "kl_penalty"])
@pytest.mark.parametrize("extra", [0.8, -0.8])
def test_a_term_that_nobody_announced_breaks_the_identity(name: str, extra: float) -> None:
    rows = [*losses(40, name=name), *losses(5, seed=1, extra=extra, name=name), *losses(5, seed=2, name=name)]
    assert ranks(identity(), rows) == [None] * 8 + [0] * 32 + [1] * 5 + [0] * 5


def test_a_further_term_that_was_always_there_is_part_of_the_loss() -> None:
    rows = losses(200, extra=-0.3, noise=0.01)
    assert not any(ranks(identity(), rows))
    assert ranks(identity(), [*rows, *losses(1, extra=-2.0)])[-1] == 1


def test_an_announced_coefficient_breaks_nothing() -> None:
    rows = losses(40)
    for row in losses(40, seed=1):
        row |= {"kl_coef": 1.0, "loss": row["policy_loss"] + row["kl"]}
        rows.append(row)
    assert not any(ranks(identity(), rows))


def test_it_is_blind_where_the_loss_is_no_such_sum() -> None:
    rng = np.random.default_rng(0)
    names = ("loss", "policy_loss", "kl", "kl_coef")
    rows = [dict(zip(names, rng.normal(size=4).tolist(), strict=True)) for _ in range(80)]
    assert set(ranks(identity(), rows)) == {None}
    assert set(ranks(identity(), [{"loss": 1.0, "policy_loss": 1.0, "kl_coef": 0.1}] * 40)) == {None}  # no KL at all


def test_of_two_kls_the_one_that_the_loss_is_built_from_decides() -> None:
    rng = np.random.default_rng(3)
    rows = [{**row, "kl_penalty": float(rng.normal(scale=30))} for row in losses(60)]
    assert not any(ranks(identity(), rows))
    broken = {**rows[-1], "loss": rows[-1]["loss"] + 2}
    assert ranks(identity(), [*rows, broken])[-1] == 1


def test_what_stays_is_the_runs_own_in_the_end() -> None:
    rows = [*losses(40), *losses(60, seed=1, extra=0.8), *losses(1, seed=2, extra=3)]
    seen = ranks(identity(accept_after=20), rows)
    assert seen[40:60] == [1] * 20
    assert 1 not in seen[60:100]
    assert seen[100] == 1


# ── all of them ───────────────────────────────────────────────────────────────────────────────────────────────────
RULES: dict[str, dict[str, Any]] = {
    "band": {"metric": "kl", "bands": [{"from": 1, "severity": "warning"}]},
    "outside": {"metric": "kl", "high": 1},
    "near": {"metric": "kl", "value": 1, "within": 0.5},
    "nonfinite": {"metrics": ["kl", "loss"]},
    "collapse": {"signs": SIGNS},
    "saturation": {"log_clamps": [10], "ratio_clamps": [1e4]},
    "loss_weight": {},
    "surge": {"metric": "kl", "by": 1.5, "sigmas": 2, "accept_after": 4},
    "moved": {"metrics": ["learning_rate"], "direction": "up", "accept_after": 4},
    "jointly": {"signs": SIGNS},
    "fall": {"metric": "mean_reward", "sigmas": 0.5, "window": 4},
    "flat": {"scope": "batch"},
    "loss_identity": {"accept_after": 4, "sigmas": 2, "share": 0.2},
    "trend": {"metric": "kl", "reaches": 5, "within": 50, "window": 16},
    "drift": {"metric": "kl", "window": 60, "min_history": 30},
}
PAST = ("surge", "moved", "fall", "flat", "loss_identity")


@cache
def rule_of(kind: str) -> Rule:
    return rule(kind=kind, **RULES[kind])


def of_kind(kind: str) -> Detector:
    return detector(rule_of(kind))


def eventful(seed: int) -> list[dict[str, float]]:
    """150 rows on which every one of the rules above has something to look at, some of it no number."""
    rng = np.random.default_rng(seed)
    rows = []
    for n in range(150):
        policy, kl = rng.normal(scale=0.3), math.exp(0.3 * rng.normal() + 0.05 * max(0, n - 110))
        solved = 90 <= n < 95 or n > 140
        row = {
            "policy_loss": policy, "kl": kl, "kl_penalty": kl, "kl_coef": 0.1, "learning_rate": 3.0 ** (n // 60),
            "loss": policy + 0.1 * kl + (2.0 if n % 50 > 40 else 0), "mean_ratio": math.exp(0.1 * rng.normal()),
            "zero_std_fraction": 1.0 if solved else 0.2, "std_reward": 0.0 if solved else 0.3,
            "mean_reward": 0.0 if solved else 0.1 if n > 75 else 0.5 + 0.1 * rng.normal(),
        }  # fmt: skip
        if rng.random() < 0.05:
            row[str(rng.choice(list(row)))] = float(rng.choice([NAN, INF, -INF, 0.0, 1e308]))
        rows.append(row)
    return rows


OF_LOGS = {"crash", "first", "gain", "shrunk", "still"}  # theirs are in test_log_detectors.py


def test_every_kind_has_a_rule_here() -> None:
    assert set(RULES) | OF_LOGS == set(KINDS)


@pytest.mark.parametrize("kind", RULES)
@given(seed=seeds, cut=st.integers(0, 150))
@settings(max_examples=12)
def test_a_restart_in_the_middle_changes_nothing(kind: str, seed: int, cut: int) -> None:
    rows = eventful(seed)
    through, before, after = of_kind(kind), of_kind(kind), of_kind(kind)
    fed(through, rows[:cut])
    fed(before, rows[:cut])
    state = before.state_dict()
    kept = json.dumps(state, allow_nan=False)
    after.load_state_dict(json.loads(kept))
    assert repr(fed(through, rows[cut:])) == repr(fed(after, rows[cut:]))  # repr: not-a-number is the same there
    assert through.state_dict() == after.state_dict()
    fed(before, rows)
    assert json.dumps(state, allow_nan=False) == kept  # a copy


@pytest.mark.parametrize("kind", PAST)
def test_the_rows_above_are_eventful(kind: str) -> None:
    seen = ranks(of_kind(kind), eventful(0))
    assert 1 in seen
    assert 0 in seen


@pytest.mark.parametrize("kind", PAST)
@given(seed=seeds, holes=st.lists(st.tuples(st.integers(0, 149), odd), max_size=15))
@settings(max_examples=15)
def test_what_is_no_number_never_enters(kind: str, seed: int, holes: list[tuple[int, float]]) -> None:
    rows = [row for row in eventful(seed) if all(abs(value) < 1e6 for value in row.values())]
    one, other = of_kind(kind), of_kind(kind)
    names = one.needs
    with_holes = list(rows)
    for place, hole in sorted(holes, reverse=True):
        with_holes.insert(place, {**rows[0], **dict.fromkeys(names, hole)})
    seen = [
        reading for row, reading in zip(with_holes, fed(other, with_holes), strict=True)
        if math.isfinite(row[one.needs[0]])
    ]  # fmt: skip
    assert [r and r.rank for r in seen] == [r and r.rank for r in fed(one, rows)]
    assert one.state_dict() == other.state_dict()


@pytest.mark.parametrize("kind", PAST)
@given(rows=st.lists(st.floats(), min_size=30, max_size=60), wild=st.data())
@settings(max_examples=20)
def test_no_number_is_too_wild(kind: str, rows: list[float], wild: st.DataObject) -> None:
    what = of_kind(kind)
    huge = wild.draw(st.sampled_from([1.7976931348623157e308, -1.7976931348623157e308, 5e-324, 0.0]))
    for value in rows + [huge] * 20:
        what.read(dict.fromkeys([*what.needs, "kl", "std_reward"], value), firing=True)
