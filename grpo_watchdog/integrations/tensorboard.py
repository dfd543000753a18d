"""TensorBoard: the level, the knobs, the firing rules and the interventions beside the run's own curves."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

from grpo_watchdog import briefing
from grpo_watchdog.metrics import Step
from grpo_watchdog.rule import RANK
from grpo_watchdog.verdict import Verdict

_KNOBS = ("learning_rate", "kl_coef", "clip_epsilon", "grad_norm_limit")


class TensorBoardListener:
    """Writes under the tag `watchdog/`; hand it to a Watchdog as a listener.

    Args:
        target: a SummaryWriter (or anything with add_scalar and add_text), or the folder for a new one.
    """

    def __init__(self, target: Any) -> None:  # noqa: ANN401
        """Open a writer where a folder is given."""
        if isinstance(target, str | Path):
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - slow, and only for those who use it

            target = SummaryWriter(str(target))
            weakref.finalize(self, target.close)  # a loop that never closes the watchdog loses nothing
        self._writer = target
        self._firing: set[str] = set()
        self._knobs: dict[str, float] = {}

    def close(self) -> None:
        """Flush; a writer that was handed over stays its owner's to close."""
        self._writer.flush()

    def __call__(self, step: Step, verdict: Verdict) -> None:
        """Write one observation; knobs and rules only where they changed, the level always."""
        number, writer = verdict.step, self._writer
        writer.add_scalar("watchdog/level", RANK[verdict.level], number)
        for name in _KNOBS:
            value = step.values.get(name)
            if value is not None and self._knobs.get(name) != value:
                self._knobs[name] = value
                writer.add_scalar(f"watchdog/knob/{name}", value, number)
        now = {f.rule: f.rank for f in verdict.findings if f.severity != "notice"}
        for rule in self._firing | set(now):
            writer.add_scalar(f"watchdog/rule/{rule}", now.get(rule, 0), number)
        self._firing = set(now)
        for outcome in verdict.actions:
            writer.add_text("watchdog/interventions", briefing.sentence(outcome), number)
            writer.add_scalar(f"watchdog/action/{outcome.action}", 1 if outcome.ok else 0, number)
        if verdict.actions:
            writer.flush()
