"""Collapse: any one of several signs that all samples of a group are worth the same."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from grpo_watchdog.detectors.detector import CALM, Memoryless, Reading
from grpo_watchdog.rule import MetricName, Model, Number, SingleRule


class Sign(Model):
    """One sign: a metric at or below, or at or above, a limit."""

    metric: MetricName
    at_most: Number | None = None
    at_least: Number | None = None

    @model_validator(mode="after")
    def _one_side(self) -> Sign:
        if (self.at_most is None) == (self.at_least is None):
            raise ValueError("a sign has exactly one of at_most and at_least")
        return self


class CollapseRule(SingleRule):
    """Holds while any sign is shown; `for` is the window over which it must be.

    Attributes:
        signs: in the order of their worth as evidence.
    """

    kind: Literal["collapse"]
    signs: Annotated[list[Sign], Field(min_length=1)]


class CollapseDetector(Memoryless):
    """Looks for the first sign shown. Blind only where none of the metrics is there."""

    needs_all = False

    def __init__(self, rule: CollapseRule) -> None:
        """Keep the signs as (metric, at most, at least, limit)."""
        self.needs = tuple(sign.metric for sign in rule.signs)
        self._signs = [
            (sign.metric, -math.inf if sign.at_most is None else sign.at_most, math.inf, sign.at_most)
            if sign.at_least is None
            else (sign.metric, -math.inf, sign.at_least, sign.at_least)
            for sign in rule.signs
        ]

    def read(self, values: Mapping[str, float], *, firing: bool) -> Reading | None:
        """Return the first sign shown, else the first that could be looked at; not-a-number shows nothing."""
        calm: Reading | None = None
        for metric, at_most, at_least, limit in self._signs:
            value = values.get(metric)
            if value is None or math.isnan(value):
                continue
            if value <= at_most or value >= at_least:
                return Reading(1, 1, metric, value, limit)
            if calm is None:
                calm = Reading(0, 0, metric, value, limit) if firing else CALM
        return calm
