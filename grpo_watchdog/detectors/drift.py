"""Drift: the signal has left its own recent past, with a stated rate of false alarms.

An AR(1) fit over the last `window` observations predicts the next one. The rank of its residual among the last `window`
residuals is a conformal p-value, no smaller than the value's own rank, so that ties are no news. Bets turn that into an
e-value (mean 1 where nothing changes), and a Shiryaev-Roberts e-detector adds up the evidence: M = (M + 1) * e. At
M >= arl it alarms; a false alarm then comes once in arl observations or more, on average. What that rests on, and what
was measured: docs/early_warning.md.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Mapping
from itertools import accumulate
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from grpo_watchdog.detectors.detector import CALM, Reading
from grpo_watchdog.rule import MetricName, Number, SingleRule

_BETS = (0.2, 0.4, 0.6, 0.8)  # exponents of eps * p ** (eps - 1): a few far-out residuals ... many slightly off
_HOLD = 1  # the bet that decides when the signal is back: about 18 calm observations
_MARGIN = 2.0  # interquartile ranges over sqrt(history) by which a residual must stand out: the error of the fit itself
_WIDER = 4.0  # 2.4 would make the middle 90 % of normal noise equal to its quartiles
_RIDGE = 2.0  # observations' worth of "no autocorrelation"
_PHI = (-0.5, 1.0)  # the autocorrelations a fit may claim
_BURN = 10  # residuals of a fit this young say nothing
_CLIPPED, _CLIPPED_LAG = 0.75, 4.0  # interquartile ranges that one outlier may pull the fit by, as target and as lag
_ROUNDING = 1e-12  # relative: a residual this small is arithmetic, not signal
_HUGE = 1e150  # squares must stay finite


class DriftRule(SingleRule):
    """Holds while a metric stands outside its own recent behaviour.

    Attributes:
        metric: which.
        direction: the side that matters.
        window: observations that the baseline is learned from [observations].
        arl: mean observations to a false alarm, at least; 1e5 means at most 1 % of runs of 1000 [observations].
        min_history: residuals before which it says nothing [observations].
    """

    kind: Literal["drift"]
    metric: MetricName
    direction: Literal["up", "down", "both"] = "both"
    window: Annotated[int, Field(ge=20, le=2000)] = 200
    arl: Annotated[Number, Field(ge=100, le=1e12)] = 1e5
    min_history: Annotated[int, Field(ge=20, le=2000)] = 100

    @model_validator(mode="after")
    def _history_fits(self) -> DriftRule:
        if self.min_history > self.window:
            raise ValueError(f"min_history must be at most window, not {self.min_history} and {self.window}")
        return self


def _spread(ordered: list[float]) -> float:
    """Return the interquartile range, or a share of a wider one where most values are the same."""
    count = len(ordered)
    quartiles = ordered[3 * count // 4] - ordered[count // 4]
    wider = (ordered[19 * count // 20] - ordered[count // 20]) / _WIDER
    return max(quartiles, wider)


def _within(value: float, middle: float, distance: float) -> float:
    """Return the value, or the end of the interval that it lies beyond."""
    low, high = middle - distance, middle + distance
    return low if value < low else min(value, high)


class _Autoregression:
    """x[t] = a + phi * x[t-1] by least squares over the last `window` pairs, as running sums."""

    def __init__(self, window: int) -> None:
        self._window = window
        self._pairs: deque[tuple[float, float]] = deque()
        self._origin = 0.0  # sums are taken from here, so that they cancel little
        self._sums = (0.0, 0.0, 0.0, 0.0)  # lag, target, lag * lag, lag * target
        self._age = 0  # pairs since the sums were last taken afresh

    def predict(self, lag: float) -> float:
        """Return what comes after `lag`."""
        count, (x, y, xx, xy) = len(self._pairs), self._sums
        if not count:
            return lag
        mean_x, mean_y = x / count, y / count
        spread = xx / count - mean_x * mean_x
        phi = 0.0
        if spread > _ROUNDING * xx / count:
            phi = (xy / count - mean_x * mean_y) / (spread * (1.0 + _RIDGE / count))
            phi = min(max(phi, _PHI[0]), _PHI[1])
        return self._origin + mean_y + phi * (lag - self._origin - mean_x)

    def learn(self, lag: float, target: float) -> None:
        """Take one pair in, and the one that left the window out."""
        pairs = self._pairs
        pairs.append((lag, target))
        self._age += 1
        if self._age > self._window or len(pairs) == 1:
            if len(pairs) > self._window:
                pairs.popleft()
            self._afresh(target)
            return
        a, b = lag - self._origin, target - self._origin
        x, y, xx, xy = self._sums
        if len(pairs) > self._window:
            lag, target = pairs.popleft()
            c, d = lag - self._origin, target - self._origin
            self._sums = (x + a - c, y + b - d, xx + a * a - c * c, xy + a * b - c * d)
        else:
            self._sums = (x + a, y + b, xx + a * a, xy + a * b)

    def _afresh(self, origin: float) -> None:
        """Take the sums anew: what rounding left in them goes."""
        self._origin, self._age = origin, 0
        moved = [(lag - origin, target - origin) for lag, target in self._pairs]
        x, y = sum(a for a, _ in moved), sum(b for _, b in moved)
        self._sums = (x, y, sum(a * a for a, _ in moved), sum(a * b for a, b in moved))

    def state_dict(self) -> dict[str, Any]:
        """Return the window and its sums."""
        return {"pairs": [list(pair) for pair in self._pairs], "origin": self._origin, "sums": list(self._sums),
                "age": self._age}  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        self._pairs = deque((lag, target) for lag, target in state["pairs"])
        x, y, xx, xy = state["sums"]
        self._sums, self._origin, self._age = (x, y, xx, xy), state["origin"], state["age"]


class DriftDetector:
    """Adds up the evidence against "nothing has changed". Non-finite values never enter."""

    needs_all = True
    quiet: tuple[str, float, float] | None = None
    steady: tuple[str, float, float] | None = None

    def __init__(self, rule: DriftRule) -> None:
        """Start without a baseline."""
        self._metric, self._direction = (
            rule.metric,
            rule.direction,
        )  # a look at a pydantic model costs several at a plain attribute
        self._window, self._arl, self._min_history = rule.window, rule.arl, rule.min_history
        self.needs: tuple[str, ...] = (rule.metric,)
        self._suspicious = math.sqrt(rule.arl)  # from here on the baseline is kept as it is, not to learn the trouble
        weights = [[0.0] + [rank ** (eps - 1.0) for rank in range(1, rule.window + 2)] for eps in _BETS]
        # The bet on rank k of n is k ** (eps - 1), scaled to mean exactly 1 over the n ranks.
        self._bets = [(weight, list(accumulate(weight))) for weight in weights]
        self._reset()

    def _reset(self) -> None:
        self._fit = _Autoregression(self._window)
        self._residuals: deque[float] = deque()
        self._sorted: list[float] = []
        self._values: deque[float] = deque()  # the observations that the residuals belong to
        self._ordered: list[float] = []
        self._lag: float | None = None
        self._learned = 0
        self._up, self._down = [0.0] * len(_BETS), [0.0] * len(_BETS)
        self._side = ""  # "up" or "down" from the alarm on
        self._hold = 0.0
        self._note = ""

    def read(self, values: Mapping[str, float], *, firing: bool) -> Reading | None:
        """Return whether the evidence suffices; None on a value that is none, and while there is no baseline."""
        metric = self._metric
        value = values[metric]
        if not -_HUGE < value < _HUGE:
            return None
        if self._side and not self._hold and not firing:
            self._reset()  # it is over: what is normal now is learned anew
        if self._lag is None:
            self._lag = value
            return None
        expected = self._fit.predict(self._lag)
        residual = value - expected
        if abs(residual) <= _ROUNDING * (abs(value) + abs(expected)):
            residual = 0.0
        count = len(self._sorted)
        known = count >= self._min_history
        spread = _spread(self._sorted) if count >= _BURN else 0.0
        evidence = self._weigh(value, residual, expected, spread) if known else 0.0
        if self._side or evidence >= self._suspicious:
            self._lag = value
        else:
            self._learn(value, residual, expected, spread)
        if self._hold:
            return Reading(1, 1, metric, value, None, self._note)
        if firing:
            return Reading(0, 0, metric, value, None)
        return CALM if known else None

    def _weigh(self, value: float, residual: float, expected: float, spread: float) -> float:
        """Return the evidence after this residual; note the alarm where it suffices."""
        ordered, raw, direction = self._sorted, self._ordered, self._direction
        known = len(ordered)
        count = known + 1
        margin = _MARGIN / math.sqrt(known) * spread
        # The milder of two ranks, the residual's and the value's own: what comes back to where it was is no news, nor
        # is a tie, nor a learning curve that slows down. A rank that is too mild can only delay.
        above = below = 0
        if direction != "down":
            above = count - min(bisect_left(ordered, residual - margin), bisect_left(raw, value))
        if direction != "up":
            below = 1 + max(bisect_right(ordered, residual + margin), bisect_right(raw, value))
        if self._side:
            weight, total = self._bets[_HOLD]
            factor = weight[above if self._side == "up" else below] * count / total[count]
            self._hold = min(self._hold * factor, self._arl)
            if self._hold < self._suspicious:
                self._hold = 0.0
            return self._hold
        up = self._bet(self._up, above, count) if direction != "down" else 0.0
        down = self._bet(self._down, below, count) if direction != "up" else 0.0
        evidence = (up + down) / 2 if direction == "both" else up + down
        if evidence >= self._arl:
            self._side = "up" if up > down else "down"
            self._hold = self._arl
            self._note = f"drifts {self._side} from its own last {known} observations, which foretold {expected:.4g}"
        return evidence

    def _bet(self, wealth: list[float], rank: int, count: int) -> float:
        """Return the mean over the bets of M = (M + 1) * e."""
        (one, all_one), (two, all_two), (three, all_three), (four, all_four) = self._bets
        a, b, c, d = wealth
        a = (a + 1.0) * one[rank] * count / all_one[count]
        b = (b + 1.0) * two[rank] * count / all_two[count]
        c = (c + 1.0) * three[rank] * count / all_three[count]
        d = (d + 1.0) * four[rank] * count / all_four[count]
        wealth[:] = a, b, c, d
        mean: float = (a + b + c + d) / 4
        return mean

    def _learn(self, value: float, residual: float, expected: float, spread: float) -> None:
        """Take the newest observation into the baseline; an outlier pulls it only so far."""
        ordered, lag = self._sorted, self._lag
        count = len(ordered)
        target = mild = residual
        if count >= _BURN:
            middle = ordered[count // 2]
            far = _CLIPPED * spread
            if not middle - far <= residual <= middle + far:
                target = _within(residual, middle, far)
                mild = _within(residual, middle, _CLIPPED_LAG * spread)
        assert lag is not None
        self._fit.learn(lag, expected + target)
        self._lag = expected + mild
        self._learned += 1
        if self._learned <= _BURN:
            return
        raw = self._ordered
        self._residuals.append(residual)
        self._values.append(value)
        insort(ordered, residual)
        insort(raw, value)
        if count >= self._window:
            del ordered[bisect_left(ordered, self._residuals.popleft())]
            del raw[bisect_left(raw, self._values.popleft())]

    def state_dict(self) -> dict[str, Any]:
        """Return the baseline and the evidence."""
        return {
            "fit": self._fit.state_dict(), "residuals": list(self._residuals),
            "values": list(self._values), "lag": self._lag,
            "learned": self._learned, "up": list(self._up), "down": list(self._down), "side": self._side,
            "hold": self._hold, "note": self._note,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        self._fit.load_state_dict(state["fit"])
        self._residuals, self._lag, self._learned = deque(state["residuals"]), state["lag"], state["learned"]
        self._values = deque(state["values"])
        self._sorted, self._ordered = sorted(self._residuals), sorted(self._values)
        self._up, self._down = list(state["up"]), list(state["down"])
        self._side, self._hold, self._note = state["side"], state["hold"], state["note"]
