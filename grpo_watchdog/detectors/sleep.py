"""Sleep: what spares a healthy run most of its detectors, and decides nothing else than looking at every step would.

A detector with a memory that can say for which next values nothing comes of it, whatever their order, sleeps through
them and learns them together later: one sort for ten values where there were ten insertions.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Protocol, runtime_checkable

NAP = 10  # observations that a detector may sleep through
MOST = 1e300  # what is further out is looked at: sums of such values overflow

Interval = tuple[float, float]
"""Lowest and highest value, both included; neither is infinite, and not-a-number lies in no interval."""


@runtime_checkable
class Sleeper(Protocol):
    """A detector that has a memory and may sleep."""

    def columns(self, given: Container[str]) -> tuple[str, ...]:
        """Return the metrics that it learns from where these are given."""
        ...

    def sleep(self) -> tuple[Interval, ...] | None:
        """Return an interval for each of the columns that may be given; None where it has to look at every value.

        While its rule does not fire and the next values lie within, `NAP` of them at most, `read` would return CALM
        for each, and what `read` would remember is what `catch_up` does.
        """
        ...

    def catch_up(self, columns: Sequence[tuple[float, ...]]) -> None:
        """Learn the values that it slept through, by column, oldest first."""
        ...
