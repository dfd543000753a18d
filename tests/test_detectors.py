"""The kinds of rule, each through `observe`: what fires, what is left when, what it is blind to."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import grpo_watchdog as gw
from grpo_watchdog.rulebook import from_json

NAN, INF = math.nan, math.inf
TEXT = {"en": "x", "zh": "某"}


def book(**rule: Any) -> gw.Rulebook:
    """A rulebook of one rule."""
    whole = {"title": TEXT, "source": "tests", **rule}
    if rule["kind"] not in ("band", "saturation"):
        whole.setdefault("severity", "warning")
    base = {"learning_rate": 1e-5, "kl_coef": 0.1, "clip_epsilon": 0.2}
    return from_json(
        {"schema": 1, "name": "one", "title": TEXT, "source": "tests", "base": base, "rules": {"rule": whole}}
    )


def ranks(rules: gw.Rulebook, rows: Sequence[Mapping[str, float | None]]) -> list[int]:
    """The rank of the rule after each row."""
    dog = gw.Watchdog(rules)
    seen = []
    for step, row in enumerate(rows):
        verdict = dog.observe(step, row)
        assert not [n for n in verdict.notices if "failed" in n]
        seen.append(max((f.rank for f in verdict.findings), default=0))
    return seen


def notes(rules: gw.Rulebook, row: Mapping[str, float]) -> str:
    return " ".join(f.note for f in gw.Watchdog(rules).observe(0, row).findings)


def blind(rules: gw.Rulebook, rows: Sequence[Mapping[str, float | None]]) -> bool:
    dog = gw.Watchdog(rules)
    for step, row in enumerate(rows):
        dog.observe(step, row)
    return bool(dog.blind())


# ── band ──────────────────────────────────────────────────────────────────────────────────────────────────────────
BANDS = [{"from": 5, "severity": "warning"}, {"from": 10, "severity": "warning"}, {"above": 20, "severity": "critical"}]


def band(**fields: Any) -> gw.Rulebook:
    return book(**{"kind": "band", "metric": "log_ratio", "absolute": True, "bands": BANDS, **fields})


def logs(values: Sequence[float]) -> list[dict[str, float]]:
    return [{"log_ratio": value} for value in values]


def test_a_band_is_left_below_a_fraction_of_its_edge_and_only_after_some_observations() -> None:
    rules = band(leave=0.8, keep_firing_for=3)
    assert ranks(rules, logs([6, 4.5, 4.1, 4.0, 4.5, 4.2, 4.9])) == [1] * 7  # not below 4: never left
    assert ranks(rules, logs([6, 3.9, 3.9, 3.9, 3.9])) == [1, 1, 1, 0, 0]
    assert ranks(rules, logs([6, 3.9, 3.9, 4.5, 3.9, 3.9, 3.9])) == [1, 1, 1, 1, 1, 1, 0]  # consecutive ones
    assert ranks(rules, logs([4.9, 4.9])) == [0, 0]  # a fraction of the edge enters nothing


def test_levels_are_left_one_by_one_and_entered_at_once() -> None:
    rules = band(leave=0.8, keep_firing_for=2)
    assert ranks(rules, logs([6, 12, 25])) == [1, 2, 3]
    assert ranks(rules, logs([25, 17, 17, 17])) == [3, 3, 3, 3]  # above 16
    assert ranks(rules, logs([25, 12, 12, 12])) == [3, 3, 2, 2]
    assert ranks(rules, logs([25, 0, 0, 0])) == [3, 3, 0, 0]
    assert ranks(rules, logs([25, 12, 0, 12, 0, 0])) == [3, 3, 2, 2, 2, 0]


def test_each_level_waits_for_its_own_observations() -> None:
    assert ranks(band(**{"for": 2}), logs([6, 25, 6, 25, 25])) == [0, 1, 1, 1, 3]


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("absolute", [True, False])
def test_non_finite_is_the_last_band_whatever_the_sign(value: float, absolute: bool) -> None:  # noqa: FBT001
    assert ranks(band(absolute=absolute), logs([value])) == [3]


def test_the_sign_counts_where_it_is_not_ignored() -> None:
    assert ranks(band(absolute=False), logs([-6, -1e300, 6])) == [0, 0, 1]
    below = [{"from": -2, "severity": "notice"}, {"above": 0, "severity": "warning"}]
    assert ranks(band(absolute=False, bands=below), logs([-2.5, -2, -0.0, 1e-300])) == [0, 1, 1, 2]


@given(st.lists(st.floats(-30, 30), max_size=40))
def test_the_quick_way_and_the_long_way_agree(values: list[float]) -> None:
    rules = band(leave=0.8, keep_firing_for=2)
    held, below = 0, [0, 0, 0]
    expected = []
    for value in values:
        size = abs(value)
        reached = (size >= 5) + (size >= 10) + (size > 20)
        sticky = sum(size >= 0.8 * edge or size > edge for edge in (5.0, 10.0, 20.0))
        sticky = max(sticky, reached)
        held = max(held, reached)
        below = [below[i] + 1 if sticky <= i else 0 for i in range(3)]
        while held and below[held - 1] >= 2:
            held -= 1
        expected.append(held)
    assert ranks(rules, logs(values)) == expected


# ── outside, near ─────────────────────────────────────────────────────────────────────────────────────────────────
def test_outside_may_have_one_end() -> None:
    only_high = book(kind="outside", metric="kl", high=3, keep_firing_for=1)
    assert ranks(only_high, [{"kl": v} for v in (3.0, 3.1, -1e300, -INF, NAN)]) == [0, 1, 0, 0, 1]
    only_low = book(kind="outside", metric="kl", low=3, keep_firing_for=1)
    assert ranks(only_low, [{"kl": v} for v in (3.0, 2.9, INF, NAN)]) == [0, 1, 0, 1]


def test_near_includes_its_distance_and_never_not_a_number() -> None:
    near = book(kind="near", metric="kl", value=1.0, within=0.5, keep_firing_for=1)
    assert ranks(near, [{"kl": v} for v in (0.5, 1.5, 1.51, 0.49, NAN, INF)]) == [1, 1, 0, 0, 0, 0]


# ── nonfinite ─────────────────────────────────────────────────────────────────────────────────────────────────────
NONFINITE = book(kind="nonfinite", metrics=["loss", "kl"], keep_firing_for=1)


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=2, max_size=2))
def test_huge_finite_values_are_silent_however_they_add_up(values: list[float]) -> None:
    assert ranks(NONFINITE, [dict(zip(["loss", "kl"], values, strict=True))]) == [0]
    assert ranks(NONFINITE, [{"loss": 1.7e308, "kl": 1.7e308, "entropy": values[0]}]) == [0]


@pytest.mark.parametrize(("row", "rank"), [
    ({"loss": NAN}, 1), ({"loss": 1.0, "kl": -INF}, 1), ({"loss": INF, "kl": -INF}, 1),
    ({"loss": 1.0, "entropy": NAN}, 0), ({"kl": 1.0}, 0),
])  # fmt: skip
def test_any_one_of_the_named_metrics_is_enough_and_no_other(row: dict[str, float], rank: int) -> None:
    assert ranks(NONFINITE, [row]) == [rank]


# ── collapse ──────────────────────────────────────────────────────────────────────────────────────────────────────
COLLAPSE = book(
    kind="collapse", keep_firing_for=2,
    signs=[{"metric": "zero_std_fraction", "at_least": 0.99}, {"metric": "std_reward", "at_most": 1e-6}], **{"for": 3},
)  # fmt: skip


def test_a_collapse_needs_a_window_without_a_gap() -> None:
    flat, graded = {"std_reward": 0.0}, {"std_reward": 0.2}
    assert ranks(COLLAPSE, [flat, flat, flat]) == [0, 0, 1]
    assert ranks(COLLAPSE, [flat, flat, graded, flat, flat, flat]) == [0, 0, 0, 0, 0, 1]
    assert ranks(COLLAPSE, [flat, flat, {}, flat]) == [0, 0, 0, 1]  # absent is not healthy
    assert ranks(COLLAPSE, [flat] * 3 + [graded, flat, graded, graded]) == [0, 0, 1, 1, 1, 1, 0]
    assert ranks(COLLAPSE, [{"zero_std_fraction": 1.0, "std_reward": 0.2}] * 3) == [0, 0, 1]


def test_not_a_number_is_no_sign_of_anything() -> None:
    flat, lost = {"std_reward": 0.0}, {"std_reward": NAN}
    assert ranks(COLLAPSE, [lost] * 9) == [0] * 9
    assert ranks(COLLAPSE, [flat] * 3 + [lost] * 9) == [0, 0] + [1] * 10  # it does not end there either
    assert blind(COLLAPSE, [lost] * 30)
    assert ranks(COLLAPSE, [{"std_reward": 0.0, "zero_std_fraction": NAN}] * 3) == [0, 0, 1]


# ── saturation ────────────────────────────────────────────────────────────────────────────────────────────────────
SATURATION = book(kind="saturation", log_clamps=[10, 20], ratio_clamps=[1e-4, 1e4], keep_firing_for=1)
IMAGES = [math.exp(10), math.exp(-10), math.exp(20), math.exp(-20), 1e4, 1e-4]


@pytest.mark.parametrize("image", IMAGES)
def test_a_clamp_is_known_to_one_float32_ulp_on_both_sides(image: float) -> None:
    exact = np.float32(image)
    for ratio in (image, exact, np.nextafter(exact, np.float32(0)), np.nextafter(exact, np.float32(INF))):
        assert ranks(SATURATION, [{"mean_ratio": float(ratio)}]) == [2]
    for off in (1 - 1e-4, 1 + 1e-4):
        assert ranks(SATURATION, [{"mean_ratio": image * off}]) == [0]


def test_the_incidents_ratio_is_the_clamp_at_20() -> None:
    assert ranks(SATURATION, [{"mean_ratio": 485165216.0}]) == [2]
    assert "exp(20)" in notes(SATURATION, {"mean_ratio": 485165216.0})


def test_a_clamp_near_one_is_found_too() -> None:
    tight = book(kind="saturation", log_clamps=[0.2], ratio_clamps=[2.0], keep_firing_for=1)
    assert ranks(tight, [{"mean_ratio": v} for v in (math.exp(0.2), math.exp(-0.2), 2.0, 1.0, 1.2)]) == [2, 2, 2, 0, 0]


@given(st.lists(st.floats(-30, 30), min_size=1, max_size=50), st.floats(0.0, 1e-7))
def test_true_means_never_break_jensen(log_ratios: list[float], error: float) -> None:
    ratio = sum(map(math.exp, log_ratios)) / len(log_ratios) * (1 - error)
    row = {"mean_ratio": ratio, "log_ratio": sum(log_ratios) / len(log_ratios)}
    assert ranks(SATURATION, [row])[0] in (0, 2)


@pytest.mark.parametrize(("ratio", "log_ratio", "rank"), [
    (1.0234, 1.67, 1), (1.0, 0.01, 1), (1.0, 0.0009, 0), (1.0, -5.0, 0), (5e8, 197562.0, 1), (NAN, 1.0, 0),
    (INF, 800.0, 0), (0.0, -800.0, 0), (-1.0, 0.0, 0), (3.0, NAN, 0), (3.0, INF, 0), (3.0, None, 0),
])  # fmt: skip
def test_jensen_is_broken_only_by_what_breaks_it(ratio: float, log_ratio: float | None, rank: int) -> None:
    assert ranks(SATURATION, [{"mean_ratio": ratio, "log_ratio": log_ratio}]) == [rank]


def test_a_ratio_that_is_no_number_leaves_it_blind() -> None:
    assert blind(SATURATION, [{"mean_ratio": NAN}] * 20)
    clamp = {"mean_ratio": 1e4}
    assert ranks(SATURATION, [clamp, *[{"mean_ratio": NAN}] * 9]) == [2] * 10


# ── the weight of the KL term ─────────────────────────────────────────────────────────────────────────────────────
def losses(betas: Sequence[float], *, announce: bool = False, seed: int = 0) -> list[dict[str, float]]:
    """Rows of a run whose loss is computed in float32, one beta a step."""
    rng = np.random.default_rng(seed)
    rows = []
    for beta in betas:
        policy, kl = np.float32(rng.normal()), np.float32(rng.uniform(0.5, 2))
        row = {"loss": policy + np.float32(beta) * kl, "policy_loss": policy, "kl_penalty": kl}
        rows.append({k: float(v) for k, v in row.items()} | ({"kl_coef": beta} if announce else {}))
    return rows


WEIGHT = book(kind="loss_weight", settle=8, change=0.2, keep_firing_for=4, **{"for": 3})


def test_an_unannounced_change_is_noticed_after_its_observations_and_ends_when_it_is_taken_back() -> None:
    assert ranks(WEIGHT, losses([0.1] * 20 + [0.3] * 10)) == [0] * 22 + [1] * 8
    assert ranks(WEIGHT, losses([0.1] * 20 + [0.3] * 100))[-1] == 1  # the baseline freezes while it fires
    assert ranks(WEIGHT, losses([0.1] * 20 + [0.3] * 5 + [0.1] * 5))[-1] == 0
    assert ranks(WEIGHT, losses([0.1] * 20 + [0.11] * 30)) == [0] * 50  # too small a change to say


def test_an_announced_change_is_silent() -> None:
    assert ranks(WEIGHT, losses([0.1] * 20 + [0.5] * 30 + [1.0] * 30, announce=True)) == [0] * 80
    assert ranks(WEIGHT, losses(np.linspace(0.1, 2, 60).tolist(), announce=True)) == [0] * 60


def test_a_coefficient_that_is_logged_now_and_then_is_no_change() -> None:
    rows = losses([0.1] * 20 + [0.3] * 10)
    for row in rows[::5]:
        row["kl_coef"] = 0.1
    assert ranks(WEIGHT, rows)[-1] == 1


def test_the_inferred_coefficient_is_the_runs_own_to_float32() -> None:
    dog = gw.Watchdog(WEIGHT)
    for step, row in enumerate(losses([0.1] * 10 + [0.3] * 5)):
        verdict = dog.observe(step, row)
    (found,) = verdict.findings
    assert found.value == pytest.approx(0.3, rel=1e-5)
    assert found.limit == pytest.approx(0.1, rel=1e-5)
    assert "nobody announced it" in found.note


def test_it_is_blind_where_the_identity_does_not_hold() -> None:
    rng = np.random.default_rng(0)
    rows = [
        dict(zip(["loss", "policy_loss", "kl_penalty"], rng.normal(size=3).tolist(), strict=True)) for _ in range(80)
    ]
    assert ranks(WEIGHT, rows) == [0] * 80
    assert blind(WEIGHT, rows)
    assert blind(WEIGHT, [{"loss": 1e9 + i, "policy_loss": 1e9 + i, "kl_penalty": 1e-3} for i in range(80)])
    assert blind(WEIGHT, [{"loss": 0.1 * i, "policy_loss": 0.1 * i, "kl_penalty": 0.0} for i in range(80)])
    assert not blind(WEIGHT, losses([0.1] * 30))


@pytest.mark.parametrize("bad", [NAN, INF, -INF, 1e308, 5e-324, 0.0])
@pytest.mark.parametrize("metric", ["loss", "policy_loss", "kl_penalty"])
def test_nothing_odd_enters_the_baseline(metric: str, bad: float) -> None:
    rows = losses([0.1] * 40)
    for at in (2, 5, 6, 15):
        rows[at][metric] = bad
    dog = gw.Watchdog(WEIGHT)
    for step, row in enumerate(rows):
        verdict = dog.observe(step, row)
    assert verdict.findings == ()
    state = json.dumps(dog.state_dict())
    assert '"usual": 0.1' in state or '"usual": 0.09999' in state
    assert "NaN" not in state.split('"detector"')[1].split("}")[0]


@given(st.lists(st.fixed_dictionaries({}, optional={
    name: st.floats() for name in ("loss", "policy_loss", "kl_penalty", "kl_coef")
}), max_size=40))  # fmt: skip
def test_the_weight_survives_anything(rows: list[dict[str, float]]) -> None:
    ranks(WEIGHT, rows)


def test_a_step_on_which_it_cannot_tell_neither_starts_nor_ends_anything() -> None:
    rows = losses([0.1] * 20 + [0.3] * 5)
    nothing = {"loss": NAN, "policy_loss": 0.0, "kl_penalty": 1.0}
    assert ranks(WEIGHT, [*rows, *[nothing] * 30])[-1] == 1
