"""How fast an event file of TensorBoard is read: our rows beside EventAccumulator and tbparse, in one run.

One million scalars, 20 tags on 50,000 steps, written by torch's own SummaryWriter (which takes longer than reading
them). Every reader is held to the same sum, in alternating repeats; CPU seconds of one process, medians. On a machine
that others use too the ratios say more than the seconds.

    python benchmarks/reading.py [--steps 50000] [--repeats 3] [--keep FOLDER] [--json]
    pip install --no-deps tbparse   # for its row
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from grpo_watchdog.logs import opened

NAMES = (
    "loss", "grad_norm", "learning_rate", "num_tokens", "reward", "reward_std", "kl", "entropy", "step_time",
    "completions/mean_length", "completions/min_length", "completions/max_length", "completions/clipped_ratio",
    "completions/mean_terminated_length", "frac_reward_zero_std", "rewards/accuracy/mean", "rewards/accuracy/std",
    "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean",
)  # fmt: skip
Totals = tuple[int, float]  # how many scalars, and their sum: the proof that all were read


def written(folder: Path, steps: int) -> Path:
    """Return the event file in a folder, written now if there is none."""
    kept = sorted(folder.glob("*tfevents*"))
    if not kept:
        rng = random.Random(0)
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(folder))
        for step in range(steps):
            for name in NAMES:
                writer.add_scalar(f"train/{name}", rng.gauss(0, 1), step)
        writer.close()
        kept = sorted(folder.glob("*tfevents*"))
    (file,) = kept
    return file


def ours(file: Path) -> Totals:
    """Read it as rows, every checksum held."""
    count, total = 0, list[float]()
    with opened((str(file),)) as log:
        for row in log.rows:
            count += len(row.values)
            total += row.values.values()
    return count, math.fsum(total)


def accumulator(file: Path) -> Totals:
    """Read it with TensorBoard's EventAccumulator, told to keep every point (it keeps 10,000 a tag unless told)."""
    module = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    events = module.EventAccumulator(str(file), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    values = [event.value for tag in events.Tags()["scalars"] for event in events.Scalars(tag)]
    return len(values), math.fsum(values)


def tbparse(file: Path) -> Totals:
    """Read it with tbparse, which makes a data frame of what an EventAccumulator has read."""
    values = importlib.import_module("tbparse").SummaryReader(str(file)).scalars["value"]
    return len(values), math.fsum(values)


READERS: dict[str, Callable[[Path], Totals]] = {
    "grpo-watchdog": ours,
    "EventAccumulator": accumulator,
    "tbparse": tbparse,
}


def measure(file: Path, repeats: int) -> dict[str, list[float] | None]:
    """Return the CPU seconds of each reader; None where it is not installed."""
    seconds: dict[str, list[float] | None] = {name: [] for name in READERS}
    expected: Totals | None = None
    for _ in range(repeats):
        for name, read in READERS.items():
            taken = seconds[name]
            if taken is None:
                continue
            begun = time.process_time()
            try:
                count, total = read(file)
            except ImportError:
                seconds[name] = None
                continue
            taken.append(time.process_time() - begun)
            expected = expected or (count, total)
            if count != expected[0] or not math.isclose(total, expected[1], rel_tol=1e-9):
                raise SystemExit(f"{name} read {count} scalars of sum {total}; the first one {expected}")
    return seconds


def main() -> None:
    """Write, read and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="a folder that keeps the file for the next time")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        file = written(options.keep or Path(name), options.steps)
        scalars, size = ours(file)[0], file.stat().st_size
        seconds = measure(file, options.repeats)
    if options.json:
        print(json.dumps({"scalars": scalars, "bytes": size, "seconds": seconds}))
        return
    print(f"{scalars} scalars, {size / 1e6:.1f} MB; CPU seconds, median of {options.repeats}")
    base = statistics.median(seconds["grpo-watchdog"] or [math.nan])
    for label, taken in seconds.items():
        if not taken:
            print(f"  {label:<18}  not installed")
            continue
        middle = statistics.median(taken)
        print(f"  {label:<18} {middle:8.2f} s {scalars / middle:12,.0f} scalars/s {middle / base:8.1f} times ours")


if __name__ == "__main__":
    main()
