"""Mostly: any kind of rule, counted over a window: it holds on `for` of the last `out_of` observations.

What is noisy, or logged for one group at a time, hardly ever holds many times in a row; and what comes back again and
again is no spike that heals.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Mapping, Sequence
from typing import Any

from grpo_watchdog.detectors.detector import CALM, Detector, Reading
from grpo_watchdog.detectors.sleep import Interval, Sleeper


class Mostly:
    """Counts how often each level was reached among the last observations; sleeps while none of them reached any.

    Args:
        inner: what looks at one observation.
        enough: observations on which a level must be reached.
        window: out of so many.
        levels: how many the rule has.
    """

    quiet: tuple[str, float, float] | None = None
    steady: tuple[str, float, float] | None = None

    def __init__(self, inner: Detector, enough: int, window: int, levels: int) -> None:
        """Start with nothing seen."""
        self._inner, self._enough, self._levels = inner, enough, levels
        self._sleeper = inner if isinstance(inner, Sleeper) else None
        self.needs, self.needs_all = inner.needs, inner.needs_all
        self._ranks: deque[int] = deque(maxlen=window)
        self._counts = [0] * levels  # by level: how many of these reached it

    def columns(self, given: Container[str]) -> tuple[str, ...]:
        """Return what the inner one sleeps by."""
        if self._sleeper is not None:
            return self._sleeper.columns(given)
        return () if self._inner.quiet is None else (self._inner.quiet[0],)

    def sleep(self) -> tuple[Interval, ...] | None:
        """Return the inner one's intervals while the whole window is calm."""
        if self._counts[0]:
            return None
        if self._sleeper is not None:
            return self._sleeper.sleep()
        return None if self._inner.quiet is None else (self._inner.quiet[1:],)

    def catch_up(self, columns: Sequence[tuple[float, ...]]) -> None:
        """Learn calm observations."""
        if self._sleeper is not None:
            self._sleeper.catch_up(columns)
        self._ranks.extend([0] * len(columns[0]))

    def read(self, values: Mapping[str, float], *, firing: bool) -> Reading | None:
        """Return the highest level that was reached often enough."""
        reading = self._inner.read(values, firing=firing or self._counts[0] > 0)
        if reading is None:
            return None
        ranks, counts = self._ranks, self._counts
        if len(ranks) == ranks.maxlen:
            for level in range(ranks[0]):
                counts[level] -= 1
        ranks.append(reading.rank)
        for level in range(reading.rank):
            counts[level] += 1
        rank = sum(count >= self._enough for count in counts)
        if not rank:
            return reading._replace(rank=0, sticky=0, note="") if firing else CALM
        often = f"on {counts[rank - 1]} of the last {len(ranks)} observations"
        first = next(back for back, seen in enumerate(ranks) if seen >= rank)
        note = f"{often}; {reading.note}" if reading.note else often
        return reading._replace(rank=rank, sticky=rank, note=note, back=len(ranks) - 1 - first)

    def state_dict(self) -> dict[str, Any]:
        """Return the window and what is inside."""
        return {"ranks": list(self._ranks), "inner": self._inner.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        self._ranks = deque(state["ranks"], maxlen=self._ranks.maxlen)
        self._counts = [sum(rank > level for rank in self._ranks) for level in range(self._levels)]
        self._inner.load_state_dict(state["inner"])
