"""`drift` and `trend`: they warn in time, hold their tongues on noise, and forget nothing over a restart."""

import json
import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import grpo_watchdog as gw
from grpo_watchdog.detectors import Detector, Reading, detector
from grpo_watchdog.detectors.drift import DriftRule
from grpo_watchdog.detectors.trend import TrendRule
from grpo_watchdog.rule import Text
from grpo_watchdog.rulebook import from_json

NAN, INF = math.nan, math.inf
TEXT = {"en": "x", "zh": "某"}
QUICK: dict[str, Any] = {"window": 60, "min_history": 30}
seeds = st.integers(0, 2**32 - 1)


def drift(**fields: Any) -> Detector:
    text = Text(en="x", zh="某")
    return detector(DriftRule(kind="drift", title=text, source="tests", severity="warning", metric="kl", **fields))


def trend(**fields: Any) -> Detector:
    text = Text(en="x", zh="某")
    whole = {"reaches": 5.0, "within": 50, **fields}
    return detector(TrendRule(kind="trend", title=text, source="tests", severity="warning", metric="kl", **whole))


def fed(what: Detector, values: Iterable[float], *, firing: bool = False) -> list[Reading | None]:
    return [what.read({"kl": value}, firing=firing) for value in values]


def ranks(what: Detector, values: Iterable[float], *, firing: bool = False) -> list[int | None]:
    return [None if reading is None else reading.rank for reading in fed(what, values, firing=firing)]


def first(what: Detector, values: Iterable[float]) -> int | None:
    """Where it fires first."""
    return next((n for n, value in enumerate(values) if (r := what.read({"kl": value}, firing=False)) and r.rank), None)


def noise(seed: int, count: int, *, correlation: float = 0.0) -> list[float]:
    drawn = np.random.default_rng(seed).standard_normal(count).tolist()
    for n in range(1, count):
        drawn[n] += correlation * drawn[n - 1]
    return list(drawn)


def shifted(seed: int, by: float, calm: int = 150, after: int = 60) -> list[float]:
    drawn = noise(seed, calm + after)
    return drawn[:calm] + [x + by for x in drawn[calm:]]


def watched(values: Sequence[float | None], **rule: Any) -> list[int]:
    """The rank of a rule of this kind after each observation, through the watchdog."""
    whole = {"title": TEXT, "source": "tests", "severity": "warning", "metric": "kl", **rule}
    base = {"learning_rate": 1e-5, "kl_coef": 0.1, "clip_epsilon": 0.2}
    page = {"schema": 1, "name": "one", "title": TEXT, "source": "tests", "base": base, "rules": {"rule": whole}}
    dog = gw.Watchdog(from_json(page))
    seen = []
    for step, value in enumerate(values):
        verdict = dog.observe(step, {"kl": value})
        assert not [n for n in verdict.notices if "failed" in n]
        seen.append(max((f.rank for f in verdict.findings), default=0))
    return seen


# ── drift: it warns ───────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("correlation", [0.0, 0.5])
@pytest.mark.parametrize("by", [6.0, -6.0])
def test_a_shift_is_seen_within_some_observations(by: float, correlation: float) -> None:
    for seed in range(10):
        calm = noise(seed, 320, correlation=correlation)
        alarm = first(drift(), calm[:300] + [x + by for x in calm[300:]])
        assert alarm is not None
        assert 300 < alarm < 320


def test_only_the_side_that_matters_counts() -> None:
    for direction, sign in (("up", 1), ("down", -1)):
        assert first(drift(direction=direction), shifted(0, 4.0 * sign)) is not None
        assert first(drift(direction=direction), shifted(0, -4.0 * sign)) is None


def test_a_slow_drift_is_seen_too() -> None:
    ramps = ([x + 0.05 * max(0, n - 200) for n, x in enumerate(noise(seed, 300))] for seed in range(10))
    found = [first(drift(), ramp) for ramp in ramps]
    assert all(alarm is not None and alarm > 200 for alarm in found)


def test_it_goes_on_while_the_signal_is_away_and_learns_anew_once_it_is_back() -> None:
    calm = noise(1, 300)
    away = [x + 6 for x in noise(2, 400)]
    seen = watched([*calm, *away, *noise(3, 300)], kind="drift")
    begin, end = seen.index(1), len(seen) - seen[::-1].index(1)
    assert begin < 310
    assert seen[begin:end] == [1] * (end - begin)  # 400 observations do not become the new normal
    assert 700 < end < 760
    again = watched([*calm, *away, *noise(3, 300), *away[:50]], kind="drift")
    assert again[1000:1020].count(1) > 0


def test_it_says_nothing_before_it_knows_the_signal_and_then_says_so() -> None:
    seen = ranks(drift(**QUICK), noise(0, 60))
    assert set(seen[:30]) == {None}
    assert set(seen[45:]) == {0}


# ── drift: it holds its tongue ────────────────────────────────────────────────────────────────────────────────────
def test_healthy_noise_of_several_kinds_hardly_ever_alarms() -> None:
    rng = np.random.default_rng(11)
    kinds = {
        "normal": rng.standard_normal((12, 1000)),
        "heavy": rng.standard_t(3, (12, 1000)),
        "skewed": np.exp(rng.standard_normal((12, 1000))),
        "correlated": np.array([noise(seed, 1000, correlation=0.9) for seed in range(12)]),
        "learning": 1 - np.exp(-np.arange(1000) / 200) + 0.05 * rng.standard_normal((12, 1000)),
    }
    alarmed = [name for name, streams in kinds.items() for stream in streams.tolist() if first(drift(), stream)]
    assert len(alarmed) <= 2, alarmed  # of 60; 1 % is meant


def test_the_mean_time_to_a_false_alarm_is_at_least_what_was_asked_for() -> None:
    arl, lengths = 300, []
    for seed in range(40):
        alarm = first(drift(arl=arl), noise(seed, 4000))
        lengths.append(4000 if alarm is None else alarm)
    assert sum(lengths) / len(lengths) - 100 >= arl


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_a_constant_never_fires(value: float, window: int) -> None:
    assert first(drift(window=20 + window, min_history=20), [value] * 150) is None


@pytest.mark.parametrize("share", [0.01, 0.05, 0.25, 0.5, 0.9])
def test_a_metric_that_takes_few_values_does_not_fire_on_its_ties(share: float) -> None:
    for seed in range(5):
        coins = (np.random.default_rng(seed).random(1500) < share).astype(float).tolist()
        assert first(drift(), coins) is None


def test_a_single_outlier_neither_fires_nor_blinds() -> None:
    values = shifted(4, 5.0, calm=300)
    values[200] = 1e9
    alarm = first(drift(), values)
    assert alarm is not None
    assert 300 < alarm < 315


# ── drift: laws ───────────────────────────────────────────────────────────────────────────────────────────────────
@given(seeds, st.integers(-200, 200), st.floats(-4, 4))
@settings(max_examples=25, deadline=None)
def test_the_unit_of_the_metric_does_not_matter(seed: int, power: int, by: float) -> None:
    values = shifted(seed, by)
    one, other = drift(**QUICK), drift(**QUICK)
    assert ranks(one, values) == ranks(other, [math.ldexp(x, power) for x in values])
    assert [one.state_dict()[side] for side in ("up", "down")] == [other.state_dict()[side] for side in ("up", "down")]


@given(seeds, st.lists(st.tuples(st.integers(0, 209), st.sampled_from([NAN, INF, -INF, 1e200])), max_size=20))
@settings(max_examples=25, deadline=None)
def test_what_is_no_number_never_enters(seed: int, holes: list[tuple[int, float]]) -> None:
    values = shifted(seed, 2.0)
    with_holes = list(values)
    for place, hole in sorted(holes, reverse=True):
        with_holes.insert(place, hole)
    one, other = drift(**QUICK), drift(**QUICK)
    seen = [rank for x, rank in zip(with_holes, ranks(other, with_holes), strict=True) if abs(x) < 1e100]
    assert seen == ranks(one, values)
    assert one.state_dict() == other.state_dict()


@given(seeds, st.integers(0, 209), st.floats(-5, 5))
@settings(max_examples=25, deadline=None)
def test_a_restart_in_the_middle_changes_nothing(seed: int, cut: int, by: float) -> None:
    values = shifted(seed, by)
    through, before, after = drift(**QUICK), drift(**QUICK), drift(**QUICK)
    fed(through, values[:cut])
    fed(before, values[:cut])
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    for firing in (False, True, False):
        assert fed(through, values[cut:], firing=firing) == fed(after, values[cut:], firing=firing)
    assert through.state_dict() == after.state_dict()


def test_a_state_is_a_copy() -> None:
    one = drift(**QUICK)
    fed(one, noise(0, 80))
    state = one.state_dict()
    kept = json.dumps(state)
    fed(one, noise(1, 50))
    assert json.dumps(state) == kept


def test_running_sums_do_not_wear_out() -> None:
    far = [1e6 + x for x in noise(5, 3000)]
    assert first(drift(), far) is None
    assert first(drift(), [*far, *(x + 5 for x in far[:30])]) is not None


def test_more_history_than_window_is_refused() -> None:
    with pytest.raises(ValidationError, match="min_history must be at most window, not 100 and 50"):
        drift(window=50)


# ── trend ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def exponential(growth: float, scatter: float, seed: int, calm: int = 60) -> list[float]:
    """From 0.1 until it reaches 5."""
    rising = math.ceil(math.log(50) / growth)
    logs = [math.log(0.1) + growth * max(0, n - calm) for n in range(calm + rising)]
    return [math.exp(log + scatter * x) for log, x in zip(logs, noise(seed, len(logs)), strict=True)]


@pytest.mark.parametrize(("growth", "scatter"), [(0.02, 0.05), (0.05, 0.2), (0.2, 0.02)])
def test_an_exponential_is_seen_before_it_crosses(growth: float, scatter: float) -> None:
    for seed in range(10):
        values = exponential(growth, scatter, seed)
        alarm = first(trend(), values)
        assert alarm is not None
        assert len(values) - 60 < alarm + 55
        assert len(values) - alarm >= 5


def test_the_note_says_when() -> None:
    values = [0.1 * math.exp(0.05 * n) for n in range(80)]
    warnings = [(n, r) for n, r in enumerate(fed(trend(within=20), values)) if r and r.rank]
    crossing = math.log(50) / 0.05
    assert warnings[0][0] == math.ceil(crossing - 20)
    for n, reading in warnings:
        assert reading.note.endswith(f"5 in about {math.ceil(crossing - n)}")
        assert reading.limit == 5


def test_noise_and_growth_that_is_far_from_the_threshold_are_silent() -> None:
    for seed in range(10):
        assert first(trend(), [math.exp(0.25 * x) for x in noise(seed, 1000)]) is None
    assert first(trend(within=50), [1e-9 * math.exp(0.05 * n) for n in range(200)]) is None
    assert first(trend(), [4.9 * math.exp(-0.05 * n) for n in range(100)]) is None  # it falls
    assert first(trend(), [math.nextafter(5, 0)] * 100) is None  # it stands just below


def test_what_has_crossed_is_another_rules_business() -> None:
    growing = [0.1 * math.exp(0.1 * n) for n in range(80)]
    seen = watched(growing, kind="trend", reaches=5, within=10, keep_firing_for=3)
    crossed = next(n for n, x in enumerate(growing) if x >= 5)
    assert seen[crossed - 1] == 1
    assert seen[crossed : crossed + 4] == [1, 1, 0, 0]


def test_the_sign_is_ignored_only_where_asked() -> None:
    falling = [-0.1 * math.exp(0.05 * n) for n in range(75)]
    assert set(ranks(trend(), falling)) == {None}
    assert first(trend(absolute=True), falling) is not None


def test_a_hole_keeps_its_place_in_time_and_is_no_reading() -> None:
    values = [0.1 * math.exp(0.05 * n) for n in range(75)]
    holes = {50: NAN, 53: INF, 57: 0.0, 60: -1.0}
    seen = ranks(trend(within=20), [holes.get(n, x) for n, x in enumerate(values)])
    assert [seen[n] for n in holes] == [None] * len(holes)
    whole = ranks(trend(within=20), values)
    assert [r for n, r in enumerate(seen) if n not in holes] == [r for n, r in enumerate(whole) if n not in holes]
    assert set(ranks(trend(), [NAN, 1.0] * 100)) == {None}  # half of it is not enough


@given(seeds, st.integers(-100, 100))
@settings(max_examples=20, deadline=None)
def test_the_unit_of_a_trend_does_not_matter(seed: int, power: int) -> None:
    values = exponential(0.05, 0.05, seed)
    scaled = ranks(trend(reaches=math.ldexp(5.0, power)), [math.ldexp(x, power) for x in values])
    changed = [n for n, (a, b) in enumerate(zip(ranks(trend(), values), scaled, strict=True)) if a != b]
    assert len(changed) <= 1  # the logarithm rounds: a crossing may fall on either side of one observation


@given(seeds, st.integers(0, 100))
@settings(max_examples=20, deadline=None)
def test_a_trend_survives_a_restart(seed: int, cut: int) -> None:
    values = [*exponential(0.05, 0.1, seed), NAN, *exponential(0.1, 0.1, seed)]
    through, before, after = trend(), trend(), trend()
    fed(through, values[:cut])
    fed(before, values[:cut])
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert fed(through, values[cut:]) == fed(after, values[cut:])


def test_within_is_monotone() -> None:
    values = exponential(0.03, 0.05, 3)
    alarms = [first(trend(within=within), values) for within in (10, 20, 40, 80)]
    assert all(a is not None and b is not None and a >= b for a, b in pairwise(alarms))
