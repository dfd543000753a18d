"""What `observe` costs a step, with the documented rulebook, beside a bare dict-compare of the same thresholds.

Prints the median and the 99th percentile in microseconds, the cost of one more rule, and whether either grows over a
long run. Everything is measured in one process, the floor and the watchdog in alternating blocks.

    python benchmarks/observe.py [--steps 100000] [--json]
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpo_watchdog as gw

BLOCK = 1000
EXTRA = 50
Row = dict[str, float]


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


def timed(call: Callable[[int, Row], Any], data: list[Row], first: int) -> list[float]:
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
    """Return all figures."""
    data = rows(BLOCK)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kept = gw.Watchdog("documented", run_dir=folder / "kept")
        bare = gw.Watchdog("documented")
        more = gw.Watchdog(with_extra_rules(folder, EXTRA))
        guard = gw.Watchdog("guarded")
        floors, journaled, plain, extra = list[float](), list[float](), list[float](), list[float]()
        guarded: list[float] = []
        memory = [0, 0]
        for block in range(max(2, steps // BLOCK)):
            first = block * BLOCK
            floors += timed(lambda _, row: floor(row), data, first)
            journaled += timed(kept.observe, data, first)
            plain += timed(bare.observe, data, first)
            extra += timed(more.observe, data, first)
            guarded += timed(guard.observe, data, first)
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
        "guarded_us": statistics.median(guarded),
        "extra_rule_us": (statistics.median(extra) - statistics.median(plain)) / EXTRA,
        "last_tenth_over_first": _over_floor(journaled[-tenth:], floors[-tenth:])
        / _over_floor(journaled[:tenth], floors[:tenth]),
        "memory_growth_kib": (memory[1] - memory[0]) / 1024,
    }


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
    found = measure(options.steps)
    if options.json:
        print(json.dumps(found))
        return
    print(f"{found['steps']:.0f} steps, documented rulebook, 10 metrics a step")
    print(f"  bare dict-compare (the floor)       {found['floor_us']:8.2f} us median")
    print(f"  observe, no run_dir                 {found['observe_without_journal_us']:8.2f} us median")
    print(f"  observe, with the journal           {found['observe_us']:8.2f} us median, "
          f"{found['observe_p99_us']:.1f} us p99")  # fmt: skip
    print(f"  observe, guarded, no run_dir        {found['guarded_us']:8.2f} us median")
    print(f"  one more rule                       {found['extra_rule_us']:8.3f} us")
    print(f"  last tenth / first, over the floor  {found['last_tenth_over_first']:8.2f}")
    print(f"  memory from step {2 * BLOCK} on            {found['memory_growth_kib']:8.0f} KiB (with the figures kept)")


if __name__ == "__main__":
    main()
