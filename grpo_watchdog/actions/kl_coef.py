"""Raise the KL coefficient: a floor."""

from grpo_watchdog.actions.action import KnobAction

ACTION = KnobAction("raise_kl_coef", "kl_coef", "max", "restore_kl_coef")
