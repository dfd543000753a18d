"""CPU seconds of `diagnose` on a long log: 100,000 steps of 30 metrics as TRL names them, healthy, guarded, end to end.

    python benchmarks/diagnose.py [--steps 100000]

The log is written to a temporary folder as a TensorBoard event file and as JSONL; each is diagnosed in a process of its
own, from the start of Python to the report.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

REWARDS = ("format", "correct", "length")


def main() -> int:
    """Write both logs, diagnose them, print a table."""
    parser = argparse.ArgumentParser(description="CPU seconds of diagnose on a long log")
    parser.add_argument("--steps", type=int, default=100_000)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as folder:
        lines, events = Path(folder) / "log.jsonl", Path(folder) / "events"
        with lines.open("w") as file:
            file.writelines(json.dumps({"step": step, **row}) + "\n" for step, row in enumerate(rows(steps), start=1))
        _events(events, steps)
        width = len(next(rows(1)))
        print(f"{steps} steps of {width} metrics, rulebook guarded\n")
        print("| log | CPU s | peak MiB | verdict |\n|---|---|---|---|")
        for name, path in (("JSONL", lines), ("TensorBoard", events)):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            command = [sys.executable, "-m", "grpo_watchdog.cli", "diagnose", str(path), "--format", "json"]
            told = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own command
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            verdict = json.loads(told.stdout)["runs"][0]["verdict"]
            print(f"| {name} | {used:.1f} | {after.ru_maxrss / 1024:.0f} | {verdict} |", flush=True)
    return 0


def rows(steps: int) -> Iterator[dict[str, float]]:
    """Yield the rows of a healthy run: the reward rises, entropy falls, KL grows, all with noise."""
    draw = random.Random(0)
    for step in range(steps):
        learned = 1 - math.exp(-3 * step / steps)
        reward = 0.3 + 0.5 * learned + draw.gauss(0, 0.05)
        row = {
            "loss": draw.gauss(0.01, 0.02), "grad_norm": abs(draw.gauss(0.4, 0.1)), "learning_rate": 1e-6,
            "reward": reward, "reward_std": abs(draw.gauss(0.3, 0.05)), "frac_reward_zero_std": draw.random() * 0.5,
            "kl": 0.05 * learned * math.exp(draw.gauss(0, 0.3)), "entropy": 0.6 - 0.3 * learned + draw.gauss(0, 0.02),
            "num_tokens": 1000.0 * step, "step_time": abs(draw.gauss(10, 1)), "epoch": step / steps,
            "completions/mean_length": 300 + draw.gauss(0, 20), "completions/min_length": 100 + draw.gauss(0, 10),
            "completions/max_length": 500 + draw.gauss(0, 5), "completions/clipped_ratio": draw.random() * 0.1,
            "completions/mean_terminated_length": 290.0, "completions/min_terminated_length": 100.0,
            "completions/max_terminated_length": 480.0, "clip_ratio/low_mean": 0.0, "clip_ratio/low_min": 0.0,
            "clip_ratio/high_mean": 0.0, "clip_ratio/high_max": 0.0, "clip_ratio/region_mean": 0.0,
            "sampling/sampling_logp_difference/mean": abs(draw.gauss(0.01, 0.002)),
        }  # fmt: skip
        for name in REWARDS:
            row |= {f"rewards/{name}/mean": reward / 3, f"rewards/{name}/std": 0.1}
        yield row


def _events(folder: Path, steps: int) -> None:
    from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - only this part needs torch

    with SummaryWriter(str(folder)) as writer:
        for step, row in enumerate(rows(steps), start=1):
            for key, value in row.items():
                writer.add_scalar(f"train/{key}", value, step)


if __name__ == "__main__":
    sys.exit(main())
