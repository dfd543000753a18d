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
    crash,
    drift,
    fall,
    first,
    flat,
    gain,
    identity,
    jointly,
    mostly,
    moved,
    near,
    nonfinite,
    outside,
    saturation,
    shrunk,
    still,
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
    | first.FirstRule
    | crash.CrashRule
    | gain.GainRule
    | shrunk.ShrunkRule
    | still.StillRule
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
    "first": first.FirstDetector,
    "crash": crash.CrashDetector,
    "gain": gain.GainDetector,
    "shrunk": shrunk.ShrunkDetector,
    "still": still.StillDetector,
    "loss_identity": identity.IdentityDetector,
    "trend": trend.TrendDetector,
    "drift": drift.DriftDetector,
}


def detector(rule: Rule) -> Detector:
    """Return a fresh detector for a rule."""
    made = KINDS[rule.kind](rule)
    return made if rule.out_of is None else mostly.Mostly(made, rule.for_, rule.out_of, len(rule.ladder))


__all__ = ["KINDS", "AnyRule", "Detector", "Reading", "detector"]
