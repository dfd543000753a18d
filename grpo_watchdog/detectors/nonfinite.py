"""Nonfinite: NaN or infinity in any of several metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from grpo_watchdog.detectors.detector import CALM, Memoryless, Reading
from grpo_watchdog.rule import MetricName, SingleRule


class NonfiniteRule(SingleRule):
    """Holds while any of the metrics is NaN or infinite.

    Attributes:
        metrics: which are looked at.
        at_least: how many of them must be at once.
    """

    kind: Literal["nonfinite"]
    metrics: Annotated[list[MetricName], Field(min_length=1)]
    at_least: Annotated[int, Field(ge=1)] = 1


class NonfiniteDetector(Memoryless):
    """Looks for NaN and infinity; one sum over all values where there is none."""

    needs_all = False

    def __init__(self, rule: NonfiniteRule) -> None:
        """Keep the names."""
        self.needs, self._at_least = tuple(rule.metrics), rule.at_least

    def read(self, values: Mapping[str, float], *, firing: bool) -> Reading:
        """Return the first value that is not finite, in the order of the rule."""
        if not math.isfinite(sum(values.values())):
            found = [name for name in self.needs if not math.isfinite(values.get(name, 0.0))]
            if len(found) >= self._at_least:
                note = f"so are {', '.join(found[1:])}" if len(found) > 1 else ""
                return Reading(1, 1, found[0], values[found[0]], None, note)
        return Reading(0, 0, self.needs[0], values.get(self.needs[0], 0.0), None) if firing else CALM
