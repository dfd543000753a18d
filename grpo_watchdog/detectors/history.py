"""History: the last values of one metric, with their median and a robust deviation kept at hand.

Not-a-number never enters. Values are kept in order of time and, beside that, sorted, so that a median costs a look.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Mapping
from typing import Any

_MAD = 1.4826  # a median absolute deviation times this is the standard deviation of normal noise
_REFRESH = 8  # values after which the deviation is taken anew: it costs a sort


class History:
    """The last `size` finite values.

    Args:
        size: how many are kept.
    """

    __slots__ = ("_deviation", "_fresh", "_sorted", "values")

    def __init__(self, size: int) -> None:
        """Start empty."""
        self.values: deque[float] = deque(maxlen=size)
        self._sorted: list[float] = []
        self._deviation, self._fresh = 0.0, 0

    def __len__(self) -> int:
        """Return how many values are kept."""
        return len(self.values)

    def add(self, value: float) -> None:
        """Add one value; the oldest makes room. Not-a-number and infinity are passed over."""
        if not math.isfinite(value):
            return
        kept = self._sorted
        if len(self.values) == self.values.maxlen:
            del kept[bisect_left(kept, self.values[0])]
        self.values.append(value)
        insort(kept, value)
        self._fresh -= 1

    def median(self) -> float:
        """Return the median; there must be a value."""
        kept, half = self._sorted, len(self._sorted) // 2
        return kept[half] if len(kept) % 2 else (kept[half - 1] + kept[half]) / 2

    def deviation(self) -> float:
        """Return the robust standard deviation: at most `_REFRESH` values old."""
        if self._fresh <= 0:
            middle = self.median()
            spread = sorted(abs(value - middle) for value in self._sorted)
            self._deviation, self._fresh = _MAD * spread[len(spread) // 2], _REFRESH
        return self._deviation

    def state_dict(self) -> dict[str, Any]:
        """Return the values, oldest first, and the deviation as it stands."""
        return {"values": list(self.values), "deviation": self._deviation, "fresh": self._fresh}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self.values = deque(state["values"], maxlen=self.values.maxlen)
        self._sorted = sorted(self.values)
        self._deviation, self._fresh = state["deviation"], state["fresh"]
