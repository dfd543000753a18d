"""What the hook costs a training step of TRL's GRPOTrainer, and how many host transfers it makes.

The trainer is the toy with a larger batch, so that a step takes about 0.2 s on one thread. Two measurements in one
process: the wall clock of a step, bare and watched in alternating runs, and the time spent inside the hook itself,
taken around every function of it that the trainer or the optimizer calls. The second is free of the noise of the
first. Transfers are counted where tensors become numbers (item, tolist, cpu, float, bool ...) while the hook runs.

    python benchmarks/trl_overhead.py [--steps 40] [--rounds 3] [--batch 512] [--lora]
"""

from __future__ import annotations

import argparse
import functools
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import grpo_watchdog as gw
from grpo_watchdog.integrations.torch_checks import ModelChecks
from grpo_watchdog.integrations.torch_lr import LearningRateCeiling
from grpo_watchdog.integrations.torch_tripwires import Tripwires
from grpo_watchdog.integrations.torch_veto import GradientVeto
from grpo_watchdog.integrations.trainer_hook import TrainerHook
from grpo_watchdog.integrations.trainer_taps import Taps
from grpo_watchdog.integrations.trl_grpo import GrpoTaps
from grpo_watchdog.lab.trl_toy import toy_trainer

INSIDE: dict[type, list[str]] = {  # everything of the hook that is called from outside
    Taps: ["_after_training_step", "_after_grad_norm"],
    GrpoTaps: ["_after_scoring", "_after_loss", "_after_rewards", "_after_generation"],
    TrainerHook: ["on_step_begin", "on_step_end"],
    GradientVeto: ["_judge", "_give_back"],
    Tripwires: ["_before_step", "_after_step"],
    LearningRateCeiling: ["_lower", "_stepped"],
    ModelChecks: ["_before_step", "_after_step"],
}
TRANSFERS = ("item", "tolist", "cpu", "numpy", "__float__", "__bool__", "__int__")
WARM_UP = 5  # steps that are not counted


class Meter:
    """Adds up what the hook spends and transfers."""

    def __init__(self) -> None:
        """Wrap every function of the hook, and what turns tensors into numbers."""
        self.seconds, self.transfers, self._depth = 0.0, 0, 0
        for owner, names in INSIDE.items():
            for name in names:
                setattr(owner, name, self._timed(getattr(owner, name)))
        for name in TRANSFERS:
            setattr(torch.Tensor, name, self._counted(getattr(torch.Tensor, name)))

    def _timed(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(inner)
        def timed(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            began = time.perf_counter()
            self._depth += 1
            try:
                return inner(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds += time.perf_counter() - began

        return timed

    def _counted(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(inner)
        def counted(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            self.transfers += bool(self._depth)
            return inner(*args, **kwargs)

        return counted


class Steps(transformers.TrainerCallback):
    """Takes the time of each step, and what of it was the hook's."""

    def __init__(self, meter: Meter) -> None:
        """Start with nothing."""
        self._meter = meter
        self.walls: list[float] = []
        self.own: list[float] = []
        self.transfers: list[int] = []
        self._at: tuple[float, float, int] | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401, ARG002
        """End the last step, begin the next: logging is between."""
        now = (time.perf_counter(), self._meter.seconds, self._meter.transfers)
        if self._at is not None:
            self.walls.append(now[0] - self._at[0])
            self.own.append(now[1] - self._at[1])
            self.transfers.append(now[2] - self._at[2])
        self._at = now


def run(meter: Meter, rules: str | None, *, steps: int, batch: int, lora: bool) -> Steps:
    """Train once, and return what the steps took."""
    taken = Steps(meter)
    with tempfile.TemporaryDirectory() as folder:
        trainer = toy_trainer(
            Path(folder), max_steps=steps, lora=lora, callbacks=[taken], per_device_train_batch_size=batch
        )
        if rules is not None:
            gw.attach(trainer, rules=rules, checkpoint_every=0)
        trainer.train()
    return taken


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=512, help="completions a step")
    parser.add_argument("--lora", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("grpo_watchdog").setLevel(logging.CRITICAL)
    meter = Meter()
    walls: dict[str, list[float]] = {}
    own: dict[str, list[float]] = {}
    transfers: dict[str, list[int]] = {}
    for _ in range(given.rounds):
        for name, rules in (("bare", None), ("documented", "documented"), ("guarded", "guarded")):
            taken = run(meter, rules, steps=given.steps, batch=given.batch, lora=given.lora)
            walls.setdefault(name, []).extend(taken.walls[WARM_UP:])
            own.setdefault(name, []).extend(taken.own[WARM_UP:])
            transfers.setdefault(name, []).extend(taken.transfers[WARM_UP:])
    print("| rules | step, median [ms] | the hook's own time, median [ms] | share of the step | transfers a step |")
    print("|---|---|---|---|---|")
    for name, taken_walls in walls.items():
        share = 100 * sum(own[name]) / sum(taken_walls)
        print(
            f"| {name} | {1e3 * statistics.median(taken_walls):.0f} | {1e3 * statistics.median(own[name]):.2f} "
            f"| {share:.2f} % | {statistics.mean(transfers[name]):.1f} |"
        )


if __name__ == "__main__":
    main()
