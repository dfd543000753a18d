"""A training-health watchdog for GRPO: it watches, says what is wrong, turns the knobs, and rolls back."""

from typing import TYPE_CHECKING, Any

from grpo_watchdog.actions import Outcome
from grpo_watchdog.attach import attach
from grpo_watchdog.callback import WatchdogCallback
from grpo_watchdog.controls import Check, Controls, Dial, Knob, attr, item
from grpo_watchdog.diagnosis import Incident
from grpo_watchdog.errors import (
    CheckpointError,
    ConfigurationError,
    DamagedError,
    JournalError,
    LogError,
    RestartError,
    RulebookError,
    WatchdogError,
)
from grpo_watchdog.metrics import METRICS, Metric, Step
from grpo_watchdog.replay import replay
from grpo_watchdog.reports import Run, read_run, report
from grpo_watchdog.rulebook import Policy, Rulebook, load
from grpo_watchdog.verdict import Verdict
from grpo_watchdog.watch import Finding
from grpo_watchdog.watchdog import Watchdog

if TYPE_CHECKING:
    from grpo_watchdog.diagnosed import diagnose

__all__ = [
    "Check",
    "CheckpointError",
    "ConfigurationError",
    "Controls",
    "DamagedError",
    "Dial",
    "Finding",
    "Incident",
    "JournalError",
    "Knob",
    "LogError",
    "METRICS",
    "Metric",
    "Outcome",
    "Policy",
    "RestartError",
    "Rulebook",
    "RulebookError",
    "Run",
    "Step",
    "Verdict",
    "Watchdog",
    "WatchdogCallback",
    "WatchdogError",
    "attach",
    "attr",
    "diagnose",
    "item",
    "load",
    "read_run",
    "replay",
    "report",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Import what reads recorded runs when it is first asked for: a training that is watched needs none of it."""
    if name == "diagnose":
        from grpo_watchdog.diagnosed import diagnose  # noqa: PLC0415

        return diagnose
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
