"""The kinds of rule, one file a kind: its pydantic model and the detector that evaluates it.

A new kind is a file here with both, and a line in KINDS and in AnyRule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field

from grpo_watchdog.detectors import (
    band,
    collapse,
    drift,
    fall,
    flat,
    identity,
    jointly,
    moved,
    near,
    nonfinite,
    outside,
    saturation,
    surge,
    trend,
    weight,
)
from grpo_watchdog.detectors.detector import Detector, Reading
from grpo_watchdog.rule import Rule

AnyRule = Annotated[
    band.BandRule
    | outside.OutsideRule
    | near.NearRule
    | nonfinite.NonfiniteRule
    | collapse.CollapseRule
    | saturation.SaturationRule
    | weight.WeightRule
    | surge.SurgeRule
    | moved.MovedRule
    | jointly.JointlyRule
    | fall.FallRule
    | flat.FlatRule
    | identity.IdentityRule
    | trend.TrendRule
    | drift.DriftRule,
    Field(discriminator="kind"),
]

KINDS: dict[str, Callable[[Any], Detector]] = {
    "band": band.BandDetector,
    "outside": outside.OutsideDetector,
    "near": near.NearDetector,
    "nonfinite": nonfinite.NonfiniteDetector,
    "collapse": collapse.CollapseDetector,
    "saturation": saturation.SaturationDetector,
    "loss_weight": weight.WeightDetector,
    "surge": surge.SurgeDetector,
    "moved": moved.MovedDetector,
    "jointly": jointly.JointlyDetector,
    "fall": fall.FallDetector,
    "flat": flat.FlatDetector,
    "loss_identity": identity.IdentityDetector,
    "trend": trend.TrendDetector,
    "drift": drift.DriftDetector,
}


def detector(rule: Rule) -> Detector:
    """Return a fresh detector for a rule."""
    return KINDS[rule.kind](rule)


__all__ = ["KINDS", "AnyRule", "Detector", "Reading", "detector"]
