"""The lab's trainings by name: three small real GRPO runs that differ in what they train and in how."""

from __future__ import annotations

from collections.abc import Callable

from grpo_watchdog.lab.denoise import chain_task, reference_task
from grpo_watchdog.lab.grpo import GrpoTraining
from grpo_watchdog.lab.objective import GrpoConfig
from grpo_watchdog.lab.tokens import tokens_task

__all__ = ["TASKS", "GrpoConfig", "GrpoTraining"]

TASKS: dict[str, Callable[[int], GrpoTraining]] = {
    "reference": reference_task,
    "chain": chain_task,
    "tokens": tokens_task,
}
