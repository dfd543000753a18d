"""Escalate: the next rung of the policy's ladder, whatever that is. The plan puts the rung's orders in its place."""

from __future__ import annotations

from typing import Literal

from grpo_watchdog.actions.action import Hands, Order, Outcome


class Escalate:
    """Says that something must be done; the ladder says what. It is never carried out itself."""

    name = "escalate"
    takes: Literal["number", "flag"] = "flag"

    def merge(self, first: float, second: float) -> float:
        """Return either: a flag."""
        return max(first, second)

    def act(self, order: Order, hands: Hands, step: int) -> Outcome:  # noqa: ARG002
        """Do nothing: a plan holds the orders of a rung in its place."""
        detail = "the policy has no ladder"
        return Outcome(step, self.name, None, None, order.rule, order.reason, ok=False, detail=detail)


ACTION = Escalate()
