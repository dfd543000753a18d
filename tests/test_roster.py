"""Sleeping rules: nothing that is found, or remembered, depends on who slept."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import grpo_watchdog as gw
from grpo_watchdog.detectors.detector import CALM
from grpo_watchdog.detectors.history import History
from grpo_watchdog.detectors.sleep import NAP
from grpo_watchdog.findings import Findings
from grpo_watchdog.metrics import METRICS, Intake, Step
from grpo_watchdog.watch import Watch

GUARDED = gw.load("guarded")
Row = dict[str, float]


def healthy(rng: random.Random) -> Row:
    policy, kl, log_ratio = rng.gauss(0, 0.02), abs(rng.gauss(0.02, 0.005)), rng.gauss(0, 1e-3)
    return {
        "loss": policy + 0.04 * kl, "policy_loss": policy, "kl": kl, "kl_coef": 0.04, "learning_rate": 1e-6,
        "mean_reward": rng.gauss(0.5, 0.05), "std_reward": rng.uniform(0.2, 0.3), "mean_advantage": 0.0,
        "zero_std_fraction": rng.choice([0.0, 0.125, 0.25]), "entropy": rng.gauss(0.6, 0.02),
        "grad_norm": rng.lognormvariate(-1, 0.2), "log_ratio": log_ratio, "mean_ratio": math.exp(log_ratio),
        "step_kl": rng.lognormvariate(-8, 0.3), "sampler_mismatch": rng.lognormvariate(-6, 0.1),
        "completion_length": rng.gauss(300, 20), "truncated_fraction": rng.uniform(0, 0.05),
        "mean_log_prob_current": rng.gauss(-25, 0.5),
    }  # fmt: skip


FAULTS: list[Callable[[float], float]] = [
    lambda _: math.nan, lambda _: math.inf, lambda _: -math.inf, lambda _: 0.0, lambda _: 1.0, lambda _: 1e301,
    lambda value: -value, lambda value: 30 * value, lambda value: 0.01 * value, lambda value: value + 0.3,
    lambda value: value - 20,
]  # fmt: skip


def stream(seed: int, count: int) -> list[Row]:
    """Healthy steps in which some metrics go wrong, or go missing, for a while."""
    rng = random.Random(seed)
    rows = [healthy(rng) for _ in range(count)]
    for _ in range(rng.randrange(8)):
        name, first, length = rng.choice(sorted(rows[0])), rng.randrange(count), rng.choice([1, 2, 5, 12, 40])
        fault = rng.choice([*FAULTS, None])
        for row in rows[first : first + length]:
            if fault is None:
                row.pop(name, None)
            elif name in row:
                row[name] = fault(row[name])
    if seed % 3 == 0:  # and the metrics do not always come in the same order
        rows = [dict(sorted(row.items(), key=lambda _: rng.random())) for row in rows]
    return rows


def as_text(state: object) -> str:
    return json.dumps(state, sort_keys=True)


@pytest.mark.parametrize("seed", range(12))
def test_a_rule_that_slept_knows_what_one_that_looked_at_every_step_knows(seed: int) -> None:
    findings = Findings(GUARDED)
    awake = {name: Watch(name, rule) for name, rule in GUARDED.rules.items()}
    for number, row in enumerate(stream(seed, 330)):
        fires = {finding.rule for finding in findings.detect(Step(number, row))}
        for watch in awake.values():
            watch.update(row, number)
        assert fires == {name for name, watch in awake.items() if watch.finding is not None}
        if number % 41 == 0 or number == 329:
            slept = findings.state_dict()["watches"]
            for name, watch in awake.items():
                assert as_text(slept[name]) == as_text(watch.state_dict()), (name, number)


@pytest.mark.parametrize("seed", range(4))
def test_to_look_at_the_state_changes_nothing(seed: int) -> None:
    seen, unseen = gw.Watchdog("guarded"), gw.Watchdog("guarded")
    rng = random.Random(seed)
    for number, row in enumerate(stream(100 + seed, 250)):
        assert repr(seen.observe(number, row)) == repr(unseen.observe(number, row))
        if rng.random() < 0.3:
            seen.state_dict()
            seen.blind()
    assert as_text(seen.state_dict()) == as_text(unseen.state_dict())


def test_a_run_goes_on_from_a_state_that_was_taken_while_rules_slept() -> None:
    through, rows = gw.Watchdog("guarded"), stream(7, 300)
    for number, row in enumerate(rows[:155]):
        through.observe(number, row)
    later = gw.Watchdog("guarded")
    later.load_state_dict(json.loads(as_text(through.state_dict())))
    for number, row in enumerate(rows[155:], start=155):
        assert repr(later.observe(number, row)) == repr(through.observe(number, row))
    assert as_text(later.state_dict()) == as_text(through.state_dict())


def test_a_value_that_wakes_is_seen_on_its_own_step() -> None:
    for late in range(60, 80):  # wherever in a nap it falls
        findings, rng = Findings(GUARDED), random.Random(late)
        for number in range(late):
            before = findings.detect(Step(number, healthy(rng)))
        assert "gradient_surge" not in {finding.rule for finding in before}
        after = findings.detect(Step(late, {**healthy(rng), "grad_norm": 50.0}))
        (surge,) = [finding for finding in after if finding.rule == "gradient_surge"]
        assert surge.step == surge.since == late


def test_a_metric_that_stays_away_is_missed_while_its_rule_sleeps() -> None:
    findings, rng = Findings(GUARDED), random.Random(0)
    for number in range(60):
        findings.detect(Step(number, healthy(rng)))
    assert "gradient_surge" not in {blind.rule for blind in findings.blind()}
    for number in range(60, 73):
        findings.detect(Step(number, {name: v for name, v in healthy(rng).items() if name != "grad_norm"}))
    (blind,) = [blind for blind in findings.blind() if blind.rule == "gradient_surge"]
    assert blind.reason == "not given for 13 observations"


# ── what lets them sleep ──────────────────────────────────────────────────────────────────────────────────────────
values = st.floats(-1e6, 1e6)


@given(st.lists(values, min_size=1, max_size=60), st.integers(1, 40), st.lists(values, min_size=1, max_size=12))
def test_the_median_stays_between_its_bounds_whatever_comes(past: list[float], size: int, coming: list[float]) -> None:
    kept = History(size)
    kept.extend(past)
    bounds = kept.between(len(coming))
    assert (bounds is None) == (min(len(past), size) < 2 * len(coming) + 1)
    if bounds is not None:
        for value in coming:
            kept.add(value)
            assert bounds[0] <= kept.median() <= bounds[1]


@given(st.lists(values, max_size=30), st.lists(values, max_size=30), st.integers(1, 20))
def test_values_added_together_are_values_added_one_by_one(first: list[float], second: list[float], size: int) -> None:
    together, one_by_one = History(size), History(size)
    for kept in (together, one_by_one):
        for value in first:
            kept.add(value)
    together.extend(second)
    for value in second:
        one_by_one.add(value)
    assert together.state_dict() == one_by_one.state_dict()
    if len(together):
        assert together.median() == one_by_one.median()
        assert together.deviation() == one_by_one.deviation()


SLEEPERS = sorted(name for name, rule in GUARDED.rules.items() if Watch(name, rule).sleeper is not None)


@pytest.mark.parametrize("name", SLEEPERS)
@settings(max_examples=8)
@given(
    rng=st.randoms(use_true_random=False),
    level=st.sampled_from([-1.0, 0.0, 0.3, 5.0]),
    noise=st.sampled_from([0.0, 0.1, 1.0]),
)
def test_nothing_comes_of_values_within_the_intervals_of_a_sleeper(
    name: str, rng: random.Random, level: float, noise: float
) -> None:
    """The contract of detectors/sleep.py, with values at the very ends of what it allows."""
    looks, slept = Watch(name, GUARDED.rules[name]), Watch(name, GUARDED.rules[name])
    assert looks.sleeper is not None
    assert slept.sleeper is not None
    given = [*looks.detector.needs, "std_reward"]
    for _ in range(8):
        for _ in range(rng.randrange(1, 12)):
            row = {metric: level + noise * rng.gauss(0, 1) for metric in given}
            looks.detector.read(row, firing=False)
        slept.detector.load_state_dict(json.loads(as_text(looks.detector.state_dict())))
        intervals = looks.sleeper.sleep()
        if intervals is None or any(low > high for low, high in intervals):
            continue  # it stays awake
        columns = looks.sleeper.columns(given)
        rows = [dict(zip(columns, (within(rng, low, high) for low, high in intervals), strict=False))
                for _ in range(rng.randrange(1, NAP + 1))]  # fmt: skip
        assert [looks.detector.read(row, firing=False) for row in rows] == [CALM] * len(rows)
        slept.sleeper.catch_up([tuple(row[column] for row in rows) for column in columns])
        assert as_text(slept.detector.state_dict()) == as_text(looks.detector.state_dict())


def within(rng: random.Random, low: float, high: float) -> float:
    near = min(max(low, -20.0), high), max(min(high, 20.0), low)
    return rng.choice([low, high, *near, rng.uniform(*near), rng.uniform(*near)])


# ── the intake's short way ────────────────────────────────────────────────────────────────────────────────────────
numbers = st.floats(allow_nan=False)


@settings(max_examples=50)
@given(st.dictionaries(st.sampled_from(sorted(METRICS)), numbers, max_size=8), st.sampled_from([None, 16]))
def test_a_step_of_plain_floats_is_taken_as_any_other_mapping_is(row: Row, dims: int | None) -> None:
    class Other(dict[str, Any]):
        """A mapping that is no plain dict goes the long way."""

    short, notices = Intake("reference", dims).read(3, row)
    assert (short, notices) == Intake("reference", dims).read(3, Other(row))
    assert short.values is not row
