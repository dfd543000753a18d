"""Gain: a metric (the reward) that is well above where this run began, and near its own best.

A witness for what would else be taken for trouble: KL that is the price of learning, short answers that are right,
groups without differences because the task is solved.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from grpo_watchdog.detectors.detector import CALM, Reading
from grpo_watchdog.detectors.sleep import MOST
from grpo_watchdog.rule import MetricName, Number, SingleRule

_NOISE_WINDOW = 64
_EVERY = 4  # observations between two looks: a mean over many moves little from one to the next
_LUCK = 2.0  # standard deviations by which the best of many noisy means is high
_DIFFERENCE = 0.954  # the median |difference| of two normal values, in standard deviations of one


class GainRule(SingleRule):
    """Holds while the mean over the last `window` values is above the first such mean, and near the best one.

    With `lacking` it holds while that is not so, from `settle` observations on.

    Attributes:
        metric: which.
        window: values in a mean [observations].
        sigmas: how far above the start, in standard deviations of the difference of two such means.
        near: how much of the way from the start to the best, less its luck, it must still be.
        lacking: whether to say that there is no gain, instead of that there is one.
        settle: observations before anything is said [observations].
    """

    kind: Literal["gain"]
    metric: MetricName
    window: Annotated[int, Field(ge=2, le=1000)] = 8
    sigmas: Annotated[Number, Field(ge=0)] = 2.5
    near: Annotated[Number, Field(ge=0, le=1)] = 0.6
    lacking: bool = False
    settle: Annotated[int, Field(ge=0, le=1_000_000)] = 0


class GainDetector:
    """Keeps the start, the best and the noise."""

    needs_all = True
    quiet: tuple[str, float, float] | None = None
    steady: tuple[str, float, float] | None = None

    def __init__(self, rule: GainRule) -> None:
        """Start with nothing seen."""
        self._rule = rule
        self._metric, self._window = rule.metric, rule.window
        self.needs: tuple[str, ...] = (rule.metric,)
        self._recent: deque[float] = deque(maxlen=rule.window)
        self._noise: deque[float] = deque(maxlen=_NOISE_WINDOW)  # differences of neighbours
        self._start: float | None = None
        self._best = -math.inf
        self._seen = 0
        self._mean, self._holds = 0.0, False  # as of the last look

    def read(self, values: Mapping[str, float], *, firing: bool) -> Reading | None:
        """Hold the newest mean against start and best; None where the value is no number."""
        recent, value = self._recent, values[self._metric]
        if not abs(value) < MOST:  # nor any whose sums overflow
            return None
        if recent:
            self._noise.append(abs(value - recent[-1]))
        recent.append(value)
        self._seen += 1
        if len(recent) == self._window and (self._start is None or self._seen % _EVERY == 0):
            self._look()
        if not self._holds and not firing:
            return CALM
        note = f"the mean of {self._rule.window} was {self._start:.4g} at first" if self._holds else ""
        return Reading(int(self._holds), int(self._holds), self._rule.metric, self._mean, self._best, note)

    def _look(self) -> None:
        rule = self._rule
        self._mean = mean = math.fsum(self._recent) / rule.window
        start = self._start = mean if self._start is None else self._start
        self._best = best = max(self._best, mean)
        usual = statistics.median(self._noise) / _DIFFERENCE * math.sqrt(2 / rule.window)
        luck = _LUCK * math.hypot(*self._noise) / math.sqrt(2 * len(self._noise) * rule.window)
        gained = mean - start
        near = gained > max(rule.sigmas * usual, 0.0) and gained >= rule.near * (best - luck - start)
        self._holds = near != rule.lacking and self._seen >= rule.settle

    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered."""
        return {
            "recent": list(self._recent), "noise": list(self._noise), "start": self._start,
            "best": None if math.isinf(self._best) else self._best, "seen": self._seen,
            "mean": self._mean, "holds": self._holds,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        self._recent = deque(state["recent"], maxlen=self._rule.window)
        self._noise = deque(state["noise"], maxlen=_NOISE_WINDOW)
        self._seen, self._mean, self._holds = state["seen"], state["mean"], state["holds"]
        self._start, self._best = state["start"], -math.inf if state["best"] is None else state["best"]
