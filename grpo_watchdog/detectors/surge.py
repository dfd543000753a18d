"""Surge: a metric that leaves the run's own level, within one observation, by more than its noise and by enough.

The level is the median of the last `window` values, the noise their robust deviation; on the log scale for what is
positive and spans decades (norms, KL), on the linear one for the rest. While the value stays out, nothing enters the
level; a value that stays out for `accept_after` observations is the run's new level.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Container, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from grpo_watchdog.detectors.detector import CALM, Reading
from grpo_watchdog.detectors.history import History
from grpo_watchdog.detectors.sleep import MOST, NAP, Interval
from grpo_watchdog.rule import MetricName, Number, Positive, SingleRule

_SAFE = 1e-9  # relative: far beyond what rounding may do to a logarithm or a difference
_LARGEST = math.log(MOST)


class SurgeRule(SingleRule):
    """Holds while a metric is away from its own level in one direction.

    Attributes:
        metric: which.
        direction: "up", "down" or "both".
        scale: "log" (`by` is a factor above 1, values at or below 0 are not looked at) or "linear" (a difference).
        by: the least that counts: a factor, or a difference in the metric's unit.
        sigmas: the least that counts in robust standard deviations of the window.
        floor: the value must also be at least this large in size; for quantities that are nearly 0 in a healthy run.
        window: how many past values make the level [observations].
        settle: how many there must be before anything can be said [observations].
        accept_after: observations out there after which it is the new level [observations].
    """

    kind: Literal["surge"]
    metric: MetricName
    direction: Literal["up", "down", "both"] = "up"
    scale: Literal["log", "linear"] = "log"
    by: Positive
    sigmas: Annotated[Number, Field(ge=0)] = 6.0
    floor: Annotated[Number, Field(ge=0)] = 0.0
    window: Annotated[int, Field(ge=5, le=1000)] = 32
    settle: Annotated[int, Field(ge=3, le=1000)] = 8
    accept_after: Annotated[int, Field(ge=1, le=100_000)] = 100

    @model_validator(mode="after")
    def _a_factor(self) -> SurgeRule:
        if self.scale == "log" and self.by <= 1:
            raise ValueError(f"by is a factor above 1 on the log scale, not {self.by:g}")
        if self.settle > self.window:
            raise ValueError(f"settle must not be above window, and {self.settle} is above {self.window}")
        return self


class SurgeDetector:
    """Keeps the level."""

    needs_all = True
    quiet: tuple[str, float, float] | None = None
    steady: tuple[str, float, float] | None = None

    def __init__(self, rule: SurgeRule) -> None:
        """Start without a level."""
        self._rule = rule
        self._log = rule.scale == "log"
        self._sign = {"up": 1.0, "down": -1.0, "both": 0.0}[rule.direction]
        self._by = math.log(rule.by) if self._log else rule.by
        self._metric, self._settle, self._floor = rule.metric, rule.settle, rule.floor
        self.needs: tuple[str, ...] = (rule.metric,)
        self._level = History(rule.window)
        self._out = 0

    def read(self, values: Mapping[str, float], *, firing: bool) -> Reading | None:
        """Hold a value against the level; None where it has no place on the scale."""
        value, level = values[self._metric], self._level
        if self._log:
            if not 0 < value < math.inf:
                return None
            place = math.log(value)
        else:
            place = value
            if not math.isfinite(value):
                return None
        if len(level) >= self._settle:
            excess = place - level.median()
            excess = excess * self._sign or abs(excess)  # a sign of 0 takes either way
            if excess > self._by and abs(value) >= self._floor and excess > self._rule.sigmas * level.deviation():
                self._out += 1
                if self._out <= self._rule.accept_after:
                    return self._reading(1, value)
                self._level = level = History(self._rule.window)
        self._out = 0
        level.add(place)
        return self._reading(0, value) if firing else CALM

    def columns(self, given: Container[str]) -> tuple[str, ...]:  # noqa: ARG002
        """Return the metric."""
        return self.needs

    def sleep(self) -> tuple[Interval, ...] | None:
        """Return up to where a value is no surge from the lowest that the median may come to, or the highest."""
        median = self._level.between(NAP) if len(self._level) >= self._settle and not self._out else None
        if median is None:
            return None
        far = self._by - _SAFE * (1 + self._by + abs(median[0]) + abs(median[1]))
        low, high = median[1] - far, median[0] + far
        if self._log:
            low, high = math.exp(max(low, -_LARGEST)), math.exp(min(high, _LARGEST))
        if self._sign > 0:
            low = sys.float_info.min if self._log else -MOST
            if self._log and high < self._floor:
                high = math.nextafter(self._floor, 0)
        elif self._sign < 0:
            high = MOST
        return ((low, high),)

    def catch_up(self, columns: Sequence[tuple[float, ...]]) -> None:
        """Take the values into the level."""
        values = columns[0]
        self._level.extend(list(map(math.log, values)) if self._log else values)

    def _reading(self, rank: int, value: float) -> Reading:
        if not len(self._level):
            return Reading(rank, rank, self._rule.metric, value, None)
        usual = self._level.median()
        shown = math.exp(usual) if self._log else usual
        note = f"this run's own level is {shown:.4g}" if rank else ""
        return Reading(rank, rank, self._rule.metric, value, None, note)

    def state_dict(self) -> dict[str, Any]:
        """Return the level."""
        return {"level": self._level.state_dict(), "out": self._out}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the level back."""
        self._level.load_state_dict(state["level"])
        self._out = state["out"]
