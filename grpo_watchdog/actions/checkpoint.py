"""Take a checkpoint now, or more often from now on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from grpo_watchdog.actions.action import Hands, Order, Outcome


@dataclass(frozen=True)
class TakeCheckpoint:
    """Saves a candidate; it is proven only after healthy steps, like any other."""

    name: str
    takes: Literal["number", "flag"]

    def merge(self, first: float, second: float) -> float:
        """Return the higher frequency."""
        return max(first, second)

    def act(self, order: Order, hands: Hands, step: int) -> Outcome:
        """Save, or (more often) acknowledge: the plan keeps the interval."""
        if self.takes == "flag":
            return hands.save(order, step)
        return Outcome(step, self.name, None, order.target, order.rule, order.reason)


NOW = TakeCheckpoint("checkpoint_now", "flag")
MORE_OFTEN = TakeCheckpoint("checkpoint_more_often", "number")
