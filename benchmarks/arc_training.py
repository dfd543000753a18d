"""arc-training, a published recovery controller for PyTorch loops, on the lab's trainings, in the benchmark's terms.

It is AGPL, so it is no dependency of this package: it is driven from outside, through its documented API, in an
environment of its own, and nothing of it is part of this package.

    python -m venv arc-venv && arc-venv/bin/pip install arc-training pydantic ruamel.yaml
    PYTHONPATH=. arc-venv/bin/python benchmarks/arc_training.py [--healthy 25] [--seeds 2] [--fault lr_up lr_spike]

Prints its rollbacks on healthy runs per 1000 steps, and for each fault what it rescues. Its defaults, quiet; called as
it documents: after `backward()` and before the optimizer's step, which is skipped where it says so.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import grpo_watchdog as gw
from grpo_watchdog.lab.cells import Cell, Job, Row
from grpo_watchdog.lab.faults import FAULTS
from grpo_watchdog.lab.policies import POLICIES, Scene, Unwatched
from grpo_watchdog.lab.runs import do
from grpo_watchdog.lab.scores import Figure, harmed, mean, scores
from grpo_watchdog.lab.training import TASKS

FIRST_SEED = 1000  # the test split's
DEFAULT_FAULTS = ("lr_up", "lr_spike", "nan_gradient", "nan_reward", "weights_corrupted")


class _SkippedError(Exception):
    """Leaves the optimizer step out."""


class _Objective:
    """The objective of a step; the controller looks right after its `backward`."""

    def __init__(self, objective: torch.Tensor, guard: Arc) -> None:
        self._objective, self._guard = objective, guard

    def backward(self) -> None:
        """Go backward, and ask the controller."""
        self._objective.backward()
        self._guard.action = self._guard.controller.step(self._objective)
        if self._guard.action.should_skip:
            raise _SkippedError


class Arc(Unwatched):
    """Its controller at work on one run."""

    def __init__(self, scene: Scene) -> None:
        """Put it between backward and the optimizer's step."""
        arc: Any = importlib.import_module("arc")
        training = scene.training
        config = arc.ControllerConfig(verbose=False, log_interventions=False)
        self.controller = arc.Controller(
            training.policy, training.optimizer, scheduler=training.scheduler, config=config
        )
        self.action: Any = None
        learn = training._learn  # noqa: SLF001 - where backward and the optimizer's step stand

        def watched(objective: torch.Tensor) -> torch.Tensor:
            try:
                return learn(_Objective(objective, self))  # type: ignore[arg-type] # all that is called is backward
            except _SkippedError:
                return torch.tensor(float("nan"))

        training._learn = watched  # type: ignore[method-assign] # noqa: SLF001

    def after(self, step: int, metrics: Mapping[str, Any]) -> gw.Verdict:  # noqa: ARG002 - it has looked already
        """Put its answer into a verdict."""
        action, acts = self.action, list[gw.Outcome]()
        done = {"rollback": action.rolled_back, "lower_learning_rate": action.lr_reduced, "halt": action.unrecoverable}
        if action.should_skip and not action.rolled_back:
            done["skip"] = True
        reason = str(action.failure_type or "")
        acts = [gw.Outcome(step, name, None, None, "arc", reason) for name, was in done.items() if was]
        level = {"FAILURE": "critical", "WARNING": "warning"}.get(action.status.name, "ok")
        return gw.Verdict(step, level, actions=tuple(acts), halt=bool(action.unrecoverable))

    def close(self) -> None:
        """Close it."""
        self.controller.close()


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--healthy", type=int, default=25, help="healthy runs of each task")
    parser.add_argument("--seeds", type=int, default=2, help="of each fault and severity")
    parser.add_argument("--fault", nargs="+", default=DEFAULT_FAULTS, choices=sorted(FAULTS))
    options = parser.parse_args()
    try:
        print(f"arc-training {version('arc-training')}, its defaults")
    except PackageNotFoundError:
        print("skipped: arc-training is not installed in this environment (see the first lines of this file)")
        return
    POLICIES["arc"] = Arc
    print("\nhealthy runs        steps  rollbacks  per 1000 steps  final reward / unwatched: mean  worst")
    for task in TASKS:
        cells = [Cell(task, "healthy", "", 0.0, FIRST_SEED + n) for n in range(options.healthy)]
        rows = [row for cell in cells for row in _played(cell, None)]
        steps = sum(row.ran for row in rows)
        back = sum(name == "rollback" for row in rows for _, name, _ in row.interventions)
        kept = [row.reward / row.unwatched for row in rows]
        print(f"{task:<18}{steps:>7}{back:>11}{1000 * back / steps:>16.2f}{mean(kept).value:>32.2f}{min(kept):>7.2f}")
    print("\nfault               task         harmful cells  rescue  noticed  interventions on harmless cells")
    for name in options.fault:
        for task in sorted(FAULTS[name].tasks):
            _fault(name, task, options.seeds)


def _fault(name: str, task: str, seeds: int) -> None:
    rows = list[Row]()
    for severity in FAULTS[name].test_severities:
        for seed in range(FIRST_SEED, FIRST_SEED + seeds):
            healthy = do(Job(Cell(task, "healthy", "", 0.0, seed), ("none",)))[0].reward
            rows += _played(Cell(task, "fault", name, severity, seed), healthy)
    found = scores(rows, "arc")
    count = f"{sum(map(harmed, rows))} of {len(rows)}"
    print(f"{name:<20}{task:<13}{count:>13}{_shown(found.rescue)}{_shown(found.recall)}{_shown(found.on_harmless)}")


def _played(cell: Cell, healthy: float | None) -> list[Row]:
    return [row for row in do(Job(cell, ("arc",), healthy)) if row.policy == "arc"]


def _shown(figure: Figure) -> str:
    return f"{figure.value:>9.2f}" if figure.n else f"{'-':>9}"


if __name__ == "__main__":
    main()
