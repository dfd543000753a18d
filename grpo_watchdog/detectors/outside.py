"""Outside: one value above or below a normal range."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from pydantic import model_validator

from grpo_watchdog.detectors.detector import Memoryless, Reading
from grpo_watchdog.rule import MetricName, Number, SingleRule


class OutsideRule(SingleRule):
    """Holds while a metric lies outside [low, high]; both ends belong to the range.

    Attributes:
        metric: which.
        low: lower end, or none.
        high: upper end, or none.
    """

    kind: Literal["outside"]
    metric: MetricName
    low: Number | None = None
    high: Number | None = None

    @model_validator(mode="after")
    def _a_range(self) -> OutsideRule:
        if self.low is None and self.high is None:
            raise ValueError("outside needs low, high or both")
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ValueError(f"low must be below high, not {self.low:g} and {self.high:g}")
        return self


class OutsideDetector(Memoryless):
    """Holds a value against a range."""

    def __init__(self, rule: OutsideRule) -> None:
        """Keep the range."""
        self._metric = rule.metric
        self._low = -math.inf if rule.low is None else rule.low
        self._high = math.inf if rule.high is None else rule.high
        self.needs = (rule.metric,)
        self.quiet = (rule.metric, self._low, self._high)

    def read(self, values: Mapping[str, float], *, firing: bool) -> Reading:  # noqa: ARG002
        """Return whether the value lies outside; not-a-number does."""
        value = values[self._metric]
        outside = int(not self._low <= value <= self._high)
        limit = self._low if value < self._low else self._high
        return Reading(outside, outside, self._metric, value, limit if math.isfinite(limit) else self._low)
