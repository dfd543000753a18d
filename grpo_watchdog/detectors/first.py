"""First: the first value that a metric ever has, held against bands: how the run began."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from grpo_watchdog.detectors.band import BandDetector, BandRule
from grpo_watchdog.detectors.detector import CALM, Reading


class FirstRule(BandRule):
    """Levels by the size of the first value; whatever follows is not looked at."""

    kind: Literal["first"]  # type: ignore[assignment]


class FirstDetector(BandDetector):
    """Looks once."""

    def __init__(self, rule: FirstRule) -> None:
        """Look at whatever comes first, in bands or not."""
        super().__init__(rule)
        self._looked = False
        self.quiet = (rule.metric, float("inf"), float("-inf"))  # nothing lies in it: always look

    def read(self, values: Mapping[str, float], *, firing: bool) -> Reading:
        """Return the band of the first value, then calm."""
        if self._looked or not math.isfinite(values[self._metric]):
            return Reading(0, 0, self._metric, values[self._metric], None) if firing else CALM
        self._looked = True
        return super().read(values, firing=firing)

    def state_dict(self) -> dict[str, Any]:
        """Return whether it has looked."""
        return {"looked": self._looked}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        self._looked = state["looked"]
