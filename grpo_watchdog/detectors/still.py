"""Still: a metric that has given the same value, to the bit, on most observations ever since the run began.

A reward that stands still after it moved is a task that was solved, or a policy that died: other rules tell. One that
never moved is a run in which nothing is earned. Values printed to few decimals repeat by chance, not most of the time.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from grpo_watchdog.detectors.detector import CALM, Reading
from grpo_watchdog.detectors.sleep import MOST, Interval
from grpo_watchdog.rule import MetricName, Number, SingleRule


class StillRule(SingleRule):
    """Holds from `settle` observations on while one value was given on most of all.

    Attributes:
        metric: which.
        share: of the observations that must give it.
        share_on_top: the same where no value was above it: whatever there is to earn was never seen.
        settle: observations before anything is said [observations].
    """

    kind: Literal["still"]
    metric: MetricName
    share: Annotated[Number, Field(ge=0.3, le=1)] = 0.75
    share_on_top: Annotated[Number, Field(ge=0.3, le=1)] = 0.5
    settle: Annotated[int, Field(ge=4, le=10_000)] = 32


class StillDetector:
    """Counts values until it is decided which is the usual one, and from there on how often it comes."""

    needs_all = True
    quiet: tuple[str, float, float] | None = None
    steady: tuple[str, float, float] | None = None

    def __init__(self, rule: StillRule) -> None:
        """Start with nothing seen."""
        self._metric, self._settle = rule.metric, rule.settle
        self._share, self._share_on_top = rule.share, rule.share_on_top
        self.needs: tuple[str, ...] = (rule.metric,)
        self._counts: Counter[float] = Counter()
        self._usual: float | None = None
        self._highest = -math.inf
        self._times = self._seen = 0
        self._moved = False

    def read(self, values: Mapping[str, float], *, firing: bool) -> Reading | None:
        """Return whether it stands still; None where the value is no number."""
        if self._moved and not firing:
            return CALM
        value = values[self._metric]
        if self._moved:
            return Reading(0, 0, self._metric, value, None)
        if not abs(value) < MOST:  # nor any whose sums overflow
            return None
        self._seen += 1
        self._highest = max(self._highest, value)
        if self._usual is None:
            self._counts[value] += 1
            if self._seen < self._settle:
                return CALM
            self._usual, self._times = self._counts.most_common(1)[0]
            self._counts.clear()
        else:
            self._times += value == self._usual
        share = self._share if self._highest > self._usual else self._share_on_top
        if self._times < share * self._seen:
            self._moved = True  # for good
            return Reading(0, 0, self._metric, value, None) if firing else CALM
        note = f"{self._usual:.6g} on {self._times} of {self._seen} observations"
        return Reading(1, 1, self._metric, value, self._usual, note)

    def columns(self, given: Container[str]) -> tuple[str, ...]:  # noqa: ARG002
        """Return the metric."""
        return self.needs

    def sleep(self) -> tuple[Interval, ...] | None:
        """Return every value, once it has moved."""
        return ((-MOST, MOST),) if self._moved else None

    def catch_up(self, columns: Sequence[tuple[float, ...]]) -> None:
        """Learn nothing: it has moved."""

    def state_dict(self) -> dict[str, Any]:
        """Return what was counted."""
        return {
            "counts": [[value, count] for value, count in self._counts.items()], "usual": self._usual,
            "times": self._times, "seen": self._seen, "moved": self._moved,
            "highest": None if math.isinf(self._highest) else self._highest,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        self._counts = Counter(dict(state["counts"]))
        self._usual, self._times = state["usual"], state["times"]
        self._seen, self._moved = state["seen"], state["moved"]
        self._highest = -math.inf if state["highest"] is None else state["highest"]
