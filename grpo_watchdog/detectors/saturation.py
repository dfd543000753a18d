"""Saturation: a mean ratio that is only the image of a clamp, or that contradicts its own log-ratio.

Two invariants. exp is convex, so ln(mean ratio) >= mean log-ratio (Jensen); and a mean over many samples
equals exp(clamp) to the last float32 digits only where every sample sits on the clamp. 485165216 is
exp(20) to one float32 ulp.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from grpo_watchdog.detectors.detector import CALM, Memoryless, Reading
from grpo_watchdog.rule import Level, Number, Rule

_ULPS = 4 * 2.0**-23  # what float32 arithmetic may lose in a mean of equal numbers


class SaturationRule(Rule):
    """Level 1 (a notice): Jensen is broken. Level 2 (a warning): the ratio equals a clamp.

    Attributes:
        log_clamps: clamps of the log-ratio in use in the field; both signs are tried [nats].
        ratio_clamps: clamps of the ratio itself.
        slack: how far Jensen may be broken before it is said, for rounding and for different reductions [nats].
    """

    kind: Literal["saturation"]
    log_clamps: list[Annotated[Number, Field(gt=0, le=80)]]
    ratio_clamps: list[Annotated[Number, Field(gt=0)]]
    slack: Annotated[Number, Field(ge=0)] = 1e-3

    @property
    def ladder(self) -> tuple[Level, ...]:
        """Return the two levels."""
        return (Level(severity="notice"), Level(severity="warning"))


class SaturationDetector(Memoryless):
    """Holds the ratio against the clamps, and against the log-ratio."""

    def __init__(self, rule: SaturationRule) -> None:
        """Precompute what the clamps look like in the ratio."""
        self.needs = ("mean_ratio",)
        self._slack = rule.slack
        self._images = {
            **{math.exp(sign * clamp): f"exp({sign * clamp:g})" for clamp in rule.log_clamps for sign in (1, -1)},
            **{clamp: f"a clamp at {clamp:g}" for clamp in rule.ratio_clamps},
        }
        # No clamp in use lies near 1: between these two the healthy are spared the search.
        self._low = max((image for image in self._images if image <= 1), default=0.0) * (1 + 2 * _ULPS)
        self._high = min((image for image in self._images if image >= 1), default=math.inf) * (1 - 2 * _ULPS)

    def read(self, values: Mapping[str, float], *, firing: bool) -> Reading | None:
        """Return which invariant is broken; None where the ratio is not a number and shows neither."""
        ratio, log_ratio = values["mean_ratio"], values.get("log_ratio")
        if math.isnan(ratio):
            return None
        if not self._low < ratio < self._high:
            for image, what in self._images.items():
                if abs(ratio - image) <= _ULPS * image:
                    return Reading(2, 2, "mean_ratio", ratio, image, f"equals {what}: every sample sits on the clamp")
        if log_ratio is not None and math.isfinite(log_ratio) and 0 < ratio < math.inf:
            ln_ratio = math.log(ratio)
            if ln_ratio < log_ratio - self._slack * max(1.0, abs(log_ratio)):
                note = f"ln(mean_ratio) = {ln_ratio:.4g} is below the mean log_ratio {log_ratio:.6g} (Jensen)"
                return Reading(1, 1, "mean_ratio", ratio, None, note)
        return Reading(0, 0, "mean_ratio", ratio, None) if firing else CALM
