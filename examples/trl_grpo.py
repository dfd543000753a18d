"""TRL's GRPOTrainer with a watchdog: the hook is one line, `gw.attach(trainer)`.

A tiny Llama learns with GRPO to repeat letters, on one CPU core; at step 60 its learning rate is multiplied by 100 and
stays so. Healthy, ruined and rescued are the same run three times. Run it: python examples/trl_grpo.py
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import sys
import tempfile
from pathlib import Path

import torch

import grpo_watchdog as gw
from grpo_watchdog.lab.trl_toy import LearningRateFault, reward_of, toy_trainer

STEPS, SICK_AT, FACTOR, LAST = 200, 60, 100, 10


def main(folder: Path, *, lora: bool = False) -> dict[str, float]:
    """Train three times, and return the mean reward at the end of each."""
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.WARNING, format="    %(message)s")
    rewards = {}
    for name in ("healthy", "ruined", "rescued"):
        print(f"{name}:", flush=True)
        faults = [] if name == "healthy" else [LearningRateFault(SICK_AT, FACTOR)]
        trainer = toy_trainer(folder / name, max_steps=STEPS, lora=lora, callbacks=faults)
        if name == "rescued":
            gw.attach(trainer, rules="guarded")  # this is the hook
        trainer.train()
        told = [reward for reward in reward_of(trainer) if not math.isnan(reward)]
        rewards[name] = statistics.fmean(told[-LAST:])
        print(f"    mean reward of the last {LAST} batches: {rewards[name]:.2f}", flush=True)
    print(f"report: grpo-watchdog report {folder / 'rescued' / 'grpo_watchdog'}")
    return rewards


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="where the three runs go (a temporary folder)")
    parser.add_argument("--lora", action="store_true", help="train adapters in place of all weights")
    given = parser.parse_args()
    end = main(given.folder or Path(tempfile.mkdtemp()), lora=given.lora)
    sys.exit(end["rescued"] < 0.9 * end["healthy"])
