"""Healthy runs whose logs look sick stay silent, sick ones are told in time.

Each trap is one that a rule fell for: the test takes the remedy out of the rule again, and then it must fall. All logs
are made by chance (log_streams.py), several of each kind, and read through the door.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from grpo_watchdog.recorded import Recorded
from log_streams import GUARDED, NAN, Rows, Task, at, book, changed, diagnosed, learning

SEEDS = range(3)
AT_ONCE = {"for": 1, "out_of": None}
NO_NOISE = {"sigmas": 0, "spreads": 0, "chance": 1}


# ── healthy ───────────────────────────────────────────────────────────────────────────────────────────────────────
def ordinary(seed: int) -> Rows:
    return learning(seed, Task())


def on_policy(seed: int) -> Rows:
    """One update a batch: the surrogate is 0 and its ratio 1, to the bit, in verl's names."""
    return [
        {
            "actor/pg_loss": 0.0, "actor/ppo_kl": 0.0, "actor/pg_clipfrac": 0.0, "critic/advantages/mean": 0.0,
            "actor/grad_norm": row["grad_norm"], "actor/entropy": row["entropy"], "actor/lr": 1e-6,
            "critic/score/mean": row["reward"], "critic/rewards/mean": row["reward"],
            "response_length/mean": row["completions/mean_length"],
            "response_length/clip_ratio": row["completions/clipped_ratio"],
        }
        for row in learning(seed, Task(rows=200))
    ]  # fmt: skip


def loss_of_zero(seed: int) -> Rows:
    return [{**row, "loss": 0.0} for row in learning(seed, Task())]


def surer(seed: int) -> Rows:
    """The entropy falls to a fiftieth while the reward rises."""
    return learning(seed, Task(start=0.1, end=0.9, surer=0.02))


def shorter(seed: int) -> Rows:
    """Answers get to the point, a tenth as long, and right."""
    return learning(seed, Task(start=0.2, end=0.9, longer=0.08, hard=2))


def longer(seed: int) -> Rows:
    """Reasoning gets longer until nearly every answer is cut, while the reward rises."""
    return learning(seed, Task(start=0.1, end=0.8, longer=4, limit=1.1))


def solved(seed: int) -> Rows:
    """Everything right, no differences, no gradient, hardly any entropy."""
    rows = learning(seed, Task(rows=400, start=0.3, end=0.9, surer=0.1))
    done = {
        "reward": 1.0,
        "reward_std": 0.0,
        "frac_reward_zero_std": 1.0,
        "grad_norm": 0.0,
        "loss": 0.0,
        "entropy": 0.003,
    }
    return [*rows[:250], *({**row, **done} for row in rows[250:])]


def kl_spikes(seed: int) -> Rows:
    return at(ordinary(seed), 60, 110, 160, 220, kl=4.5)


def costly(seed: int) -> Rows:
    """KL above 1 nat per token while the reward rises: the price of what is learned."""
    return learning(seed, Task(rows=200, start=0.05, end=0.8, kl=1.3))


def loss_spike(seed: int) -> Rows:
    return at(ordinary(seed), 150, loss=300.0)


def gradient_spikes(seed: int) -> Rows:
    return at(ordinary(seed), 60, 150, 220, grad_norm=2000.0)


def skipped_step(seed: int) -> Rows:
    """Loss scaling skips a step whose gradient overflowed."""
    return at(ordinary(seed), 90, 200, grad_norm=NAN)


def bad_batch(seed: int) -> Rows:
    return at(ordinary(seed), 150, reward=0.0, reward_std=0.0, frac_reward_zero_std=1.0)


def one_group(seed: int) -> Rows:
    """Zero-variance share 0 or 1, no gradient on silent rows, length and entropy that jump with the prompt."""
    return learning(seed, Task(rows=800, groups=1, start=0.35, end=0.45))


def one_small_group(seed: int) -> Rows:
    return learning(seed, Task(rows=600, groups=1, size=4, start=0.4, end=0.5, hard=1, kind="signed"))


def printed(seed: int) -> Rows:
    """Three decimals, of one small group: a few values that come again and again."""
    return learning(seed, Task(rows=500, groups=1, size=4, start=0.25, end=0.3, hard=3, digits=3))


def thousands(seed: int) -> Rows:
    """Long enough for whatever chance makes once in a thousand rows; and no spread is logged that would tell."""
    rows = learning(seed, Task(rows=2000, groups=1, start=0.5, end=0.55, hard=1.2))
    return [{name: value for name, value in row.items() if name != "reward_std"} for row in rows]


def token_sums(seed: int) -> Rows:
    """TRL's PPO: a KL that is a sum over tokens, of 2 to 12."""
    rows = learning(seed, Task(rows=200, start=0.3, end=0.7))
    rng = np.random.default_rng(seed)
    return [
        {
            "objective/kl": 2 + 10 * place / len(rows) + float(rng.normal(0, 0.5)), "objective/scores": row["reward"],
            "objective/entropy": 60.0 + float(rng.normal(0, 4)), "objective/non_score_reward": -0.4, "lr": 1e-6,
            "objective/rlhf_reward": row["reward"] - 0.4, "policy/approxkl_avg": 0.01, "policy/clipfrac_avg": 0.1,
            "policy/entropy_avg": row["entropy"], "loss/policy_avg": row["loss"], "loss/value_avg": 0.1,
            "val/ratio": 1.0 + float(rng.normal(0, 0.01)), "val/num_eos_tokens": 3.0, "eps": 2.0,
        }
        for place, row in enumerate(rows)
    ]  # fmt: skip


class Trap(NamedTuple):
    """A healthy run, and what keeps the rules from falling for it, taken out again."""

    make: Callable[[int], Rows]
    without: dict[str, dict[str, Any]]


TRAPS = [
    Trap(ordinary, {"reward_crash": {"bands": [{"left": 0.9, "severity": "warning"}], **NO_NOISE}}),
    Trap(on_policy, {"zero_advantage": {"severity": "warning"}}),
    Trap(loss_of_zero, {"loss": {"low": 1.0e-9, "severity": "warning"}}),
    Trap(surer, {"mode_collapse": {"metrics": ["entropy"], "contradicted_by": [], "alone": "warning"}}),
    Trap(shorter, {"length_shrunk": {"contradicted_by": []}}),
    Trap(longer, {"truncated": {"contradicted_by": []}}),
    Trap(solved, {"no_signal": {"contradicted_by": []}}),
    Trap(kl_spikes, {"kl_drift": AT_ONCE}),
    Trap(costly, {"kl_drift": {"contradicted_by": []}}),
    Trap(loss_spike, {"loss_spikes": AT_ONCE}),
    Trap(gradient_spikes, {"gradient_blown": {"floor": 0}}),
    Trap(skipped_step, {"gradient_nonfinite": AT_ONCE}),
    Trap(bad_batch, {"reward_crash": {"window": 2, "bands": [{"left": 0.6, "severity": "warning"}], **NO_NOISE}}),
    Trap(one_group, {"reward_crash": NO_NOISE}),
    Trap(one_group, {"no_signal": {"for": 4, "out_of": None}}),
    Trap(one_small_group, {"reward_crash": NO_NOISE}),
    Trap(printed, {"reward_still": {"share": 0.3, "share_on_top": 0.3, "settle": 8}}),
    Trap(thousands, {"reward_crash": {"chance": 1, "sigmas": 0}}),
    Trap(token_sums, {"kl_penalty": {"severity": "warning"}}),
]  # fmt: skip


def named(trap: Trap) -> str:
    return f"{trap.make.__name__}-{'-'.join(trap.without)}"


@pytest.mark.parametrize("make", dict.fromkeys(trap.make for trap in TRAPS), ids=lambda make: make.__name__)
def test_a_healthy_run_is_silent(make: Callable[[int], Rows], tmp_path: Path) -> None:
    alarms = {seed: shown(run) for seed in SEEDS if (run := diagnosed(tmp_path, make(seed))).alarm_step is not None}
    assert not alarms


@pytest.mark.parametrize("trap", TRAPS, ids=named)
def test_without_its_remedy_a_rule_falls_for_it(trap: Trap, tmp_path: Path) -> None:
    loose = book(tmp_path, **trap.without)
    runs = (diagnosed(tmp_path, trap.make(seed), loose) for seed in SEEDS)
    fallen = next((run for run in runs if run.alarm_step is not None), None)
    assert fallen is not None
    assert {rule for rule, _, _ in shown(fallen)} <= set(trap.without)  # and no other


def shown(run: Recorded) -> list[tuple[str, str, int]]:
    return [(i.rule, i.severity, i.since) for i in run.story.incidents if i.severity != "notice"]


# ── sick ──────────────────────────────────────────────────────────────────────────────────────────────────────────
WENT = 120  # the row at which it goes wrong; its step is one more


def all_nan(seed: int) -> Rows:
    return changed(ordinary(seed), WENT, loss=NAN, grad_norm=NAN, kl=NAN, entropy=NAN)


def infinite_loss(seed: int) -> Rows:
    return changed(ordinary(seed), WENT, loss=math.inf)


def reward_lost(seed: int) -> Rows:
    return [{**row, "reward": 0.02, "reward_std": 0.1} if place >= WENT else row
            for place, row in enumerate(learning(seed, Task(start=0.5, end=0.8)))]  # fmt: skip


def lost_at_once(seed: int) -> Rows:
    """The reward is gone in row 4, and the entropy ten times what it was: no time for a baseline."""
    rows = learning(seed, Task(rows=40, groups=32, size=16, start=0.7, end=0.75, hard=4))
    return changed(rows, 3, reward=0.0, reward_std=0.02, entropy=7.0)


def slides(seed: int) -> Rows:
    """The reward slides down from the first row: that scatters more than it falls, but not from row to row."""
    rng = np.random.default_rng(seed)
    return [
        {**row, "reward": 0.3 * math.exp(-place / 10) * float(rng.uniform(0.9, 1.1)), "reward_std": 0.02}
        for place, row in enumerate(learning(seed, Task(rows=60)))
    ]


def runaway_length(seed: int) -> Rows:
    return changed(ordinary(seed), WENT, completions__mean_length=600.0, completions__clipped_ratio=0.97, reward=0.05)


def cut_and_equal(seed: int) -> Rows:
    """Every answer is cut at the limit, and worth the same."""
    return changed(ordinary(seed), WENT, completions__mean_length=600.0, completions__clipped_ratio=1.0, reward=0.0,
                   reward_std=0.0, frac_reward_zero_std=1.0)  # fmt: skip


def one_answer(seed: int) -> Rows:
    return changed(ordinary(seed), WENT, completions__mean_length=4.0, entropy=0.02, frac_reward_zero_std=0.95,
                   reward=0.1, reward_std=0.05)  # fmt: skip


def one_answer_at_once(seed: int) -> Rows:
    """Collapsed before the second row: whatever is learned from the first rows is of a run that is dead."""
    rows = learning(seed, Task(rows=60))
    return changed(
        rows, 1, completions__mean_length=4.0, entropy=0.02, frac_reward_zero_std=0.95, reward=0.1, reward_std=0.05
    )


def nothing_trained(seed: int) -> Rows:
    return [{**row, "grad_norm": 0.0, "kl": 0.0, "frac_reward_zero_std": 0.0} for row in ordinary(seed)]


def gradient_gone(seed: int) -> Rows:
    """The same halfway, where no KL is logged."""
    rows = changed(ordinary(seed), WENT, grad_norm=0.0, frac_reward_zero_std=0.0)
    return [{name: value for name, value in row.items() if name != "kl"} for row in rows]


def no_differences(seed: int) -> Rows:
    return changed(
        learning(seed, Task(start=0.3, end=0.3)), WENT, reward_std=0.0, frac_reward_zero_std=1.0, grad_norm=0.0
    )


def kl_runs_away(seed: int) -> Rows:
    return [
        {**row, "kl": row["kl"] * 1.5 ** (place - WENT)} if place >= WENT else row
        for place, row in enumerate(ordinary(seed))
    ]


def never_earned(seed: int) -> Rows:
    return changed(ordinary(seed), 0, reward=0.0, reward_std=0.0, frac_reward_zero_std=1.0, grad_norm=0.0)


class Sickness(NamedTuple):
    """A sick run: how severe it must be called, from which step on it may be, and by which it must be."""

    make: Callable[[int], Rows]
    level: str
    begins: int
    by: int


SICK = [
    Sickness(all_nan, "critical", WENT + 1, WENT + 1),
    Sickness(infinite_loss, "critical", WENT + 1, WENT + 2),
    Sickness(reward_lost, "critical", WENT + 1, WENT + 10),
    Sickness(lost_at_once, "critical", 4, 8),
    Sickness(slides, "critical", 8, 30),
    Sickness(runaway_length, "warning", WENT + 1, WENT + 30),
    Sickness(cut_and_equal, "critical", WENT + 1, WENT + 9),
    Sickness(one_answer, "critical", WENT + 1, WENT + 40),
    Sickness(one_answer_at_once, "critical", 2, 8),
    Sickness(nothing_trained, "critical", 1, 1),
    Sickness(gradient_gone, "critical", WENT + 1, WENT + 3),
    Sickness(no_differences, "warning", WENT + 1, WENT + 32),
    Sickness(kl_runs_away, "critical", WENT + 1, WENT + 20),
    Sickness(never_earned, "warning", 1, 32),
]


@pytest.mark.parametrize("sick", SICK, ids=lambda sick: sick.make.__name__)
def test_a_sick_run_is_told_in_time_and_not_before(sick: Sickness, tmp_path: Path) -> None:
    for seed in SEEDS:
        run = diagnosed(tmp_path, sick.make(seed))
        step = run.critical_step if sick.level == "critical" else run.alarm_step
        assert step is not None, shown(run)
        assert step <= sick.by, (seed, shown(run))
        assert run.alarm_step is not None
        assert run.alarm_step >= sick.begins, (seed, shown(run))


def test_the_two_lists_are_of_the_shipped_rulebook() -> None:
    assert {name for trap in TRAPS for name in trap.without} <= set(GUARDED.rules)
