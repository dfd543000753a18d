"""What `observe` costs a step: by itself, and beside what other packages cost on the same steps.

First the documented rulebook beside a bare dict-compare of the same thresholds: medians and the 99th percentile in
microseconds, the cost of one more rule, and whether either grows over a long run. Then the rulebooks on the 18 metrics
of a healthy run of a language model, beside rlwatch (its detectors alone, and its live monitor, which writes a
database) and Lightning's SpikeDetection (one metric), where these are installed. Everything is measured in one
process, in alternating blocks: on a machine that others use too, the ratios say more than the microseconds.

    python benchmarks/observe.py [--steps 100000] [--json]
    pip install --no-deps rlwatch lightning lightning-utilities torchmetrics scipy   # for the rows of the others
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import math
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpo_watchdog as gw

BLOCK = 1000
EXTRA = 50
REPEATS = 5
Row = dict[str, float]
Check = Callable[[int, Row], Any]


def rows(count: int) -> list[Row]:
    """Return healthy steps: the document's nine metrics and log_ratio."""
    rng = random.Random(0)
    made = []
    for _ in range(count):
        log_ratio = rng.gauss(0.02, 0.01)
        reference = rng.gauss(-258, 2)
        policy, kl = rng.gauss(0, 0.2), log_ratio
        row = {"loss": policy + 0.1 * kl, "policy_loss": policy, "kl_penalty": kl, "mean_advantage": 0.0}
        row |= {"log_ratio": log_ratio, "mean_ratio": math.exp(log_ratio + 0.01)}
        row |= {"mean_log_prob_current": reference + log_ratio, "mean_log_prob_ref": reference}
        row |= {"mean_reward": rng.uniform(0.4, 0.6), "std_reward": rng.uniform(0.1, 0.3)}
        made.append(row)
    return made


def llm_rows(count: int) -> list[Row]:
    """Return healthy steps of a language model's run: 18 metrics with noise."""
    rng = random.Random(1)
    made = []
    for _ in range(count):
        policy, kl, log_ratio = rng.gauss(0, 0.02), abs(rng.gauss(0.02, 0.005)), rng.gauss(0, 1e-3)
        row = {"loss": policy + 0.04 * kl, "policy_loss": policy, "kl": kl, "kl_coef": 0.04}
        row |= {"mean_reward": rng.gauss(0.55, 0.05), "std_reward": rng.uniform(0.2, 0.3)}
        row |= {"zero_std_fraction": rng.choice([0.0, 0.125, 0.25]), "std_advantage": rng.gauss(0.95, 0.01)}
        row |= {"entropy": rng.gauss(0.6, 0.02), "grad_norm": rng.lognormvariate(-1, 0.2), "learning_rate": 1e-6}
        row |= {"log_ratio": log_ratio, "mean_ratio": math.exp(log_ratio) + 1e-5}
        row |= {"step_kl": rng.lognormvariate(-8, 0.3), "clip_fraction": rng.uniform(0, 0.02)}
        row |= {"completion_length": rng.gauss(300, 20), "truncated_fraction": rng.uniform(0, 0.05)}
        row |= {"sampler_mismatch": rng.lognormvariate(-6, 0.1)}
        made.append(row)
    return made


RANGES = tuple(
    (name, metric.normal[0], metric.normal[1]) for name, metric in gw.METRICS.items() if metric.normal is not None
)


def floor(row: Row) -> bool:
    """Hold one row against the same thresholds, with nothing remembered, written or returned but yes or no."""
    get = row.get
    for name, low, high in RANGES:
        if not low <= get(name, low) <= high:
            return True
    band = abs(get("log_ratio", 0.0)) >= 5  # noqa: PLR2004 - the document's first edge
    flat = get("std_reward", 1.0) <= 1e-6  # noqa: PLR2004
    return band or flat or not math.isfinite(sum(row.values()))


def timed(call: Check, data: list[Row], first: int) -> list[float]:
    """Return the microseconds of each call."""
    clock, times = time.perf_counter_ns, []
    for number, row in enumerate(data, start=first):
        begun = clock()
        call(number, row)
        times.append((clock() - begun) / 1000)
    return times


def with_extra_rules(folder: Path, count: int) -> gw.Rulebook:
    """Return the documented rulebook with some more bands."""
    lines = ["schema: 1", "name: extra", "extends: documented", "rules:"]
    rest = "severity: warning, title: {en: extra, zh: extra}, source: benchmark"
    lines += [
        f"  extra{n}: {{kind: outside, metric: kl_penalty, low: -{n + 3}, high: {n + 3}, {rest}}}" for n in range(count)
    ]
    path = folder / "extra.yaml"
    path.write_text("\n".join(lines))
    return gw.load(path)


def measure(steps: int) -> dict[str, float]:
    """Return what `observe` costs by itself."""
    data = rows(BLOCK)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kept = gw.Watchdog("documented", run_dir=folder / "kept")
        bare = gw.Watchdog("documented")
        more = gw.Watchdog(with_extra_rules(folder, EXTRA))
        floors, journaled, plain, extra = list[float](), list[float](), list[float](), list[float]()
        memory = [0, 0]
        for block in range(max(2, steps // BLOCK)):
            first = block * BLOCK
            floors += timed(lambda _, row: floor(row), data, first)
            journaled += timed(kept.observe, data, first)
            plain += timed(bare.observe, data, first)
            extra += timed(more.observe, data, first)
            if block == 1:
                memory[0] = _rss()
        memory[1] = _rss()
        kept.close()
    tenth = max(BLOCK, len(journaled) // 10)
    return {
        "steps": len(journaled),
        "floor_us": statistics.median(floors),
        "observe_us": statistics.median(journaled),
        "observe_p99_us": statistics.quantiles(journaled, n=100)[98],
        "observe_without_journal_us": statistics.median(plain),
        "extra_rule_us": (statistics.median(extra) - statistics.median(plain)) / EXTRA,
        "last_tenth_over_first": _over_floor(journaled[-tenth:], floors[-tenth:])
        / _over_floor(journaled[:tenth], floors[:tenth]),
        "memory_growth_kib": (memory[1] - memory[0]) / 1024,
    }


THEIRS = {
    "entropy": "entropy",
    "kl_divergence": "kl",
    "reward_mean": "mean_reward",
    "reward_std": "std_reward",
    "advantage_std": "std_advantage",
    "loss": "loss",
    "grad_norm": "grad_norm",
}  # rlwatch's names


def rlwatch_check(folder: Path) -> Check:  # noqa: ARG001
    """Return rlwatch's look at one step: its detectors on the metrics that they know."""
    config = importlib.import_module("rlwatch.config").load_config(None)
    suite = importlib.import_module("rlwatch.detectors").DetectorSuite(config)

    def check(number: int, row: Row) -> None:
        suite.check_step(number, rewards=None, **{name: row[ours] for name, ours in THEIRS.items()})

    return check


def rlwatch_monitor(folder: Path) -> Check:
    """Return what a loop calls on every step: rlwatch's live monitor, with nothing sent to anybody."""
    config = importlib.import_module("rlwatch.config").load_config(None)
    config.storage.log_dir = str(folder)
    monitor = importlib.import_module("rlwatch.core").RLWatch(config)

    def check(number: int, row: Row) -> None:
        monitor.log_step(number, **{name: row[ours] for name, ours in THEIRS.items()})

    return check


def spike_check(folder: Path) -> Check:
    """Return Lightning's look at one step: is this loss a spike beside the mean of the last ten.

    The loss is lifted to about 1: beside a mean near 0 every loss is a spike, which ends the training.
    """
    torch = importlib.import_module("torch")
    logging.getLogger("lightning").setLevel(logging.ERROR)
    fabric = importlib.import_module("lightning.fabric").Fabric(accelerator="cpu", devices=1)
    spike = importlib.import_module("lightning.fabric.utilities.spike").SpikeDetection(exclude_batches_path=folder)

    def check(number: int, row: Row) -> None:
        spike.on_train_batch_end(fabric, torch.tensor(1 + row["loss"]), None, number)

    return check


OTHERS = {
    "rlwatch, its detectors": rlwatch_check,
    "rlwatch, its live monitor": rlwatch_monitor,
    "Lightning SpikeDetection": spike_check,
}


def beside(blocks: int, folder: Path) -> dict[str, tuple[float, float, float] | None]:
    """Return median, mean and 99th percentile of each, as medians over repeats; None where it is not installed."""
    data, checks = llm_rows(BLOCK), dict[str, Check]()
    found: dict[str, tuple[float, float, float] | None] = {}
    for book in ("documented", "guarded", "guarded_llm"):
        checks[f"observe, {book}"] = gw.Watchdog(book, ratio_to="old").observe
    for name, make in OTHERS.items():
        found[name] = None
        try:
            checks[name] = make(folder)
        except ImportError:
            continue
    times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in checks}
    for repeat in range(REPEATS + 1):
        for name, check in checks.items():
            took = list[float]()
            for block in range(blocks):
                took += timed(check, data, (repeat * blocks + block) * BLOCK)
            if repeat:  # the first one only warms up: every window is full from there on
                late = statistics.quantiles(took, n=100)[98]
                mean = statistics.fmean(t for t in took if t <= late)  # the slowest 1 % are the machine's
                times[name].append((statistics.median(took), mean, late))
    for name, repeats in times.items():
        middle, mean, late = (statistics.median(figures) for figures in zip(*repeats, strict=True))
        found[name] = (middle, mean, late)
    return found


def _over_floor(times: list[float], floors: list[float]) -> float:
    """Return a median in units of the floor's: a machine that slows down meanwhile does not look like growth."""
    return statistics.median(times) / statistics.median(floors)


def _rss() -> int:
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * 4096 if pages.exists() else 0


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # of the others
    logging.getLogger("grpo_watchdog").setLevel(logging.ERROR)
    found = measure(options.steps)
    with tempfile.TemporaryDirectory() as name:
        others = beside(max(1, options.steps // (20 * BLOCK)), Path(name))
    if options.json:
        print(json.dumps({**found, "beside": others}))
        return
    print(f"{found['steps']:.0f} steps, documented rulebook, 10 metrics a step")
    print(f"  bare dict-compare (the floor)       {found['floor_us']:8.2f} us median")
    print(f"  observe, no run_dir                 {found['observe_without_journal_us']:8.2f} us median")
    print(f"  observe, with the journal           {found['observe_us']:8.2f} us median, "
          f"{found['observe_p99_us']:.1f} us p99")  # fmt: skip
    print(f"  one more rule                       {found['extra_rule_us']:8.3f} us")
    print(f"  last tenth / first, over the floor  {found['last_tenth_over_first']:8.2f}")
    print(f"  memory from step {2 * BLOCK} on            {found['memory_growth_kib']:8.0f} KiB (with the figures kept)")
    ours = others["observe, guarded"]
    assert ours is not None
    print(f"\n18 metrics a step, no run_dir, medians of {REPEATS} repeats    median      mean       p99   over guarded")
    for label, figures in sorted(others.items(), key=lambda item: item[1] or (math.inf,)):
        if figures is None:
            print(f"  {label:<34}  not installed")
        else:
            middle, mean, late = figures
            print(f"  {label:<34} {middle:8.1f}  {mean:8.1f}  {late:8.1f} us   {mean / ours[1]:8.2f} (means)")


if __name__ == "__main__":
    main()
