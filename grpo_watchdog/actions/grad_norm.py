"""Tighten the limit that gradients are clipped to: a ceiling."""

from grpo_watchdog.actions.action import KnobAction

ACTION = KnobAction("tighten_grad_norm", "grad_norm_limit", "min", "restore_grad_norm")
