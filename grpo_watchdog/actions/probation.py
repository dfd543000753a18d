"""Shorten the probation of checkpoints: a factor below 1, in force while the rule that asks for it fires."""

from __future__ import annotations

from typing import Literal

from grpo_watchdog.actions.action import Hands, Order, Outcome


class ShortenProbation:
    """Has a checkpoint count as proven sooner, so that there is a fresh one when a warning proves right."""

    name = "shorten_probation"
    takes: Literal["number", "flag"] = "number"

    def merge(self, first: float, second: float) -> float:
        """Return the shorter."""
        return min(first, second)

    def act(self, order: Order, hands: Hands, step: int) -> Outcome:  # noqa: ARG002
        """Acknowledge: the plan keeps the factor."""
        return Outcome(step, self.name, None, order.target, order.rule, order.reason)


ACTION = ShortenProbation()
