"""Shrunk: metrics that are all down to a small part of the highest level that this run had of each.

A level is a running median: one long answer is none.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from grpo_watchdog.detectors.detector import CALM, Reading
from grpo_watchdog.detectors.history import History
from grpo_watchdog.detectors.sleep import MOST, Interval
from grpo_watchdog.rule import MetricName, Number, SingleRule

_LEVEL = 8  # values in a running median
_LEAST = 3  # that make one
_HIGHER = 1.25  # times all that there was before, a value may be until a sleeper looks
_SAFE = 1e-9  # relative: far beyond what rounding does to a limit
_FINITE = 0.1 * MOST


class ShrunkRule(SingleRule):
    """Holds while every one of the metrics is at most `to` times its own highest.

    Attributes:
        metrics: quantities that are never below 0.
        to: the fraction.
        from_first: whether the first value counts by itself: a run may collapse before its second row.
        least: the first metric's highest must be at least this for anything to be said, in its unit.
    """

    kind: Literal["shrunk"]
    metrics: Annotated[list[MetricName], Field(min_length=1)]
    to: Annotated[Number, Field(gt=0, lt=1)]
    from_first: bool = False
    least: Annotated[Number, Field(ge=0)] = 0.0


class ShrunkDetector:
    """Keeps the highest of each."""

    needs_all = True
    quiet: tuple[str, float, float] | None = None
    steady: tuple[str, float, float] | None = None

    def __init__(self, rule: ShrunkRule) -> None:
        """Start with nothing seen."""
        self._to, self._from_first, self._least = rule.to, rule.from_first, rule.least
        self.needs = tuple(rule.metrics)
        self._recent = {name: History(_LEVEL) for name in rule.metrics}
        self._highest = dict.fromkeys(rule.metrics, 0.0)

    def read(self, values: Mapping[str, float], *, firing: bool) -> Reading | None:
        """Hold each value against its highest; None where one is no number."""
        highest, to, shrunk = self._highest, self._to, True
        for name, recent in self._recent.items():
            value = values[name]
            if not abs(value) < MOST:  # nor any whose sums overflow
                return None
            recent.add(value)
            if len(recent) >= _LEAST:
                highest[name] = max(highest[name], recent.median())
            elif len(recent) == 1 and self._from_first:
                highest[name] = value
            shrunk = shrunk and value <= to * highest[name] and highest[name] > 0
        first = self.needs[0]
        shrunk = shrunk and highest[first] >= self._least
        if not shrunk and not firing:
            return CALM
        note = ", ".join(f"{name} {values[name]:.4g} was {highest[name]:.4g}" for name in self.needs) if shrunk else ""
        return Reading(int(shrunk), int(shrunk), first, values[first], to * highest[first], note)

    def columns(self, given: Container[str]) -> tuple[str, ...]:  # noqa: ARG002
        """Return the metrics."""
        return self.needs

    def sleep(self) -> tuple[Interval, ...] | None:
        """Return between what the first metric is not shrunk, whatever the others are."""
        first = self._recent[self.needs[0]]
        if any(len(recent) < _LEAST for recent in self._recent.values()):
            return None
        high = _HIGHER * max(self._highest[self.needs[0]], *first.values)
        low = (1 + _SAFE) * self._to * high
        if not 0 < low < high < MOST:
            return None
        return (low, high), *[(-_FINITE, _FINITE)] * (len(self.needs) - 1)

    def catch_up(self, columns: Sequence[tuple[float, ...]]) -> None:
        """Learn the values, and the highest level among them."""
        for (name, recent), values in zip(self._recent.items(), columns, strict=True):
            highest = self._highest[name]
            if sum(value > highest for value in (*recent.values, *values)) < len(recent) // 2:
                recent.extend(values)  # no median can be above it
                continue
            for value in values:
                recent.add(value)
                self._highest[name] = max(self._highest[name], recent.median())

    def state_dict(self) -> dict[str, Any]:
        """Return the highest and the last values."""
        recent = {name: kept.state_dict() for name, kept in self._recent.items()}
        return {"recent": recent, "highest": dict(self._highest)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        for name, kept in state["recent"].items():
            self._recent[name].load_state_dict(kept)
        self._highest = dict(state["highest"])
