"""The published packages on one recorded run, for `benchmarks/recorded.py`; each is optional.

Both are given this project's reading of the log under the names that they document, so that neither loses a run to the
spelling of a key: the mean and spread of the reward, entropy, the KL to the reference (per token where the log has it;
where it has none, the KL to the old policy, which both accept under that name), gradient norm, learning rate, clip
fraction, advantages; rldoctor also the share of groups without differences, lengths and truncation. What was not logged
on a row is not given, what was logged as NaN is given as NaN. (Given the log's own keys instead, rldoctor catches less;
the rewards of single functions, which it also takes, change nothing here.) Their settings are their own defaults, and
`critical` and `warning` are taken at their word:

- rlwatch: its monitor (`attach(framework="manual")`), fed row by row; the alerts that it sends, cool-down included.
- rldoctor: its diagnosis of what was logged so far, made anew as the log grows: on every row up to 100, on every fifth
  after that (a diagnosis costs milliseconds and more, and looks at the whole log).
- rldoctor live: its own LiveMonitor, which is silent for 60 rows and then looks at every 25th.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo_watchdog.metrics import Step
from recorded_parts.variants import Call  # type: ignore[import-not-found] # found beside the script

DENSE, EVERY = 100, 5  # rows on each of which rldoctor is run; after them, on every so many
_MEMORY = Path("/dev/shm")  # noqa: S108 - rlwatch's database is written through on every row: slow on a disk
_KL = ("token_kl", "kl", "kl_k1", "kl_penalty", "sequence_kl", "step_kl")
_RLWATCH = {
    "entropy": ("entropy",),
    "kl_divergence": _KL,
    "reward_mean": ("mean_reward",),
    "reward_std": ("std_reward", "group_std_reward"),
    "advantage_std": ("std_advantage",),
    "loss": ("loss", "policy_loss"),
    "learning_rate": ("learning_rate",),
    "clip_fraction": ("clip_fraction",),
    "grad_norm": ("grad_norm",),
}
_RLDOCTOR = {
    "reward": ("mean_reward",),
    "reward_std": ("std_reward", "group_std_reward"),
    "frac_reward_zero_std": ("zero_std_fraction",),
    "advantage/mean": ("mean_advantage",),
    "advantage/std": ("std_advantage",),
    "entropy": ("entropy",),
    "kl": _KL,
    "clip_ratio/region_mean": ("clip_fraction",),
    "grad_norm": ("grad_norm",),
    "learning_rate": ("learning_rate",),
    "policy_loss": ("policy_loss", "loss"),
    "completions/mean_length": ("completion_length",),
    "completions/max_length": ("max_completion_length",),
    "completions/clipped_ratio": ("truncated_fraction",),
}


def given(values: Mapping[str, float], names: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Return a row under other names; of several metrics for one name, the first that the row has."""
    found = {other: next((values[name] for name in ours if name in values), None) for other, ours in names.items()}
    return {other: value for other, value in found.items() if value is not None}


def package(name: str) -> Any:  # noqa: ANN401 - a package that may not be there carries no types here
    """Return a package, or None where it cannot be imported."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def rlwatch(steps: Sequence[Step]) -> Call | None:
    """Return what rlwatch's monitor calls a run; None where it is not installed."""
    its = package("rlwatch")
    if its is None:
        return None
    first: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=_MEMORY if _MEMORY.is_dir() else None) as folder:
        monitor = its.attach(framework="manual", run_id="run", storage={"log_dir": folder})
        for step in steps:
            for alert in monitor.log_step(step.number, **given(step.values, _RLWATCH)):
                first.setdefault(alert.severity, step.number)
            if "critical" in first:
                break
        monitor.stop()
    critical = first.get("critical", math.inf)
    return Call(min(critical, first.get("warning", math.inf)), critical)


def rldoctor(steps: Sequence[Step]) -> Call | None:
    """Return what rldoctor calls a run, asked again as the log grows; None where it is not installed."""
    its = package("rl_doctor")
    if its is None:
        return None
    records, alarm = list[dict[str, float]](), math.inf
    for row, step in enumerate(steps, start=1):
        records.append({"step": step.number, **given(step.values, _RLDOCTOR)})
        if row > DENSE and row % EVERY and row != len(steps):
            continue
        worst = its.diagnose(its.run_from_records(records)).worst
        if worst >= its.Severity.WARNING:
            alarm = min(alarm, step.number)
        if worst >= its.Severity.CRITICAL:
            return Call(alarm, step.number)
    return Call(alarm)


def rldoctor_live(steps: Sequence[Step]) -> Call | None:
    """Return what rldoctor's live monitor calls a run, with its own settings; None where it is not installed."""
    its, live = package("rl_doctor"), package("rl_doctor.live")
    if its is None or live is None:
        return None
    monitor, alarm = live.LiveMonitor(on_finding=lambda finding: None), math.inf  # noqa: ARG005 - said nowhere
    for step in steps:
        worst = [finding.severity for finding in monitor.log(given(step.values, _RLDOCTOR), step=step.number)]
        if worst:
            alarm = min(alarm, step.number)
        if its.Severity.CRITICAL in worst:
            return Call(alarm, step.number)
    return Call(alarm)


PACKAGES: dict[str, Callable[[Sequence[Step]], Call | None]] = {
    "rlwatch": rlwatch,
    "rldoctor": rldoctor,
    "rldoctor live": rldoctor_live,
}


def called(name: str, steps: Sequence[Step]) -> Call | None:
    """Return what a package calls a run, its own prints and warnings held back; None where it is not installed."""
    logging.disable(logging.CRITICAL)
    os.environ.setdefault("TERM", "dumb")
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            return PACKAGES[name](steps)
    finally:
        logging.disable(logging.NOTSET)
