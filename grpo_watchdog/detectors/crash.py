"""Crash: a metric (the reward) that is down at the bottom, from wherever this run had it, within a few observations.

The level is the best running median that the newest values are no part of: a median forgets a lucky batch, a mean does
not. The bottom is 0, or the lowest value before, where one was below 0. A fall within the noise is none, nor is a
stretch of low values no longer than chance makes one in a run of this length, at the rate at which such came before.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Container, Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from grpo_watchdog.detectors.detector import CALM, Reading
from grpo_watchdog.detectors.history import History
from grpo_watchdog.detectors.sleep import MOST, Interval
from grpo_watchdog.rule import RANK, Level, MetricName, Number, Rule

_NOISE_WINDOW = 32
_MAD = 1.4826  # a median absolute deviation times this is the standard deviation of normal noise
_NORMAL = 0.954  # the median |difference| of two independent normal values, in standard deviations of one
_LASTING = 1.5  # noise that lasts from row to row differs less than it scatters: about AR(1) of 0.55
_LONGEST = 1000  # stretch that is looked at
_SPREADS = ("std_reward", "group_std_reward")
_HIGHER = 0.1  # of the height: by so much a value may be above all there were before a sleeper looks
_SAFE = 1e-9  # relative: far beyond what rounding does to a limit
_FINITE = 0.1 * MOST
_EACH = 1.5  # a value is low with so many times as much left as their mean may have


class Left(Level):
    """One level: how much of the height above the bottom is left, at most."""

    left: Annotated[Number, Field(gt=0, lt=1)]


class CrashRule(Rule):
    """Holds while the mean of the last `window` values has at most a part of its height left.

    Attributes:
        metric: which.
        window: values that are held against the level [observations].
        level: values in a running median [observations].
        settle: values before the newest for there to be a level [observations].
        sigmas: the least that the fall must measure, in robust standard deviations of the values before.
        spreads: the same in std_reward (or group_std_reward), the root mean square of those before: what single
            rewards differ by.
        chance: up to which probability of a stretch as low and as long, in the whole run so far, it counts.
        bands: the levels; each leaves less than the one before.
    """

    kind: Literal["crash"]
    metric: MetricName
    window: Annotated[int, Field(ge=2, le=100)] = 3
    level: Annotated[int, Field(ge=3, le=1000)] = 8
    settle: Annotated[int, Field(ge=3, le=1000)] = 8
    sigmas: Annotated[Number, Field(ge=0)] = 4.0
    spreads: Annotated[Number, Field(ge=0)] = 2.0
    chance: Annotated[Number, Field(gt=0, le=1)] = 0.01
    bands: Annotated[list[Left], Field(min_length=1, max_length=8)]

    @field_validator("bands")
    @classmethod
    def _falling(cls, bands: list[Left]) -> list[Left]:
        for upper, lower in pairwise(bands):
            if lower.left >= upper.left:
                raise ValueError(f"bands must leave less and less, and {lower.left:g} follows {upper.left:g}")
            if RANK[lower.severity] < RANK[upper.severity]:
                raise ValueError(f"no severity may fall, and {lower.severity} follows {upper.severity}")
        return bands

    @property
    def ladder(self) -> tuple[Level, ...]:
        """Return the bands."""
        return tuple(self.bands)


class CrashDetector:
    """Keeps the best level, the bottom and the noise, of values that are no part of a low stretch that goes on."""

    needs_all = True
    quiet: tuple[str, float, float] | None = None
    steady: tuple[str, float, float] | None = None

    def __init__(self, rule: CrashRule) -> None:
        """Start with nothing seen."""
        self.needs: tuple[str, ...] = (rule.metric,)
        self._metric, self._window, self._settle_for = rule.metric, rule.window, rule.settle
        self._sigmas, self._in_spreads, self._chance = rule.sigmas, rule.spreads, rule.chance
        self._lefts = tuple(band.left for band in rule.bands)
        self._recent: deque[float] = deque(maxlen=rule.window)
        self._before = History(rule.level)
        self._low: deque[float] = deque(maxlen=_NOISE_WINDOW)  # of the stretch that goes on, and no longer the newest
        self._noise: deque[float] = deque(maxlen=_NOISE_WINDOW)
        self._spreads: deque[float] = deque(maxlen=_NOISE_WINDOW)
        self._best = -math.inf
        self._bottom = 0.0
        self._settled = 0
        self._lows = [0] * len(rule.bands)  # by level: how many of those that have settled were low
        self._streak = [0] * len(rule.bands)  # and how many were, up to the newest

    def read(self, values: Mapping[str, float], *, firing: bool) -> Reading | None:
        """Hold the newest values against the level; None where the value is no number."""
        recent, value = self._recent, values[self._metric]
        if not abs(value) < MOST:  # nor any whose sums overflow
            return None
        if len(recent) == self._window:
            self._leave(recent[0])
        recent.append(value)
        spread = next((values[name] for name in _SPREADS if name in values), math.nan)
        if abs(spread) < MOST and not firing:
            self._spreads.append(spread)
        if not self._low_at(0, value):
            self._streak = [0] * len(self._lefts)
            return Reading(0, 0, self._metric, value, None) if firing else CALM
        rank, mean = self._fallen()
        if not rank and not firing:
            return CALM
        note = f"the level was {self._best:.4g}, the bottom is {self._bottom:.4g}" if rank else ""
        limit = self._bottom + self._lefts[max(rank - 1, 0)] * (self._best - self._bottom)
        return Reading(rank, rank, self._metric, mean, limit, note, self._window - 1 if rank else 0)

    def columns(self, given: Container[str]) -> tuple[str, ...]:
        """Return the metric, and what single rewards differ by, where that is given."""
        return (self._metric, *[name for name in _SPREADS if name in given][:1])

    def sleep(self) -> tuple[Interval, ...] | None:
        """Return between what a value is neither low, nor so high that the level may rise to where it is."""
        recent = self._recent
        if self._settled < self._settle_for or self._low or any(self._streak) or len(recent) < self._window:
            return None
        top, bottom = max(self._best, *self._before.values, *recent), self._bottom
        high = top + _HIGHER * (top - bottom)
        low = bottom + _EACH * self._lefts[0] * (high - bottom)
        low += _SAFE * (abs(low) + abs(bottom))
        if not self._height() > 0 or not bottom < low < high < MOST or min(recent) <= low:
            return None
        return (low, high), (-_FINITE, _FINITE)

    def catch_up(self, columns: Sequence[tuple[float, ...]]) -> None:
        """Settle those that are among the newest no more; none of them is low."""
        values, before = columns[0], self._before
        kept = [*self._recent, *values]
        left = kept[: len(values)]
        self._recent.extend(values)
        self._noise.extend(left)
        self._settled += len(left)
        best = self._best
        if sum(value > best for value in (*before.values, *left)) < len(before) // 2:  # no median can be above it
            before.extend(left)
        else:
            for value in left:
                before.add(value)
                self._best = max(self._best, before.median())
        if len(columns) > 1:
            self._spreads.extend(columns[1])

    def _low_at(self, level: int, value: float) -> bool:
        """Return whether one value is low by itself: never where there is no level yet."""
        return value - self._bottom <= _EACH * self._lefts[level] * (self._best - self._bottom) and self._height() > 0

    def _height(self) -> float:
        return self._best - self._bottom

    def _fallen(self) -> tuple[int, float]:
        """Return how many levels the newest values have fallen through, and where they are."""
        self._follow()
        recent, window = self._recent, self._window
        mean = max(math.fsum(recent) / len(recent), sorted(recent)[len(recent) // 2])  # most of them, and on average
        left = (mean - self._bottom) / self._height()
        if len(recent) < window or left > self._lefts[0] or not self._beyond_noise(mean):
            return 0, mean
        return sum(left <= most and self._no_chance(level) for level, most in enumerate(self._lefts)), mean

    def _leave(self, value: float) -> None:
        """Take a value that is one of the newest no more; those of a low stretch wait until it is over."""
        if self._low_at(0, value):
            self._low.append(value)
            return
        for kept in (*self._low, value) if self._low else (value,):
            self._settle(kept)
        self._low.clear()

    def _settle(self, value: float) -> None:
        if self._low_at(0, value):
            for level in range(len(self._lefts)):
                self._lows[level] += self._low_at(level, value)
        self._before.add(value)
        self._noise.append(value)
        self._bottom = min(self._bottom, value)
        self._settled += 1
        if self._settled >= self._settle_for:
            self._best = max(self._best, self._before.median())

    def _follow(self) -> None:
        """Count on how long the newest values have been low; there may have been no level yet for those in hand."""
        for level in range(len(self._lefts)):
            low = len(self._recent)
            for back, value in enumerate(reversed(self._recent)):
                if not self._low_at(level, value):
                    low = back
                    break
            whole = low == self._window
            self._streak[level] = max(self._streak[level] + 1, low) if whole else low

    def _no_chance(self, level: int) -> bool:
        """Return whether the stretch of low values is longer than chance makes it."""
        streak, count, before = self._streak[level], self._settled + 1, self._lows[level] + 0.5
        if streak < self._window:
            return False
        chance = float(count)  # of that many low values in a row anywhere, predicted from the rate until then
        for already in range(min(streak, _LONGEST)):
            chance *= min(1.0, (before + already) / (count + already))
        return chance <= self._chance

    def _beyond_noise(self, mean: float) -> bool:
        fall, noise = self._best - mean, _scatter(list(self._noise))
        spread = math.hypot(*self._spreads) / math.sqrt(len(self._spreads) or 1)
        return fall > self._sigmas * noise and fall > self._in_spreads * spread

    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered."""
        return {
            "recent": list(self._recent), "before": self._before.state_dict(),
            "noise": list(self._noise), "low": list(self._low),
            "best": None if math.isinf(self._best) else self._best, "bottom": self._bottom,
            "spreads": list(self._spreads),
            "settled": self._settled, "lows": list(self._lows), "streak": list(self._streak),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        self._recent = deque(state["recent"], maxlen=self._window)
        self._before.load_state_dict(state["before"])
        self._noise = deque(state["noise"], maxlen=_NOISE_WINDOW)
        self._low = deque(state["low"], maxlen=_NOISE_WINDOW)
        self._spreads = deque(state["spreads"], maxlen=_NOISE_WINDOW)
        self._settled, self._lows, self._streak = state["settled"], list(state["lows"]), list(state["streak"])
        self._best, self._bottom = -math.inf if state["best"] is None else state["best"], state["bottom"]


def _scatter(values: Sequence[float]) -> float:
    """Return the noise of values: by their own scatter, or by how far neighbours differ, where that is less.

    A level that slides down scatters, and its neighbours differ little. Where most values, or differences, are equal
    the robust measure says nothing, and the usual one counts.
    """
    middle = statistics.median(values)
    robust = _MAD * statistics.median(abs(value - middle) for value in values)
    if not robust:
        return math.hypot(*(value - middle for value in values)) / math.sqrt(len(values))
    apart = [abs(after - before) for before, after in pairwise(values)]
    lasting = _LASTING * statistics.median(apart) / _NORMAL if apart else 0.0
    return min(robust, lasting or robust)
