"""Shrink the clip range: a ceiling on epsilon."""

from grpo_watchdog.actions.action import KnobAction

ACTION = KnobAction("shrink_clip", "clip_epsilon", "min", "restore_clip")
