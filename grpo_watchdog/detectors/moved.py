"""Moved: a setting that leaves everything it ever was in this run, within one observation.

Schedules do not do that: a warm-up passes its own maximum by a little on each step, a decay or a restart stays below.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from grpo_watchdog.detectors.detector import CALM, Reading
from grpo_watchdog.detectors.sleep import MOST, Interval
from grpo_watchdog.rule import MetricName, Number, SingleRule


class MovedRule(SingleRule):
    """Holds while a setting is beyond `factor` times its own extreme so far.

    Attributes:
        metrics: the setting, by the names under which it may be given; the first that is there is looked at.
        direction: "up" (beyond the largest so far) or "down" (below the smallest so far).
        factor: how far beyond.
        settle: observations before anything can be said: a warm-up begins near 0 [observations].
        accept_after: observations out there after which it is taken as the run's own [observations].
    """

    kind: Literal["moved"]
    metrics: Annotated[list[MetricName], Field(min_length=1)]
    direction: Literal["up", "down"]
    factor: Annotated[Number, Field(gt=1)] = 2.0
    settle: Annotated[int, Field(ge=1, le=10_000)] = 8
    accept_after: Annotated[int, Field(ge=1, le=1_000_000)] = 200


class MovedDetector:
    """Keeps the extreme."""

    needs_all = False
    quiet: tuple[str, float, float] | None = None
    steady: tuple[str, float, float] | None = None

    def __init__(self, rule: MovedRule) -> None:
        """Start with nothing seen."""
        self._settle, self._factor, self._accept_after = (
            rule.settle,
            rule.factor,
            rule.accept_after,
        )  # a look at a pydantic model costs several at a plain attribute
        self._up = rule.direction == "up"
        self.needs: tuple[str, ...] = tuple(rule.metrics)
        self._extreme: float | None = None
        self._seen = self._out = 0

    def read(self, values: Mapping[str, float], *, firing: bool) -> Reading | None:
        """Hold the setting against its extreme; None where it is not a number, or not yet anything."""
        name = next(name for name in self.needs if name in values)
        value, extreme = values[name], self._extreme
        if not math.isfinite(value):
            return None
        if extreme and self._seen >= self._settle:
            limit = extreme * self._factor if self._up else extreme / self._factor
            if (value > limit if self._up else value < limit) and self._out < self._accept_after:
                self._out += 1
                note = f"the {'most' if self._up else 'least'} that it was so far is {extreme:.4g}"
                return Reading(1, 1, name, value, limit, note)
        self._seen = self._seen + 1 if extreme or value else 0  # 0 is not yet a setting: a warm-up begins there
        self._out = 0
        if extreme is None or (value > extreme if self._up else value < extreme):
            self._extreme = value
        return Reading(0, 0, name, value, None) if firing else CALM

    def columns(self, given: Container[str]) -> tuple[str, ...]:
        """Return the setting, by the name under which it is looked at."""
        return tuple(name for name in self.needs if name in given)[:1]

    def sleep(self) -> tuple[Interval, ...] | None:
        """Return what is no further out than the extreme."""
        if self._extreme is None or not self._extreme > 0 or self._out:
            return None
        return ((-MOST, self._extreme),) if self._up else ((self._extreme, MOST),)

    def catch_up(self, columns: Sequence[tuple[float, ...]]) -> None:
        """Count the values: none was further out."""
        self._seen += len(columns[0])

    def state_dict(self) -> dict[str, Any]:
        """Return the extreme."""
        return {"extreme": self._extreme, "seen": self._seen, "out": self._out}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the extreme back."""
        self._extreme, self._seen, self._out = state["extreme"], state["seen"], state["out"]
