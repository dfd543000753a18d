"""Surge: a metric that leaves the run's own level, within one observation, by more than its noise and by enough.

The level is the median of the last `window` values, the noise their robust deviation; on the log scale for what is
positive and spans decades (norms, KL), on the linear one for the rest. While the value stays out, nothing enters the
level; a value that stays out for `accept_after` observations is the run's new level.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from grpo_watchdog.detectors.detector import CALM, Reading
from grpo_watchdog.detectors.history import History
from grpo_watchdog.rule import MetricName, Number, Positive, SingleRule


class SurgeRule(SingleRule):
    """Holds while a metric is away from its own level in one direction.

    Attributes:
        metric: which.
        direction: "up" or "down".
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
    direction: Literal["up", "down"] = "up"
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
        self._sign = 1.0 if rule.direction == "up" else -1.0
        self._by = math.log(rule.by) if self._log else rule.by
        self.needs: tuple[str, ...] = (rule.metric,)
        self._level = History(rule.window)
        self._out = 0

    def read(self, values: Mapping[str, float], *, firing: bool) -> Reading | None:
        """Hold a value against the level; None where it has no place on the scale."""
        value, rule, level = values[self._rule.metric], self._rule, self._level
        if self._log:
            if not 0 < value < math.inf:
                return None
            place = math.log(value)
        else:
            place = value
            if not math.isfinite(value):
                return None
        if len(level) >= rule.settle:
            excess = self._sign * (place - level.median())
            if excess > self._by and abs(value) >= rule.floor and excess > rule.sigmas * level.deviation():
                self._out += 1
                if self._out <= rule.accept_after:
                    return self._reading(1, value)
                self._level = level = History(rule.window)
        self._out = 0
        level.add(place)
        return self._reading(0, value) if firing else CALM

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
