"""Near: one value that stays at a number it should not stay at, or should."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from grpo_watchdog.detectors.detector import Memoryless, Reading
from grpo_watchdog.rule import MetricName, Number, SingleRule


class NearRule(SingleRule):
    """Holds while a metric lies within a distance of a number.

    Attributes:
        metric: which.
        value: the number.
        within: the distance, itself included.
    """

    kind: Literal["near"]
    metric: MetricName
    value: Number = 0.0
    within: Annotated[Number, Field(ge=0)]


class NearDetector(Memoryless):
    """Holds a value against a number."""

    def __init__(self, rule: NearRule) -> None:
        """Keep the number."""
        self._rule = rule
        self.needs = (rule.metric,)
        self._low, self._high = rule.value - rule.within, rule.value + rule.within
        self.steady = (rule.metric, self._low, self._high)

    def read(self, values: Mapping[str, float], *, firing: bool) -> Reading:  # noqa: ARG002
        """Return whether the value is near."""
        value = values[self._rule.metric]
        near = int(self._low <= value <= self._high)
        return Reading(near, near, self._rule.metric, value, self._rule.value)
