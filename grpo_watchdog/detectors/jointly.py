"""Jointly: several signs that mean something only together."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from grpo_watchdog.detectors.collapse import Sign
from grpo_watchdog.detectors.detector import CALM, Memoryless, Reading
from grpo_watchdog.rule import SingleRule


class JointlyRule(SingleRule):
    """Holds while all signs are shown at once.

    Attributes:
        signs: the first is what a report shows.
    """

    kind: Literal["jointly"]
    signs: Annotated[list[Sign], Field(min_length=2)]


class JointlyDetector(Memoryless):
    """Looks for all signs. Blind where one of the metrics is missing."""

    def __init__(self, rule: JointlyRule) -> None:
        """Keep the signs as (metric, low, high): shown inside."""
        self.needs = tuple(dict.fromkeys(sign.metric for sign in rule.signs))
        self._signs = [
            (
                sign.metric,
                -math.inf if sign.at_least is None else sign.at_least,
                math.inf if sign.at_most is None else sign.at_most,
            )
            for sign in rule.signs
        ]
        metric, low, high = self._signs[0]  # while this one is not shown, they are not all
        apart = (-sys.float_info.max, math.nextafter(low, -math.inf)) if high == math.inf else (
            math.nextafter(high, math.inf), sys.float_info.max)  # fmt: skip
        self.quiet = (metric, *apart)

    def read(self, values: Mapping[str, float], *, firing: bool) -> Reading:
        """Return whether all are shown; not-a-number shows nothing."""
        shown = all(low <= values[metric] <= high for metric, low, high in self._signs)
        if not shown and not firing:
            return CALM
        metric, low, high = self._signs[0]
        others = ", ".join(f"{name} {values[name]:.4g}" for name, _, _ in self._signs[1:])
        limit = low if math.isfinite(low) else high
        return Reading(int(shown), int(shown), metric, values[metric], limit, f"with {others}" if shown else "")
