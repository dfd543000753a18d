"""Fall: a metric (the reward) that has lost a good part of what this run had already gained, beyond its noise.

Held against the run's own best, both as means over a window. The best of many noisy means is high by luck alone, so the
noise of such a mean enters twice: in what the best is worth, and in how far below it counts. The noise is taken from
the differences between neighbouring observations, which a slow trend does not enter. Where most of them are 0 (rewards
that are rarely earned) their median says nothing: then the mean square counts, now or when the best was set.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from grpo_watchdog.detectors.detector import CALM, Reading
from grpo_watchdog.detectors.history import History
from grpo_watchdog.detectors.sleep import NAP
from grpo_watchdog.rule import MetricName, Number, SingleRule

_LUCK = 2.0  # standard deviations: about the expected maximum of the independent means in some hundred steps
_NOISE_WINDOW = 64
_ABSURD = 1e300  # sums of values of this size overflow; none is a reward
_NORMAL = 0.954  # the median |difference| of two independent normal values, in standard deviations of one
_SAFE = 1e-9  # relative: far beyond what rounding may do to a difference
_GOOD = 0.5  # of the way to a fall: up to there the run was still well, and what is older may be gone back to


class FallRule(SingleRule):
    """Holds while the mean over the last `window` values is far below the best such mean before it.

    Attributes:
        metric: which.
        window: values in a mean [observations].
        share: how much of the gain (best less start, at least the spread within a batch, where that is given) is lost.
        sigmas: the least that counts in standard deviations of a mean.
        settle: observations before anything can be said [observations].
        accept_after: observations down there after which it is the run's new level [observations].
    """

    kind: Literal["fall"]
    metric: MetricName
    window: Annotated[int, Field(ge=2, le=1000)] = 8
    share: Annotated[Number, Field(gt=0)] = 0.3
    sigmas: Annotated[Number, Field(ge=0)] = 5.0
    settle: Annotated[int, Field(ge=4, le=100_000)] = 24
    accept_after: Annotated[int, Field(ge=1, le=1_000_000)] = 200


class FallDetector:
    """Keeps the best, the start and the noise."""

    needs_all = True
    quiet: tuple[str, float, float] | None = None
    steady: tuple[str, float, float] | None = None

    def __init__(self, rule: FallRule) -> None:
        """Start with nothing seen."""
        self._metric, self._window, self._settle = (
            rule.metric,
            rule.window,
            rule.settle,
        )  # a look at a pydantic model costs several at a plain attribute
        self._share, self._sigmas, self._accept_after = rule.share, rule.sigmas, rule.accept_after
        self.needs: tuple[str, ...] = (rule.metric,)
        self._recent: deque[float] = deque(maxlen=rule.window)
        self._means: deque[float] = deque(maxlen=rule.window)  # those that still overlap with the newest
        self._noise = History(_NOISE_WINDOW)
        self._moves = History(_NOISE_WINDOW)  # differences between means that do not overlap
        self._fallen = 0
        self._start: float | None = None
        self._best = -math.inf
        self._best_noise = 0.0  # what the noise of a mean was when the best was set
        self._seen = self._since_best = self._since_good = 0
        self._root = math.sqrt(rule.window)
        self._begin()

    def _begin(self) -> None:
        self._nap = 0  # for so many observations a mean from `_well` on is good, and no more needs to be known
        self._well = math.inf
        self._later = list[float](), list[float]()  # noise and moves that are still to be learned

    def read(self, values: Mapping[str, float], *, firing: bool) -> Reading | None:
        """Hold the newest mean against the best; None where the value is not a number, or absurd."""
        value, window, recent = values[self._metric], self._window, self._recent
        if not abs(value) < _ABSURD:
            return None
        if recent:
            self._later[0].append(abs(value - recent[-1]))
        recent.append(value)
        self._seen += 1
        if len(recent) < window:
            return CALM
        mean = math.fsum(recent) / window
        if self._nap and mean >= self._well and self._means[0] < self._best and not firing:
            self._nap -= 1
            self._later[1].append(abs(mean - self._means[0]))
            self._means.append(mean)
            self._since_best += 1
            self._since_good = self._fallen = 0
            return CALM
        self._wake()
        self._start = mean if self._start is None else self._start
        deviation = self._deviation()
        self._look_back(mean, deviation)
        self._since_best += 1
        self._since_good += 1
        if self._seen < self._settle or not math.isfinite(self._best):
            return CALM
        best = self._best - _LUCK * deviation
        gain = max(best - self._start, values.get("std_reward", 0.0))
        far = max(self._share * gain, self._sigmas * deviation * math.sqrt(2))
        fallen = best - mean > far
        if best - mean <= _GOOD * far:
            self._since_good = 0
        self._fallen = self._fallen + 1 if fallen else 0
        if self._fallen > self._accept_after:  # it stays: this is the run's level from here on
            self._best, self._best_noise, self._start, fallen = mean, deviation, min(self._start, mean), False
        if not fallen and not firing:
            self._lie_down(mean)
            return CALM
        return self._reading(mean, best - self._share * gain, fallen=fallen)

    def _lie_down(self, mean: float) -> None:
        """Tell from which mean on the next ones are good, by the least that the noise may come to meanwhile."""
        noise, moves, window = self._noise.between(NAP), self._moves.between(NAP), self._window
        if noise is None or not noise[0] > 0 or len(self._means) < window:
            return
        least = noise[0] / _NORMAL / self._root
        if moves is not None and len(self._moves) >= window:
            least = max(least, moves[0] / _NORMAL)
        far = (_LUCK + _GOOD * self._sigmas * math.sqrt(2)) * least
        self._well = self._best - far + _SAFE * (abs(self._best) + far)
        self._nap = NAP if mean >= self._well else 0  # else the next one hardly is

    def _wake(self) -> None:
        """Learn what was put off."""
        noise, moves = self._later
        if noise:
            self._noise.extend(noise)
            self._moves.extend(moves)
            self._begin()

    def _look_back(self, mean: float, deviation: float) -> None:
        """Bring the best up to date with the mean that the newest no longer overlaps with."""
        if len(self._means) == self._window:
            if self._means[0] >= self._best:
                self._best, self._since_best, self._best_noise = self._means[0], self._window, deviation
            self._moves.add(abs(mean - self._means[0]))
        self._means.append(mean)

    def _reading(self, mean: float, limit: float, *, fallen: bool) -> Reading:
        window = self._window
        note = f"the mean of {window} was {self._best:.4g}, {self._since_best} observations ago" if fallen else ""
        back = self._since_good + window - 1 if fallen else 0  # the last good mean may hold the first bad values
        return Reading(int(fallen), int(fallen), self._metric, mean, limit, note, back)

    def _deviation(self) -> float:
        """Return the standard deviation of a mean, the larger of two estimates.

        From neighbouring values, and from means that do not overlap: noise that lasts from batch to batch shows there.
        The median |difference| of two independent normal values is 0.954 of one value's standard deviation.
        """
        root, middle = self._root, self._noise.median()
        lasting = self._moves.median() / _NORMAL if len(self._moves) >= self._window else 0.0
        if middle > 0:
            return max(middle / _NORMAL / root, lasting)
        square = math.hypot(*self._noise.values) / math.sqrt(2 * len(self._noise))
        return max(square / root, self._best_noise, lasting)

    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered."""
        self._wake()
        return {
            "recent": list(self._recent), "means": list(self._means), "noise": self._noise.state_dict(),
            "start": self._start, "best": None if math.isinf(self._best) else self._best,
            "best_noise": self._best_noise, "moves": self._moves.state_dict(), "fallen": self._fallen,
            "seen": self._seen, "since_best": self._since_best, "since_good": self._since_good,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        self._recent = deque(state["recent"], maxlen=self._window)
        self._means = deque(state["means"], maxlen=self._window)
        self._noise.load_state_dict(state["noise"])
        self._start, self._seen, self._since_best = state["start"], state["seen"], state["since_best"]
        self._best = -math.inf if state["best"] is None else state["best"]
        self._best_noise, self._fallen = state["best_noise"], state["fallen"]
        self._moves.load_state_dict(state["moves"])
        self._since_good = state["since_good"]
        self._begin()
