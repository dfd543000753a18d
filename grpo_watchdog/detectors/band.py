"""Bands: the further out a value lies, the higher the level."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from grpo_watchdog.detectors.detector import Memoryless, Reading
from grpo_watchdog.rule import RANK, Level, MetricName, Number, Rule


class Band(Level):
    """One band, open to the next: `from` includes its edge, `above` does not."""

    from_: Number | None = Field(default=None, alias="from")
    above: Number | None = None

    @model_validator(mode="after")
    def _one_edge(self) -> Band:
        if (self.from_ is None) == (self.above is None):
            raise ValueError("a band has exactly one edge: from (the edge belongs to it) or above (it does not)")
        return self

    @property
    def edge(self) -> float:
        """Return the edge."""
        return self.above if self.from_ is None else self.from_  # type: ignore[return-value]

    def reached(self, value: float) -> bool:
        """Return whether a value lies in this band or beyond."""
        return value > self.edge if self.from_ is None else value >= self.edge


class BandRule(Rule):
    """Levels by the size of one metric.

    Attributes:
        metric: which.
        absolute: whether the sign is ignored.
        leave: a band is left only below this fraction of its edge (hysteresis).
    """

    kind: Literal["band"]
    metric: MetricName
    absolute: bool = False
    leave: Annotated[float, Field(gt=0, le=1)] = 1.0
    bands: Annotated[list[Band], Field(min_length=1, max_length=8)]

    @field_validator("bands")
    @classmethod
    def _rising(cls, bands: list[Band]) -> list[Band]:
        for lower, upper in pairwise(bands):
            if upper.edge <= lower.edge:
                raise ValueError(f"bands must rise, and {upper.edge:g} follows {lower.edge:g}")
            if RANK[upper.severity] < RANK[lower.severity]:
                raise ValueError(f"no severity may fall, and {upper.severity} follows {lower.severity}")
        return bands

    @model_validator(mode="after")
    def _no_edge_below_0(self) -> BandRule:
        if self.absolute and self.bands[0].edge < 0:
            raise ValueError(f"an absolute value has no edge below 0, as {self.bands[0].edge:g} is")
        return self

    @property
    def ladder(self) -> tuple[Level, ...]:
        """Return the bands."""
        return tuple(self.bands)


class BandDetector(Memoryless):
    """Finds the band of a value. Non-finite counts as the last one."""

    def __init__(self, rule: BandRule) -> None:
        """Precompute the interval in which nothing can be reached; infinity lies in no such interval."""
        self._bands, self._metric = rule.bands, rule.metric
        self._absolute, self._leave = rule.absolute, rule.leave
        self.needs = (rule.metric,)
        first = rule.bands[0]
        high = first.edge if first.from_ is None else math.nextafter(first.edge, -math.inf)
        self.quiet = (rule.metric, -high if rule.absolute else -sys.float_info.max, high)

    def read(self, values: Mapping[str, float], *, firing: bool) -> Reading:  # noqa: ARG002
        """Return the band."""
        value = values[self._metric]
        if not math.isfinite(value):
            top = len(self._bands)
            return Reading(top, top, self._metric, value, self._bands[-1].edge)
        size = abs(value) if self._absolute else value
        rank = sum(band.reached(size) for band in self._bands)
        sticky = sum(
            band.reached(size) or size >= band.edge - (1 - self._leave) * abs(band.edge) for band in self._bands
        )
        return Reading(rank, sticky, self._metric, value, self._bands[max(rank - 1, 0)].edge)
