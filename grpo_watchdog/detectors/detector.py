"""What a detector is: it reads one step's values and says how far up its rule's levels they reach."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol


class Reading(NamedTuple):
    """What a detector saw on one step.

    Attributes:
        rank: how many of the rule's levels the value reaches; 0 is calm.
        sticky: how many levels a rule that already fires may keep (hysteresis): at least `rank`.
        metric: the metric that decided.
        value: its value.
        limit: the limit that it was held against, or None where there is no single one.
        note: what the numbers do not say, in English; "" where they say it all.
        back: how long before this step the trouble began, as far as the detector can tell [observations].
    """

    rank: int
    sticky: int
    metric: str
    value: float
    limit: float | None
    note: str = ""
    back: int = 0


CALM = Reading(0, 0, "", 0.0, None)
"""What a detector may return while its rule does not fire and there is nothing to see: made once."""


class Detector(Protocol):
    """Evaluates one rule.

    Attributes:
        needs: the metrics without which it is blind.
        needs_all: whether it needs all of them, or any one.
        quiet: (metric, low, high): while it does not fire and the value lies in this closed interval,
            there is nothing to evaluate; None where that cannot be said from one value.
        steady: the same while it fires at its only level: the values that change nothing.
    """

    needs: tuple[str, ...]
    needs_all: bool
    quiet: tuple[str, float, float] | None
    steady: tuple[str, float, float] | None

    def read(self, values: Mapping[str, float], *, firing: bool) -> Reading | None:
        """Return what was seen, or None where it cannot tell from these values (blind on this step)."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return its memory as JSON-able values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        ...


class Memoryless:
    """A detector that looks at one step only."""

    needs: tuple[str, ...] = ()
    needs_all = True
    quiet: tuple[str, float, float] | None = None
    steady: tuple[str, float, float] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take nothing."""
