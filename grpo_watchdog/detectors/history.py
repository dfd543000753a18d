"""History: the last values of one metric, with their median and a robust deviation kept at hand.

Not-a-number never enters. Values are kept in order of time and, beside that, sorted, so that a median costs a look.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

_MAD = 1.4826  # a median absolute deviation times this is the standard deviation of normal noise
_FEW = 4  # values up to which it is quicker to put each in its place than to sort
_REFRESH = 8  # values after which the deviation is taken anew: it costs a sort


class History:
    """The last `size` finite values.

    Args:
        size: how many are kept.
    """

    __slots__ = ("_deviation", "_fresh", "_size", "_sorted", "values")

    def __init__(self, size: int) -> None:
        """Start empty."""
        self._size = size
        self.values: deque[float] = deque(maxlen=size)
        self._sorted: list[float] = []
        self._deviation, self._fresh = 0.0, 0

    def __len__(self) -> int:
        """Return how many values are kept."""
        return len(self._sorted)

    def add(self, value: float) -> None:
        """Add one value; the oldest makes room. Not-a-number and infinity are passed over."""
        if not isfinite(value):
            return
        kept, values = self._sorted, self.values
        if len(kept) == self._size:
            del kept[bisect_left(kept, values[0])]
        values.append(value)
        insort(kept, value)
        self._fresh -= 1

    def extend(self, values: Sequence[float]) -> None:
        """Add several finite values at once, which costs one sort where there are many."""
        if len(values) < _FEW:
            for value in values:
                self.add(value)
            return
        self.values.extend(values)
        self._sorted = sorted(self.values)
        self._fresh -= len(values)

    def median(self) -> float:
        """Return the median; there must be a value."""
        kept = self._sorted
        half, odd = divmod(len(kept), 2)
        return kept[half] if odd else (kept[half - 1] + kept[half]) / 2

    def between(self, further: int) -> tuple[float, float] | None:
        """Return the bounds of the median while so many further values are added, whatever they are.

        One value more, be the oldest gone or not, moves what is in the middle by one place at most. None where there
        are too few values to tell.
        """
        kept, last = self._sorted, len(self._sorted) - 1
        lower = last // 2 - further
        return None if lower < 0 else (kept[lower], kept[(last + 1) // 2 + further])

    def deviation(self) -> float:
        """Return the robust standard deviation: at most `_REFRESH` values old."""
        if self._fresh <= 0:
            middle = self.median()
            spread = [abs(value - middle) for value in self._sorted]
            spread.sort()  # falls, then rises: one merge
            self._deviation, self._fresh = _MAD * spread[len(spread) // 2], _REFRESH
        return self._deviation

    @property
    def fresh(self) -> int:
        """Return for how many further values the deviation stays as it is; 0 or less where it is to be taken anew."""
        return self._fresh

    def state_dict(self) -> dict[str, Any]:
        """Return the values, oldest first, and the deviation as it stands."""
        return {"values": list(self.values), "deviation": self._deviation, "fresh": self._fresh}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self.values = deque(state["values"], maxlen=self._size)
        self._sorted = sorted(self.values)
        self._deviation, self._fresh = state["deviation"], state["fresh"]
