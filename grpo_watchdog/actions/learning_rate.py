"""Lower the learning rate: a ceiling, in proportion for each parameter group."""

from grpo_watchdog.actions.action import KnobAction

ACTION = KnobAction("lower_learning_rate", "learning_rate", "min", "restore_learning_rate")
