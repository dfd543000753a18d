"""Halt the run: the verdict says so, and the loop breaks."""

from __future__ import annotations

from typing import Literal

from grpo_watchdog.actions.action import Hands, Order, Outcome


class Halt:
    """Ends the run. Nothing is touched: the loop reads `verdict.halt`."""

    name = "halt"
    takes: Literal["number", "flag"] = "flag"

    def merge(self, first: float, second: float) -> float:
        """Return either: a flag."""
        return max(first, second)

    def act(self, order: Order, hands: Hands, step: int) -> Outcome:  # noqa: ARG002
        """Say so."""
        return Outcome(step, self.name, None, None, order.rule, order.reason)


ACTION = Halt()
