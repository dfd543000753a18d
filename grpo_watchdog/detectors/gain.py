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
        self._metric, self._window, self._sigmas = rule.metric, rule.window, rule.sigmas
        self._near, self._lacking, self._settle = rule.near, rule.lacking, rule.settle
        self.needs: tuple[str, ...] = (rule.metric,)
        self._recent: deque[float] = deque(maxlen=rule.window)
        self._noise: deque[float] = deque(maxlen=_NOISE_WINDOW)  # differences of neighbours
        self._start: float | None = None
        self._best = -math.inf
        self._seen = 0
        self._due = rule.window  # observations at the next look
        self._mean, self._holds = 0.0, False  # as of the last look
        self._reading = CALM

    def read(self, values: Mapping[str, float], *, firing: bool) -> Reading | None:
        """Hold the newest mean against start and best; None where the value is no number."""
        recent, value = self._recent, values[self._metric]
        if not abs(value) < MOST:  # nor any whose sums overflow
            return None
        if recent:
            self._noise.append(abs(value - recent[-1]))
        recent.append(value)
        self._seen += 1
        if self._seen >= self._due:
            self._look()
        return self._reading if firing or self._holds else CALM

    def _look(self) -> None:
        self._due = self._next()
        window, noise = self._window, self._noise
        self._mean = mean = math.fsum(self._recent) / window
        start = self._start = mean if self._start is None else self._start
        self._best = best = max(self._best, mean)
        usual = statistics.median(noise) / _DIFFERENCE * math.sqrt(2 / window)
        luck = _LUCK * math.hypot(*noise) / math.sqrt(2 * len(noise) * window)
        gained = mean - start
        near = gained > max(self._sigmas * usual, 0.0) and gained >= self._near * (best - luck - start)
        self._holds = near != self._lacking and self._seen >= self._settle
        self._say()

    def _next(self) -> int:
        return self._seen - self._seen % _EVERY + _EVERY

    def _say(self) -> None:
        holds = self._holds
        note = f"the mean of {self._window} was {self._start:.4g} at first" if holds else ""
        self._reading = Reading(int(holds), int(holds), self._metric, self._mean, self._best, note)

    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered."""
        return {
            "recent": list(self._recent), "noise": list(self._noise), "start": self._start,
            "best": None if math.isinf(self._best) else self._best, "seen": self._seen,
            "mean": self._mean, "holds": self._holds,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        self._recent = deque(state["recent"], maxlen=self._window)
        self._noise = deque(state["noise"], maxlen=_NOISE_WINDOW)
        self._seen, self._mean, self._holds = state["seen"], state["mean"], state["holds"]
        self._start, self._best = state["start"], -math.inf if state["best"] is None else state["best"]
        self._due = self._window if self._start is None else self._next()
        self._say()
