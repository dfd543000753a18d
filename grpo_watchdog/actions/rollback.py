"""Roll the run back to the newest proven checkpoint."""

from __future__ import annotations

from typing import Literal

from grpo_watchdog.actions.action import Hands, Order, Outcome


class Rollback:
    """Restores everything or nothing; `after` is the step that was restored, `detail` which checkpoint."""

    name = "rollback"
    takes: Literal["number", "flag"] = "flag"

    def merge(self, first: float, second: float) -> float:
        """Return either: a flag."""
        return max(first, second)

    def act(self, order: Order, hands: Hands, step: int) -> Outcome:
        """Have the hands restore it."""
        return hands.roll_back(order, step)


ACTION = Rollback()
