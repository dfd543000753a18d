"""Trend: the signal grows exponentially and is on its way to a threshold that it has not reached.

A straight line through the logarithm of the last `window` observations, extrapolated. Noise has slopes too, so the
line is extrapolated at a cautious slope, several standard errors below the fitted one. Through the whole window the
errors are those of a line, widened by the autocorrelation of what it leaves. Growth that has only just begun bends the
whole window; through its newest half the error is that of a random walk, the wildest noise that we allow for.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from operator import mul
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from grpo_watchdog.detectors.detector import CALM, Reading
from grpo_watchdog.rule import MetricName, Positive, SingleRule

_SURE = 4.0  # standard errors by which the slope that is extrapolated lies below the fitted one
_MOST_CORRELATED = 0.95
_BIAS = 5.0  # over the points: what fitting a line takes off a lag-1 autocorrelation
_ROUNDING = 1e-9
_LOOSE = 1e-6  # relative to the goal: far beyond what rounding does to a running sum
_FILLED = 0.75  # of the window must be usable


class TrendRule(SingleRule):
    """Holds while a metric below a threshold will reach it soon at the rate at which it grows.

    Attributes:
        metric: which.
        absolute: whether its size counts, whatever the sign; else values below zero never enter.
        reaches: the threshold, in the metric's unit.
        within: how soon it must be reached to be worth saying [observations].
        window: observations that the line goes through [observations].
    """

    kind: Literal["trend"]
    metric: MetricName
    absolute: bool = False
    reaches: Positive
    within: Annotated[int, Field(ge=1, le=100_000)]
    window: Annotated[int, Field(ge=16, le=1000)] = 40


class _Line(NamedTuple):
    """A fitted line and the points it was fitted to.

    Attributes:
        times: when the points were seen, from the first place of the window [observations].
        logs: their logarithms.
        now: the line's value at the newest point.
        slope: its slope [1/observation].
        spread: sum of the squared distances of the times from their mean.
    """

    times: list[int]
    logs: list[float]
    now: float
    slope: float
    spread: float


def _line(logs: list[float | None]) -> _Line:
    """Return the least-squares line through the points that are there; None keeps its place in time."""
    times = [time for time, log in enumerate(logs) if log is not None]
    there = [log for log in logs if log is not None]
    count = len(there)
    mean_t, mean_y = sum(times) / count, sum(there) / count
    spread = sum(map(mul, times, times)) - count * mean_t * mean_t
    # From the first point, not from zero: a constant then has a slope of exactly zero.
    lifted = [log - there[0] for log in there]
    slope = (sum(map(mul, times, lifted)) - mean_t * sum(lifted)) / spread
    return _Line(times, there, mean_y + slope * (len(logs) - 1 - mean_t), slope, spread)


@cache
def _pull(count: int) -> tuple[float, ...]:
    """Return the weights of evenly spaced values in the slope of their line."""
    middle = (count - 1) / 2
    spread = sum((time - middle) ** 2 for time in range(count))
    return tuple((time - middle) / spread for time in range(count))


def _hopeless(logs: list[float | None], goal: float, within: int) -> bool:
    """Return whether the line misses the goal even at its full slope: the quick way out of a healthy step."""
    there = [log for log in logs if log is not None]
    count = len(there)
    if count < len(logs):
        return False
    slope: float = sum(map(mul, _pull(count), there))
    now = sum(there) / count + slope * (count - 1) / 2
    return goal - now > slope * within + _ROUNDING * (1 + abs(goal))


class _Screen:
    """The quick way out of a healthy step: whether the line through the last `size` points surely misses the goal.

    Running sums, which rounding spoils by far less than `_LOOSE`; whatever they let through, the line itself decides.
    """

    __slots__ = ("_age", "_of_total", "_of_weighted", "_size", "_surely", "_total", "_weighted")

    def __init__(self, size: int, goal: float, within: int) -> None:
        self._size, self._surely = size, goal - _LOOSE * (1 + abs(goal))
        middle, spread = (size - 1) / 2, size * (size * size - 1) / 12
        ahead = middle + within  # the line there: mean + slope * ahead
        self._of_total, self._of_weighted = 1 / size - ahead * middle / spread, ahead / spread
        self._age = -1  # values since the sums were last taken afresh; -1 where a point is missing
        self._total = self._weighted = 0.0

    def hopeless(self, logs: deque[float | None], gone: float | None) -> bool:
        """Return whether it surely misses, after the newest point came and `gone` left."""
        newest = logs[-1]
        if newest is None or gone is None:
            self._age = -1
            return False
        if 0 <= self._age < self._size:
            self._age += 1
            kept = self._total - gone
            self._weighted += (self._size - 1) * newest - kept
            self._total = kept + newest
        else:
            there = [log for log in list(logs)[-self._size :] if log is not None]
            if len(there) < self._size:
                return False
            self._age, self._total = 0, sum(there)
            self._weighted = sum(map(mul, there, range(self._size)))
        return self._of_total * self._total + self._of_weighted * self._weighted < self._surely


def _error_of_line(line: _Line) -> float:
    """Return the standard error of the slope where the points scatter about the line, with autocorrelation."""
    last = line.times[-1]
    left = [log - line.now - line.slope * (time - last) for time, log in zip(line.times, line.logs, strict=True)]
    count, squares = len(left), sum(e * e for e in left)
    if not squares > 0:
        return 0.0
    correlation = sum(a * b for a, b in pairwise(left)) / squares + _BIAS / count
    correlation = min(max(correlation, 0.0), _MOST_CORRELATED)
    return math.sqrt((1 + correlation) / (1 - correlation) * squares / (count - 2) / line.spread)


def _error_of_walk(line: _Line) -> float:
    """Return the standard error of the slope where the points are a random walk."""
    steps = [after - before - line.slope for before, after in pairwise(line.logs)]
    return math.sqrt(1.2 * sum(step * step for step in steps) / (len(steps) - 1) / len(steps))


class TrendDetector:
    """Extrapolates. Values that are not finite or not positive never enter."""

    needs_all = True
    quiet: tuple[str, float, float] | None = None
    steady: tuple[str, float, float] | None = None

    def __init__(self, rule: TrendRule) -> None:
        """Start without a past."""
        self._metric, self._absolute, self._reaches = (
            rule.metric,
            rule.absolute,
            rule.reaches,
        )  # a look at a pydantic model costs several at a plain attribute
        self._window, self._within = rule.window, rule.within
        self.needs: tuple[str, ...] = (rule.metric,)
        self._goal = math.log(rule.reaches)
        self._logs: deque[float | None] = deque(maxlen=rule.window)
        self._usable = 0
        self._half = rule.window // 2
        self._begin()

    def _begin(self) -> None:
        within = self._within
        self._screen = _Screen(self._window, self._goal, within)
        self._newest = _Screen(self._window - self._half, self._goal, within)

    def read(self, values: Mapping[str, float], *, firing: bool) -> Reading | None:
        """Return whether the threshold is near; None on a value that cannot enter, and while there are too few."""
        logs = self._logs
        value = values[self._metric]
        size = abs(value) if self._absolute else value
        usable = 0 < size < math.inf
        hopeless = False
        if len(logs) == self._window:
            gone, left = logs[0], logs[self._half]
            if gone is not None:
                self._usable -= 1
            logs.append(math.log(size) if usable else None)
            hopeless = self._screen.hopeless(logs, gone)
            hopeless = self._newest.hopeless(logs, left) and hopeless
        else:
            logs.append(math.log(size) if usable else None)
        self._usable += usable
        if hopeless and not firing:
            return CALM
        if not usable or self._usable < _FILLED * self._window:
            return None
        slope, soon = (0.0, 0) if hopeless or size >= self._reaches else self._near()
        if soon:
            note = f"grows by {math.expm1(slope):.2g} an observation: {self._reaches:g} in about {soon}"
            return Reading(1, 1, self._metric, value, self._reaches, note)
        return Reading(0, 0, self._metric, value, self._reaches) if firing else CALM

    def _near(self) -> tuple[float, int]:
        """Return the slope and the observations to the threshold; 0 where it is not near, or not for sure."""
        logs, within = list(self._logs), self._within
        newest = logs[len(logs) // 2 :]
        for part, error in ((logs, _error_of_line), (newest, _error_of_walk)):
            if len(part) - part.count(None) < _FILLED * len(part) or _hopeless(part, self._goal, within):
                continue
            line = _line(part)
            ahead = self._goal - line.now
            if line.slope > 0 and ahead <= line.slope * within:
                cautious = line.slope - _SURE * error(line)
                if cautious > 0 and ahead <= cautious * within:
                    return line.slope, max(1, math.ceil(ahead / line.slope))
        return 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        """Return the window."""
        return {"logs": list(self._logs)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        self._logs = deque(state["logs"], maxlen=self._window)
        self._usable = sum(log is not None for log in self._logs)
        self._begin()
