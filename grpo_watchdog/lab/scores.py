"""Figures of the rescue benchmark: pure functions of its rows, each with the number of runs that it is made of.

A fault is harmful in a cell if, with nobody watching, the final true reward is at least a tenth below the healthy
one. The rescue fraction (R_watched - R_unwatched) / (R_healthy - R_unwatched) is 1 where all of the harm is undone,
0 where none is, and below 0 where the policy made it worse; it is defined on harmful cells only.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from grpo_watchdog.actions import KNOB_ACTIONS
from grpo_watchdog.lab.cells import Row

HARM = 0.9  # of the healthy reward: at or below this, a fault did harm
PER_STEPS = 20_000  # false interventions are given per so many healthy steps
OUT_OF_REACH = 0.8  # where even the oracle rescues less than this, nobody can be asked to
_LETS_GO = frozenset(action.release_name for action in KNOB_ACTIONS.values())


class Figure(NamedTuple):
    """A number, and how many runs it is made of; NaN of 0 runs where there are none."""

    value: float
    n: int


class Scores(NamedTuple):
    """One policy's figures.

    Attributes:
        rescue: mean rescue fraction over harmful cells.
        rescue_worst: the mean of the worst fault class, and `worst_class` its name.
        rescue_by_class: the mean of each fault class, out-of-reach ones included.
        rescue_by_task: the mean of each task.
        rescue_in_reach: the mean over the classes of each task in which the oracle itself rescues.
        keeps: mean of reward / reward unwatched, over healthy and look-alike runs.
        keeps_low: its 5 % quantile.
        false_interventions: interventions per 20,000 steps of healthy and look-alike runs; n counts those steps.
        false_healthy: the same, healthy runs only.
        false_lookalike: the same, look-alike runs only.
        early: interventions per 20,000 steps before the onset of faults; n counts those steps.
        recall: share of harmful cells with an alarm or an intervention at or after the onset.
        delay: median steps from the onset to the first of these, over the harmful cells in which there was one [steps].
        act_delay: median steps from the onset to the first intervention [steps].
        lost: mean steps that rollbacks lost, over harmful cells [steps].
        right: share of harmful cells with a cause in which the likeliest one names the fault.
        on_harmless: share of harmless injections in which the policy intervened at or after the onset.
        halted: share of harmful cells in which the run was stopped.
        crashed: runs of any kind that an error ended.
    """

    policy: str
    rescue: Figure
    rescue_worst: Figure
    worst_class: str
    rescue_by_class: dict[str, Figure]
    rescue_by_task: dict[str, Figure]
    rescue_in_reach: Figure
    keeps: Figure
    keeps_low: Figure
    false_interventions: Figure
    false_healthy: Figure
    false_lookalike: Figure
    early: Figure
    recall: Figure
    delay: Figure
    act_delay: Figure
    lost: Figure
    right: Figure
    on_harmless: Figure
    halted: Figure
    crashed: int


def scores(rows: Sequence[Row], policy: str) -> Scores:
    """Return one policy's figures, of the rows of all policies."""
    reach = in_reach(rows)
    own = [row for row in rows if row.policy == policy]
    harmful = [row for row in own if harmed(row)]
    harmless = [row for row in own if row.kind == "fault" and not harmed(row)]
    well = [row for row in own if row.kind != "fault"]
    kept = [row.reward / row.unwatched for row in well if row.unwatched > 0.0]
    by_class = _grouped(harmful, lambda row: row.event)
    worst = min(by_class, key=lambda name: by_class[name].value, default="")
    delays = [delay for row in harmful if (delay := _delay(row, acted_only=False)) is not None]
    act_delays = [delay for row in harmful if (delay := _delay(row, acted_only=True)) is not None]
    return Scores(
        policy=policy,
        rescue=mean(map(rescue, harmful)),
        rescue_worst=by_class.get(worst, mean([])),
        worst_class=worst,
        rescue_by_class=by_class,
        rescue_by_task=_grouped(harmful, lambda row: row.task),
        rescue_in_reach=mean(rescue(row) for row in harmful if reach.get((row.event, row.task), True)),
        keeps=mean(kept),
        keeps_low=Figure(quantile(kept, 0.05), len(kept)),
        false_interventions=_rate(well),
        false_healthy=_rate([row for row in well if row.kind == "healthy"]),
        false_lookalike=_rate([row for row in well if row.kind == "lookalike"]),
        early=_rate([row for row in own if row.kind == "fault"], before_onset=True),
        recall=mean(float(_delay(row, acted_only=False) is not None) for row in harmful),
        delay=_median(delays),
        act_delay=_median(act_delays),
        lost=mean(float(row.lost) for row in harmful),
        right=mean(float(row.right) for row in harmful if row.right is not None),
        on_harmless=mean(float(_delay(row, acted_only=True) is not None) for row in harmless),
        halted=mean(float(row.halted) for row in harmful),
        crashed=sum(bool(row.crashed) for row in own),
    )


def harmed(row: Row) -> bool:
    """Return whether the row's fault does harm in its cell when nobody watches."""
    return row.kind == "fault" and row.healthy > 0.0 and row.unwatched <= HARM * row.healthy


def rescue(row: Row) -> float:
    """Return the share of the harm that was undone; the row's fault must be harmful."""
    return (row.reward - row.unwatched) / (row.healthy - row.unwatched)


def occasions(row: Row, *, since: int = 0, until: float = math.inf) -> list[int]:
    """Return the steps in [since, until) on which something was done to the run.

    Several actions of one step are one intervention. Letting a knob go again is the end of one, and an action that
    failed is none.
    """
    done = {step for step, name, ok in row.interventions if ok and name not in _LETS_GO and since <= step < until}
    return sorted(done)


def in_reach(rows: Iterable[Row]) -> dict[tuple[str, str], bool]:
    """Return, for each fault class and task with harm that the oracle was run on, whether the oracle rescues it."""
    known = [row for row in rows if row.policy == "oracle" and harmed(row)]
    keys = {(row.event, row.task) for row in known}
    return {
        key: mean(rescue(row) for row in known if (row.event, row.task) == key).value >= OUT_OF_REACH for key in keys
    }


def mean(values: Iterable[float]) -> Figure:
    """Return the mean and the count."""
    kept = list(values)
    return Figure(statistics.fmean(kept) if kept else math.nan, len(kept))


def quantile(values: Sequence[float], share: float) -> float:
    """Return a quantile by linear interpolation; NaN of nothing."""
    if not values:
        return math.nan
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def _median(values: Sequence[float]) -> Figure:
    return Figure(statistics.median(values) if values else math.nan, len(values))


def _grouped(rows: Sequence[Row], key: Callable[[Row], str]) -> dict[str, Figure]:
    names = sorted({key(row) for row in rows})
    return {name: mean(rescue(row) for row in rows if key(row) == name) for name in names}


def _rate(rows: Sequence[Row], *, before_onset: bool = False) -> Figure:
    """Return interventions per 20,000 steps, and the steps."""
    steps = sum(min(row.onset, row.ran) if before_onset else row.ran for row in rows)
    count = sum(len(occasions(row, until=row.onset if before_onset else math.inf)) for row in rows)
    return Figure(count * PER_STEPS / steps if steps else math.nan, steps)


def _delay(row: Row, *, acted_only: bool) -> int | None:
    """Return the steps from the onset to the first sign that the policy noticed, or None where it did not."""
    signs = occasions(row, since=row.onset)[:1]
    if row.alarm is not None and not acted_only:
        signs.append(row.alarm)
    return min(signs) - row.onset if signs else None
