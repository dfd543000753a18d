"""Session: what an earlier one left in a run's folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo_watchdog import journal
from grpo_watchdog.errors import ConfigurationError


def earlier_session(run_dir: str | Path | None, *, resume: bool) -> Mapping[str, Any] | None:
    """Return what the plan of an earlier session in this folder remembered, where it is wanted.

    Raises:
        ConfigurationError: there is one and it is not wanted, or there is none and it is.
        JournalError: there is one, and it cannot be read.
    """
    exists = run_dir is not None and journal.holds_a_run(Path(run_dir))
    if run_dir is None or not exists:
        if resume:
            raise ConfigurationError(f"resume=True, but {run_dir} holds no run; leave resume out to begin one")
        return None
    if not resume:
        raise ConfigurationError(
            f"{run_dir} already holds a run: pass resume=True to go on from its newest proven checkpoint "
            "with its doses in force, or choose another run_dir"
        )
    plan: Mapping[str, Any] = journal.last_plan(Path(run_dir))
    return plan
