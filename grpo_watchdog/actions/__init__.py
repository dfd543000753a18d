"""What can be done to a run, one file an action. A new action is a file here and a line in ACTIONS."""

from __future__ import annotations

from grpo_watchdog.actions import (
    checkpoint,
    clip_epsilon,
    escalate,
    grad_norm,
    halt,
    kl_coef,
    learning_rate,
    pause,
    probation,
    rollback,
)
from grpo_watchdog.actions.action import Action, Hands, KnobAction, Order, Outcome

ACTIONS: dict[str, Action] = {
    action.name: action
    for action in (
        rollback.ACTION,
        learning_rate.ACTION,
        kl_coef.ACTION,
        clip_epsilon.ACTION,
        grad_norm.ACTION,
        pause.ACTION,
        checkpoint.NOW,
        checkpoint.MORE_OFTEN,
        probation.ACTION,
        escalate.ACTION,
        halt.ACTION,
    )
}
"""Every action by its name, in the order in which several of one plan are carried out: the rollback first,
so that doses land on top of what it restores."""

KNOB_ACTIONS: dict[str, KnobAction] = {
    name: action for name, action in ACTIONS.items() if isinstance(action, KnobAction)
}

WATCHFUL = frozenset({"checkpoint_now", "checkpoint_more_often", "shorten_probation"})
"""Actions that touch nothing in the run: a rule that asks for no other is no reason to call the run unhealthy."""

__all__ = ["ACTIONS", "KNOB_ACTIONS", "WATCHFUL", "Action", "Hands", "KnobAction", "Order", "Outcome"]
