"""Session: with what one may begin, and what an earlier one left in a run's folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from grpo_watchdog import journal
from grpo_watchdog.controls import Veto
from grpo_watchdog.errors import ConfigurationError
from grpo_watchdog.metrics import RatioTo
from grpo_watchdog.rulebook import Policy


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


def refuse_nonsense(ratio_to: object, dims: object, run_dir: object, approve: object) -> None:
    """Raise a ConfigurationError where an argument is not what it can be; says what is allowed."""
    if ratio_to not in get_args(RatioTo):
        raise ConfigurationError(f"ratio_to is {ratio_to!r}; allowed: reference, old")
    if dims is not None and (type(dims) is not int or dims < 1):
        raise ConfigurationError(f"dims is {dims!r}; allowed: a whole number above 0")
    if run_dir is not None and not isinstance(run_dir, str | Path):
        raise ConfigurationError(f"run_dir is {run_dir!r}; allowed: a path, or None")
    if approve is not None and not callable(approve):
        raise ConfigurationError(f"approve is {approve!r}; allowed: a function of the question, or None")


def refuse_mode(mode: str, *, resume: bool, answerable: bool) -> None:
    """Raise a ConfigurationError where a mode cannot work: a shadow that must restore, a question to nobody."""
    if mode == "shadow" and resume:
        raise ConfigurationError("mode is shadow, which touches nothing: it cannot restore a run that is resumed")
    if mode == "approve" and not answerable:
        raise ConfigurationError("mode is approve, and there is nobody to ask: give approve=, a run_dir, or both")


def veto_of(policy: Policy) -> Veto | None:
    """Return which optimizer steps are to be vetoed; in shadow they are only counted."""
    if policy.veto is None:
        return None
    dry = policy.mode == "shadow" or "veto" in policy.shadow
    return Veto(policy.veto.factor, policy.veto.most, dry)
