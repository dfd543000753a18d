"""Pause: the optimizer's steps are skipped while there is nothing to learn from, and go on when there is again."""

from __future__ import annotations

from typing import Literal

from grpo_watchdog.actions.action import Hands, Order, Outcome

RELEASE = "unpause"


class Pause:
    """Without a difference between rewards only what restrains the policy still pulls: nothing is better than that."""

    name = "pause"
    takes: Literal["number", "flag"] = "flag"

    def merge(self, first: float, second: float) -> float:
        """Return either: a flag."""
        return max(first, second)

    def act(self, order: Order, hands: Hands, step: int) -> Outcome:
        """Have the hands hold the steps, or let them go."""
        hands.pause(on=not order.release)
        name = RELEASE if order.release else self.name
        return Outcome(step, name, None, None, order.rule, order.reason)


ACTION = Pause()
