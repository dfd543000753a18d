"""The kinds made for recorded runs, and the fields that any kind may have: each with the trap that it is there for."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_watchdog.detectors import Detector, Reading, detector
from grpo_watchdog.errors import RulebookError
from grpo_watchdog.findings import Findings
from grpo_watchdog.metrics import Step
from grpo_watchdog.rule import Rule
from grpo_watchdog.rulebook import Rulebook, from_json, load
from grpo_watchdog.watch import Finding, Watch

NAN, INF = math.nan, math.inf
TEXT = {"en": "x", "zh": "某"}
BANDED = ("band", "first", "crash")
Rows = Sequence[Mapping[str, float]]


def page(**rules: Mapping[str, Any]) -> Rulebook:
    whole = {
        name: {
            "title": TEXT, "source": "tests",
            **({} if fields["kind"] in BANDED else {"severity": "warning"}), **fields,
        }
        for name, fields in rules.items()
    }  # fmt: skip
    base = {"learning_rate": 1e-5, "kl_coef": 0.1, "clip_epsilon": 0.2}
    return from_json({"schema": 1, "name": "one", "title": TEXT, "source": "tests", "base": base, "rules": whole})


def rule(**fields: Any) -> Rule:
    return page(rule=fields).rules["rule"]


def fed(what: Detector, rows: Rows) -> list[Reading | None]:
    """The reading after each row; told that it fires after it did."""
    seen: list[Reading | None] = []
    firing = False
    for row in rows:
        seen.append(what.read(row, firing=firing))
        firing = bool(seen[-1] and seen[-1].rank)
    return seen


def ranks(rows: Rows, **fields: Any) -> list[int | None]:
    return [None if reading is None else reading.rank for reading in fed(detector(rule(**fields)), rows)]


def column(metric: str, values: Iterable[float]) -> list[dict[str, float]]:
    return [{metric: value} for value in values]


def told(book: Rulebook, rows: Rows) -> list[dict[str, Finding]]:
    """What fires after each row, by rule."""
    findings = Findings(book)
    return [{f.rule: f for f in findings.detect(Step(number, dict(row)))} for number, row in enumerate(rows, start=1)]


# ── crash ─────────────────────────────────────────────────────────────────────────────────────────────────────────
CRASH = {"kind": "crash", "metric": "mean_reward",
         "bands": [{"left": 0.4, "severity": "warning"}, {"left": 0.1, "severity": "critical"}]}  # fmt: skip
HIGH = [0.8, 0.9, 0.85, 0.8, 0.9, 0.85, 0.8, 0.9, 0.85, 0.8, 0.9, 0.85]


def crash(values: Iterable[float], **fields: Any) -> list[int | None]:
    return ranks(column("mean_reward", values), **{**CRASH, **fields})


def test_a_crash_is_told_within_its_window_by_how_much_is_left() -> None:
    assert crash([*HIGH, 0.3, 0.3, 0.3])[-3:] == [0, 0, 1]
    assert crash([*HIGH, 0.02, 0.02, 0.02])[-3:] == [0, 0, 2]
    assert not any(crash([*HIGH, 0.5, 0.5, 0.5, 0.5, 0.5]))  # half is no crash


def test_a_crash_says_from_which_level_to_which_bottom_and_since_when() -> None:
    last = fed(detector(rule(**CRASH)), column("mean_reward", [*HIGH, 0.0, 0.0, 0.0]))[-1]
    assert last is not None
    assert last.note == "the level was 0.85, the bottom is 0"
    assert last.limit == pytest.approx(0.085)
    assert last.back == 2


def test_the_bottom_of_a_reward_that_was_negative_is_its_lowest() -> None:
    up = [-1.0, -0.8, -0.5, -0.2, 0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.75, 0.7, 0.72, 0.75, 0.7, 0.74, 0.7, 0.72, 0.75, 0.7]
    quiet = [*up, *([0.72, 0.7, 0.74] * 12)]  # the noise of the climb is forgotten
    assert crash([*quiet, -1.0, -1.0, -1.0])[-1] == 2
    assert not any(crash([*quiet, 0.0, 0.0, 0.0]))  # more than half of the way up from -1


def test_one_lucky_batch_makes_no_level() -> None:
    usual = [0.10, 0.12, 0.11, 0.09, 0.10, 0.12, 0.11, 0.09]
    assert not any(crash([*usual, 1.0, *usual, *usual], spreads=0))  # 0.1 is a tenth of it


def test_two_low_rows_heal() -> None:
    assert not any(crash([*HIGH, 0.0, 0.0, *HIGH, 0.0, 0.0, *HIGH]))


def test_a_fall_within_the_noise_is_none() -> None:
    noisy = [0.1, 1.0, 0.1, 1.0, 0.1, 1.0, 1.0, 1.0, 0.1, 1.0, 1.0, 0.1, 1.0, 1.0, 0.1, 1.0, 1.0]
    low = [*noisy, 0.1, 0.1, 0.1]
    assert crash(low, chance=1)[-1] == 0
    assert crash(low, chance=1, sigmas=0)[-1] == 1


def test_noise_that_is_mostly_equal_still_has_a_size() -> None:
    """The median deviation of values most of which are equal is 0: without another measure, anything is beyond it."""
    solved = [1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    assert crash([*solved, 0.0, 0.0, 0.0], chance=1, spreads=0)[-1] == 0
    assert crash([*solved, 0.0, 0.0, 0.0], chance=1, spreads=0, sigmas=2)[-1] == 2


def test_a_fall_within_the_spread_of_single_rewards_is_none() -> None:
    wide = [{"mean_reward": value, "std_reward": 0.45} for value in [*HIGH, 0.05, 0.05, 0.05]]
    assert ranks(wide, **CRASH)[-1] == 0
    assert ranks(wide, **{**CRASH, "spreads": 0})[-1] == 2
    groups = [{"mean_reward": row["mean_reward"], "group_std_reward": 0.45} for row in wide]
    assert ranks(groups, **CRASH)[-1] == 0  # the spread within groups serves as well


def test_a_spread_that_is_0_on_most_rows_counts_by_the_others() -> None:
    """One group a row: mostly no spread at all, now and then the whole of it."""
    rows = [{"mean_reward": value, "std_reward": 0.0 if at % 4 else 0.8} for at, value in enumerate([*HIGH, 0, 0, 0])]
    assert ranks(rows, **{**CRASH, "spreads": 2.5})[-1] == 0


LOOSE = {"sigmas": 0, "spreads": 0}  # nothing but chance


def all_or_nothing(seed: int, count: int) -> list[float]:
    """The rewards of one group a row, all of it right or all of it wrong."""
    draws = random.Random(seed)
    return [float(draws.random() < 0.6) for _ in range(count)]


def test_a_stretch_as_chance_makes_it_is_none_and_a_longer_one_is() -> None:
    """Three zeros in a row come again and again in such a log, thirty never."""
    rewards = all_or_nothing(0, 400)
    assert [0.0] * 3 in [rewards[at : at + 3] for at in range(397)]
    assert not any(crash(rewards, **LOOSE))
    assert any(crash(rewards, **LOOSE, chance=1))
    assert crash([*rewards, *[0.0] * 30], **LOOSE)[-1] == 2


def test_false_alarms_do_not_grow_with_the_run() -> None:
    """One in a hundred of a whole run, however long: without a budget for the run, thousands of rows never pass."""
    late = {chance: sum(any(crash(all_or_nothing(seed, 3000), **LOOSE, chance=chance)[100:]) for seed in range(12))
            for chance in (0.01, 1)}  # fmt: skip
    assert late[0.01] == 0
    assert late[1] >= 4


def test_no_level_is_learned_from_a_low_stretch_that_goes_on() -> None:
    seen = crash([*HIGH, *[0.0] * 200])
    assert seen[-1] == 2  # after 200 rows it is still a crash, not the usual
    assert crash([*HIGH, *[0.0] * 200, *HIGH])[-1] == 0


def test_no_noise_is_learned_from_it_either() -> None:
    assert crash([*HIGH, *[0.0, 0.3] * 20], spreads=0)[-1] == 1


def test_a_crash_goes_on_where_its_state_was_kept_even_amid_a_stretch() -> None:
    values = column("mean_reward", [*all_or_nothing(0, 60), *[0.0] * 12, *HIGH])
    made = rule(**{**CRASH, **LOOSE})
    whole, one = fed(detector(made), values), detector(made)
    for at, row in enumerate(values):
        state = json.loads(json.dumps(one.state_dict()))
        one = detector(made)
        one.load_state_dict(state)
        before = whole[at - 1] if at else None
        assert one.read(row, firing=bool(before and before.rank)) == whole[at]


def test_nothing_is_said_before_there_is_a_level_or_of_no_number() -> None:
    assert not any(crash([0.9, 0.9, 0.9, 0.0, 0.0, 0.0]))
    assert crash([0.9, 0.85, 0.9, 0.0, 0.0, 0.0], settle=3, chance=0.2)[-1] == 2
    assert crash([NAN, INF, *HIGH])[:2] == [None, None]
    assert crash([*HIGH, 0.0, NAN, 0.0, INF, 0.0])[-1] == 2  # what is no number neither heals nor harms


@pytest.mark.parametrize("bands", [
    [{"left": 0.1, "severity": "warning"}, {"left": 0.4, "severity": "critical"}],
    [{"left": 0.4, "severity": "critical"}, {"left": 0.1, "severity": "warning"}],
    [{"left": 1.0, "severity": "warning"}],
    [{"left": 0.0, "severity": "warning"}],
    [],
])  # fmt: skip
def test_bands_of_a_crash_leave_less_and_less(bands: list[dict[str, Any]]) -> None:
    with pytest.raises(RulebookError, match=r"<journal>:1:1: .*(bands|left)"):
        rule(**{**CRASH, "bands": bands})


# ── first ─────────────────────────────────────────────────────────────────────────────────────────────────────────
FIRST = {"kind": "first", "metric": "token_kl",
         "bands": [{"from": 0.1, "severity": "notice"}, {"from": 1, "severity": "warning"}]}  # fmt: skip


def test_first_looks_once_at_the_first_value_wherever_that_comes() -> None:
    assert ranks(column("token_kl", [1.5, 0.0]), **FIRST) == [2, 0]
    assert ranks(column("token_kl", [0.0, 5.0, 9.0]), **FIRST) == [0, 0, 0]
    late: Rows = [{"loss": 0.1}, {"loss": 0.1}, {"token_kl": 0.5}, {"token_kl": 7.0}]
    firing = told(page(first={**FIRST, "keep_firing_for": 1}), late)
    assert [sorted(now) for now in firing] == [[], [], ["first"], []]


def test_first_looks_at_a_first_value_in_no_band_too() -> None:
    """A rule that sleeps through calm values would else take the second for the first."""
    rows = column("token_kl", [0.05] * 3 + [3.0])
    assert not any(told(page(first=FIRST), rows))


# ── gain ──────────────────────────────────────────────────────────────────────────────────────────────────────────
GAIN = {"kind": "gain", "metric": "mean_reward", "window": 8, "sigmas": 2.5}


def noisy(seed: int, level: Iterable[float], noise: float = 0.1) -> list[float]:
    draws = random.Random(seed)
    return [value + draws.gauss(0, noise) for value in level]


def gain(values: Iterable[float], **fields: Any) -> list[int | None]:
    return ranks(column("mean_reward", values), **{**GAIN, **fields})


def test_a_gain_is_told_of_a_run_that_learns_and_not_of_one_that_does_not() -> None:
    for seed in range(10):
        assert gain(noisy(seed, [0.2] * 20 + [0.7] * 20))[-1] == 1
        assert sum(map(bool, gain(noisy(seed, [0.4] * 300)))) <= 30  # 2.5 deviations: now and then


def test_a_gain_that_is_lost_is_none_any_more() -> None:
    up = noisy(0, [0.2] * 20 + [0.8] * 20)
    assert gain(up)[-1] == 1
    assert gain([*up, *noisy(1, [0.4] * 12)])[-1] == 0  # a third of what was gained is left: not near the best
    assert gain([*up, *noisy(1, [0.4] * 12)], near=0.2)[-1] == 1


def test_no_gain_is_told_from_settle_on() -> None:
    flat = noisy(3, [0.4] * 60)
    seen = gain(flat, lacking=True, settle=52, sigmas=4)
    assert seen == [0] * 51 + [1] * 9
    assert gain(noisy(3, [0.1] * 20 + [0.9] * 40), lacking=True, settle=52)[-1] == 0


def test_a_gain_is_blind_to_what_is_no_number() -> None:
    rows = noisy(0, [0.2] * 20 + [0.7] * 20)
    with_holes = [value for row in rows for value in (row, NAN, INF)]
    seen = gain(with_holes)
    assert seen[1::3] == seen[2::3] == [None] * 40
    assert seen[0::3] == gain(rows)


# ── shrunk ────────────────────────────────────────────────────────────────────────────────────────────────────────
SHRUNK = {"kind": "shrunk", "metrics": ["completion_length"], "to": 0.2}


def shrunk(values: Iterable[float], **fields: Any) -> list[int | None]:
    return ranks(column("completion_length", values), **{**SHRUNK, **fields})


def test_shrunk_is_held_against_the_highest_level_not_the_longest_answer() -> None:
    assert shrunk([100, 110, 90, 20]) == [0, 0, 0, 1]
    assert shrunk([100, 110, 90, 21]) == [0, 0, 0, 0]
    assert not any(shrunk([100, 2000, 90, 100, 110, 90, 100]))  # one of 2000 is no level
    assert shrunk([100, 300, 320, 310, 300, 60])[-1] == 1  # the level may rise


def test_shrunk_may_take_the_first_row_for_a_level() -> None:
    assert shrunk([100, 5, 5, 5, 5]) == [0] * 5
    assert shrunk([100, 5, 5, 5, 5], from_first=True) == [0, 1, 1, 1, 1]


def test_shrunk_says_nothing_of_what_was_always_short() -> None:
    assert shrunk([10, 10, 10, 1], least=16)[-1] == 0
    assert shrunk([20, 20, 20, 1], least=16)[-1] == 1


def test_shrunk_needs_all_of_its_metrics_to_have_shrunk() -> None:
    both = {"kind": "shrunk", "metrics": ["completion_length", "entropy"], "to": 0.2}
    before = [{"completion_length": 100.0, "entropy": 1.0}] * 3
    after = [{"completion_length": 5.0, "entropy": 0.05}, {"completion_length": 5.0, "entropy": 0.9},
             {"completion_length": 90.0, "entropy": 0.05}, {"completion_length": NAN, "entropy": 0.05}]  # fmt: skip
    assert [ranks([*before, row], **both)[-1] for row in after] == [1, 0, 0, None]


# ── still ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def still(values: Iterable[float], **fields: Any) -> list[int | None]:
    return ranks(column("mean_reward", values), kind="still", metric="mean_reward", **fields)


def test_a_reward_that_never_moved_is_still() -> None:
    assert still([-0.1] * 40) == [0] * 31 + [1] * 9
    assert still([0.0, 0.0, 0.0, 0.5] * 12)[-1] == 1  # three quarters, and something was earned besides
    assert still([0.0, 0.0, 0.5] * 12)[-1] == 0


def test_a_ceiling_counts_from_half_on() -> None:
    """Nothing above it was ever seen: whatever there is to earn is earned, or cannot be."""
    assert still([1.0, 1.0, 0.5] * 12)[-1] == 1
    assert still([1.0, 1.0, 0.5] * 12, share_on_top=0.7)[-1] == 0


def test_a_reward_that_moved_and_then_stands_still_is_left_to_others() -> None:
    draws = random.Random(0)
    solving = [draws.random() for _ in range(40)]
    assert not any(still([*solving, *[1.0] * 500]))
    assert not any(still([*[0.5] * 20, *[0.6] * 12, *[0.5] * 500]))  # for good, whatever the share comes to


def test_rewards_of_a_few_decimals_repeat_and_are_not_still() -> None:
    for seed in range(20):
        draws = random.Random(seed)
        printed = [round(draws.gauss(0.5, 0.002), 3) for _ in range(300)]  # one of nine values, on most rows
        assert not any(still(printed))


def test_still_counts_only_numbers() -> None:
    assert still([NAN, *[0.1] * 31]) == [None, *[0] * 31]
    assert still([NAN, *[0.1] * 32])[-1] == 1


# ── nonfinite, surge ──────────────────────────────────────────────────────────────────────────────────────────────
def test_several_metrics_may_have_to_be_no_number_at_once() -> None:
    both = {"kind": "nonfinite", "metrics": ["loss", "grad_norm", "token_kl"], "at_least": 2}
    rows = [{"loss": NAN, "grad_norm": 0.3}, {"loss": NAN, "grad_norm": INF}, {"loss": NAN, "mean_reward": NAN},
            {"loss": NAN}]  # fmt: skip
    assert [ranks([row], **both)[-1] for row in rows] == [0, 1, 0, 0]
    last = fed(detector(rule(**both)), [{"loss": 0.1, "grad_norm": NAN, "token_kl": -INF}])[-1]
    assert last is not None
    assert (last.metric, last.note) == ("grad_norm", "so are token_kl")


def test_a_surge_may_go_either_way() -> None:
    calm = [0.5, 0.6, 0.55, 0.5, 0.6, 0.55, 0.5, 0.6, 0.55]
    both = {"kind": "surge", "metric": "entropy", "direction": "both", "by": 4}
    assert [ranks(column("entropy", [*calm, last]), **both)[-1] for last in (3.0, 0.1, 1.0, 0.3)] == [1, 1, 0, 0]
    linear = {"kind": "surge", "metric": "loss", "direction": "both", "scale": "linear", "by": 10}
    assert [ranks(column("loss", [*calm, last]), **linear)[-1] for last in (12.0, -12.0, 9.0, -9.0)] == [1, 1, 0, 0]


# ── out_of ────────────────────────────────────────────────────────────────────────────────────────────────────────
BAND = {"kind": "band", "metric": "token_kl",
        "bands": [{"from": 1, "severity": "warning"}, {"from": 5, "severity": "critical"}]}  # fmt: skip


def fires(values: Iterable[float], **fields: Any) -> list[str]:
    """The severity after each row, through the rules' door."""
    firing = told(page(rule={"keep_firing_for": 1, **BAND, **fields}), column("token_kl", values))
    return [now["rule"].severity if now else "ok" for now in firing]


def test_for_counts_in_a_row_and_over_a_window() -> None:
    back = [2.0, 0.0, 2.0, 0.0, 2.0, 0.0, 0.0]
    assert fires(back, **{"for": 3}) == ["ok"] * 7
    assert fires(back, **{"for": 3, "out_of": 5}) == ["ok"] * 4 + ["warning", "ok", "ok"]
    assert fires(back, **{"for": 3, "out_of": 4}) == ["ok"] * 7


def test_each_level_is_counted_by_itself() -> None:
    """What is above the upper edge is above the lower one too."""
    assert fires([9.0, 0.0, 2.0, 2.0], **{"for": 3, "out_of": 4}) == ["ok"] * 3 + ["warning"]
    assert fires([9.0, 0.0, 9.0, 2.0, 9.0], **{"for": 3, "out_of": 5}) == ["ok"] * 3 + ["warning", "critical"]


def test_a_window_says_how_often_and_since_when() -> None:
    now = told(page(rule={**BAND, "for": 3, "out_of": 5}), column("token_kl", [0.0, 2.0, 0.0, 2.0, 2.0]))[-1]["rule"]
    assert now.note.startswith("on 3 of the last 5 observations")
    assert now.age == 3  # observations since the first of them


def test_a_row_without_the_metric_is_not_counted() -> None:
    book = page(rule={**BAND, "for": 3, "out_of": 3})
    rows: Rows = [{"token_kl": 2.0}, {"loss": 0.1}, {"token_kl": 2.0}, {"loss": 0.1}, {"token_kl": 2.0}]
    assert [sorted(now) for now in told(book, rows)] == [[], [], [], [], ["rule"]]


@given(st.lists(st.sampled_from([0.0, 2.0, 9.0, NAN]), max_size=40), st.integers(1, 5), st.integers(0, 4))
def test_a_window_is_what_counting_says(values: list[float], enough: int, more: int) -> None:
    window = max(2, enough + more)
    for at, now in enumerate(fires(values, **{"for": enough, "out_of": window})):
        seen = values[max(0, at - window + 1) : at + 1]
        worst = sum(value not in (2.0, 0.0) for value in seen)  # NaN counts as the last band
        some = sum(value != 0.0 for value in seen)
        assert now == ("critical" if worst >= enough else "warning" if some >= enough else "ok")


def test_out_of_must_have_room_for_all() -> None:
    with pytest.raises(RulebookError, match="out_of must not be below for, and 3 is below 4"):
        rule(**BAND, **{"for": 4, "out_of": 3})


# ── alone, beside, contradicted_by ────────────────────────────────────────────────────────────────────────────────
def pair(**fields: Any) -> Rulebook:
    """A critical rule on the loss, and another on the gradient that speaks for or against it."""
    main = {"kind": "outside", "metric": "loss", "high": 10, "severity": "critical", "keep_firing_for": 1, **fields}
    other = {"kind": "outside", "metric": "grad_norm", "high": 10, "severity": "notice", "keep_firing_for": 1}
    return page(main=main, other=other)


@pytest.mark.parametrize(("fields", "by_itself", "together"), [
    ({}, "critical", "critical"),
    ({"corroborated_by": ["other"]}, "warning", "critical"),
    ({"corroborated_by": ["other"], "alone": "notice"}, "notice", "critical"),
    ({"contradicted_by": ["other"]}, "critical", "warning"),
    ({"contradicted_by": ["other"], "alone": "notice"}, "critical", "notice"),
])  # fmt: skip
def test_a_witness_decides_how_severe_a_finding_is(fields: dict[str, Any], by_itself: str, together: str) -> None:
    book = pair(**fields)
    alone, both = ({"loss": 50.0, "grad_norm": value} for value in (1.0, 50.0))
    assert [told(book, [row])[0]["main"].severity for row in (alone, both)] == [by_itself, together]
    assert told(book, [alone])[0]["main"].alone == (by_itself != "critical")


def test_a_witness_that_comes_long_after_is_of_something_else() -> None:
    book = pair(corroborated_by=["other"])
    stands = [{"loss": 50.0, "grad_norm": 1.0}]
    witness = [{"loss": 50.0, "grad_norm": 50.0}]
    assert told(book, [*stands * 10, *witness])[-1]["main"].severity == "critical"
    assert told(book, [*stands * 30, *witness])[-1]["main"].severity == "warning"


def test_a_rule_whose_claim_rests_on_what_is_not_logged_is_blind() -> None:
    book = page(rule={"kind": "outside", "metric": "loss", "high": 10, "beside": ["step_kl", "param_change"]})
    assert not told(book, [{"loss": 50.0}])[0]
    assert told(book, [{"loss": 50.0, "param_change": 1e-4}])[0]
    findings = Findings(book)
    findings.detect(Step(1, {"loss": 50.0}))
    (blind,) = findings.blind()
    assert blind.rule == "rule"
    assert {"step_kl", "param_change"} & set(blind.missing)


# ── all of them ───────────────────────────────────────────────────────────────────────────────────────────────────
KINDS: dict[str, dict[str, Any]] = {
    "crash": {**CRASH, "settle": 3, "window": 2, "chance": 1},
    "first": FIRST | {"metric": "mean_reward"},
    "gain": GAIN | {"window": 3},
    "lacking": GAIN | {"window": 3, "lacking": True, "settle": 5},
    "shrunk": {"kind": "shrunk", "metrics": ["mean_reward", "entropy"], "to": 0.5, "from_first": True},
    "still": {"kind": "still", "metric": "mean_reward", "settle": 6},
    "at_least": {"kind": "nonfinite", "metrics": ["mean_reward", "entropy"], "at_least": 2},
    "both": {"kind": "surge", "metric": "mean_reward", "direction": "both", "scale": "linear", "by": 0.5,
             "settle": 3},
    "mostly": {**CRASH, "settle": 3, "window": 2, "chance": 1, "for": 2, "out_of": 4},
    "mostly both": {"kind": "surge", "metric": "entropy", "direction": "both", "by": 2, "settle": 3, "for": 2,
                    "out_of": 5},
}  # fmt: skip
numbers = st.sampled_from([0.0, 0.01, 0.3, 0.3, 0.9, 1.0, 1.0, -0.5, 4.0, NAN, INF, -INF])
rows = st.lists(st.fixed_dictionaries({"mean_reward": numbers, "entropy": numbers}), max_size=40)


@pytest.mark.parametrize("kind", KINDS)
@given(rows, st.integers(0, 40))
def test_a_detector_goes_on_where_its_state_was_kept(kind: str, given_rows: Rows, cut: int) -> None:
    whole = [repr(reading) for reading in fed(detector(rule(**KINDS[kind])), given_rows)]
    before, after = detector(rule(**KINDS[kind])), detector(rule(**KINDS[kind]))
    seen = fed(before, given_rows[:cut])
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    firing = bool(seen and seen[-1] and seen[-1].rank)
    for row in given_rows[cut:]:
        seen.append(after.read(row, firing=firing))
        firing = bool(seen[-1] and seen[-1].rank)
    assert [repr(reading) for reading in seen] == whole


@pytest.mark.parametrize("kind", KINDS)
@given(st.lists(st.sampled_from([0.5, 0.6, 1.7e308, -1.7e308, 5e-324]), max_size=30))
def test_numbers_whose_sum_is_none_raise_nothing(kind: str, values: list[float]) -> None:
    fed(detector(rule(**KINDS[kind])), [{"mean_reward": x, "entropy": x, "std_reward": abs(x)} for x in values])


@pytest.mark.parametrize("kind", KINDS)
def test_each_of_these_can_fire_and_can_be_calm(kind: str) -> None:
    """Else the test above would compare nothing."""
    values = [0.3, 0.3, 1.0, 1.0, 0.9, 1.0, 0.9, 1.0, 0.0, 0.0, 0.01, 0.0, NAN, 0.3, 0.3]
    start = [2.0, *values] if kind == "first" else values if kind != "still" else [0.3] * 8 + values
    seen = list(ranks([{"mean_reward": v, "entropy": v + 0.01} for v in start], **KINDS[kind]))
    assert {0} < {reading for reading in seen if reading is not None}


def test_over_ten_rows_a_reward_of_0_or_1_need_not_fall_by_twice_what_single_ones_differ_by() -> None:
    rule = load("guarded").rules["reward_down"]
    assert rule.model_dump()["spreads"] == 1.0
    rng = random.Random(3)
    rows = [{"mean_reward": rng.gauss(0.65, 0.06), "std_reward": 0.47} for _ in range(60)]
    rows += [{"mean_reward": rng.gauss(0.2, 0.03), "std_reward": 0.4} for _ in range(60)]
    found = {}
    for spreads in (1.0, 2.0):  # the first is the shipped one
        watch = Watch("reward_down", rule.model_copy(update={"spreads": spreads}))
        found[spreads] = next(
            (row for row, values in enumerate(rows) if watch.update(values, row) and watch.loud), None
        )
    assert found == {1.0: 69, 2.0: None}
