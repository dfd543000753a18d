"""How often the early-warning detectors cry wolf, and how soon they warn.

`drift`: the share of healthy runs of 1000 observations with any alarm (both directions watched), what that says about
the mean observations to a false alarm, and how long after a change at observation 500 it alarms. `trend`: the same runs
as logarithms of a positive metric, and how long before an exponential crosses its threshold it warns.

    python benchmarks/early_warning.py [--streams 400] [--delays 200] [--seed 4071]

The seed that was used to choose the detectors' constants is not the default one.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from grpo_watchdog.detectors import Detector
from grpo_watchdog.detectors.drift import DriftDetector, DriftRule
from grpo_watchdog.detectors.trend import TrendDetector, TrendRule
from grpo_watchdog.rule import Text

Streams = npt.NDArray[np.float64]

STEPS, CHANGE = 1000, 500
KINDS = ("normal", "t3", "lognormal", "AR .5", "AR .9", "learning curve")
CHANGES = {  # level in standard deviations, slope in standard deviations an observation
    "shift 1": (1.0, 0.0),
    "shift 2": (2.0, 0.0),
    "shift 3": (3.0, 0.0),
    "shift 5": (5.0, 0.0),
    "ramp .01": (0.0, 0.01),
    "ramp .025": (0.0, 0.025),
    "ramp .05": (0.0, 0.05),
}
SOON, LATE = 50, 200  # observations within which a change is caught
GOAL, AWAY = 5.0, 6.0  # trend's threshold, and how many standard deviations of the logarithm it lies above the middle
WITHIN = 50
LEADS = 40  # exponentials a row
METRIC, TEXT = "kl", Text(en="drift", zh="漂移")
DRIFT = DriftRule(kind="drift", title=TEXT, source="benchmark", severity="warning", metric=METRIC)
TREND = TrendRule(
    kind="trend", title=TEXT, source="benchmark", severity="warning", metric=METRIC, reaches=GOAL, within=WITHIN
)


def healthy(kind: str, rng: np.random.Generator, count: int) -> tuple[Streams, float]:
    """Return streams in which nothing changes, and the standard deviation of one of their values."""
    normal = rng.standard_normal((count, STEPS))
    if kind == "t3":
        return rng.standard_t(3, (count, STEPS)), math.sqrt(3)
    if kind == "lognormal":
        return np.exp(normal), math.sqrt((math.e - 1) * math.e)
    if kind == "learning curve":  # up by 20 standard deviations of its noise
        return 1 - np.exp(-np.arange(STEPS) / 200) + 0.05 * normal, 0.05
    if kind.startswith("AR"):
        phi = float(kind.removeprefix("AR"))
        scale = 1 / math.sqrt(1 - phi * phi)
        normal[:, 0] *= scale
        for step in range(1, STEPS):
            normal[:, step] += phi * normal[:, step - 1]
        return normal, scale
    return normal, 1.0


def first_alarm(detector: Detector, values: Iterable[float]) -> int | None:
    """Return at which of these values it first fires."""
    for step, value in enumerate(values):
        reading = detector.read({METRIC: value}, firing=False)
        if reading is not None and reading.rank:
            return step
    return None


def poisson_limit(events: int) -> float:
    """Return the mean count that would show this few events only once in twenty times (95 % upper limit)."""
    low, high = 0.0, 10.0 + 3 * events
    for _ in range(60):
        mean = (low + high) / 2
        seen = math.exp(-mean) * sum(mean**k / math.factorial(k) for k in range(events + 1))
        low, high = (mean, high) if seen > 0.05 else (low, mean)  # noqa: PLR2004 - one in twenty
    return high


class FalseAlarms(NamedTuple):
    """What healthy streams did.

    Attributes:
        streams: how many.
        alarmed: in how many of them it alarmed.
        watched: observations after the history was there, up to the alarm.
    """

    streams: int
    alarmed: int
    watched: int

    def row(self, kind: str) -> str:
        """Return the line of the table; no mean is measured where nothing happened."""
        length = f"{self.watched / self.alarmed:,.0f}" if self.alarmed else "-"
        least = self.watched / poisson_limit(self.alarmed)
        return (
            f"| {kind} | {self.alarmed} of {self.streams} | {100 * self.alarmed / self.streams:.2f} % | {length} | "
            f"{least:,.0f} |"
        )


def false_alarms(streams: Streams) -> FalseAlarms:
    """Run every stream to its first alarm."""
    alarms = [first_alarm(DriftDetector(DRIFT), stream) for stream in streams.tolist()]
    ends = [STEPS if alarm is None else alarm + 1 for alarm in alarms]
    found = sum(alarm is not None for alarm in alarms)
    return FalseAlarms(len(alarms), found, sum(max(0, end - DRIFT.min_history) for end in ends))


def delays(streams: Streams, deviation: float) -> dict[str, list[float]]:
    """Return, for each change, the observations from it to the alarm; infinite where none came.

    Half of the changes go up, half go down. Streams that alarm before the change are left out.
    """
    found: dict[str, list[float]] = {name: [] for name in CHANGES}
    after = np.arange(1, STEPS - CHANGE + 1)
    for number, stream in enumerate(streams):
        before = DriftDetector(DRIFT)
        if first_alarm(before, stream[:CHANGE].tolist()) is not None:
            continue
        state, sign = before.state_dict(), 1 - 2 * (number % 2)
        for name, (level, slope) in CHANGES.items():
            detector = DriftDetector(DRIFT)
            detector.load_state_dict(state)
            changed = stream[CHANGE:] + sign * deviation * (level + slope * after)
            alarm = first_alarm(detector, changed.tolist())
            found[name].append(math.inf if alarm is None else alarm + 1)
    return found


def delay_cell(found: Sequence[float]) -> str:
    """Return median delay, share caught soon, share caught at all in time."""
    middle = statistics.median(found)
    shown = f"{middle:.0f}" if math.isfinite(middle) else "-"
    soon, late = (100 * sum(delay <= limit for delay in found) / len(found) for limit in (SOON, LATE))
    return f"{shown} ({soon:.0f}, {late:.0f})"


def trend_alarms(kind: str, streams: Streams, deviation: float) -> int:
    """Return in how many streams `trend` warns of a crossing; their values are the logarithms of the metric."""
    middle = 1.0 if kind == "learning curve" else float(np.mean(streams))
    logs = np.minimum((streams - middle) / deviation * math.log(GOAL) / AWAY, 700)
    alarms = [first_alarm(TrendDetector(TREND), stream) for stream in np.exp(logs).tolist()]
    return sum(alarm is not None for alarm in alarms)


def leads(growth: float, noise: float, rng: np.random.Generator) -> list[int]:
    """Return how many observations before its level crosses the threshold each exponential was seen coming; 0: not."""
    found = []
    for _ in range(LEADS):
        calm = 100
        rising = math.ceil(math.log(GOAL / 0.1) / growth)  # from 0.1
        logs = math.log(0.1) + growth * np.maximum(np.arange(calm + rising) - calm, 0)
        alarm = first_alarm(TrendDetector(TREND), np.exp(logs + noise * rng.standard_normal(len(logs))).tolist())
        found.append(0 if alarm is None else len(logs) - alarm)
    return found


def print_drift(options: argparse.Namespace) -> None:
    """Measure `drift` and print both tables."""
    print(f"`drift`: false alarms on healthy streams of {STEPS} observations\n")
    print("| noise | streams with an alarm | share | observations to an alarm | at least (95 %) |")
    print("|---|---|---|---|---|")
    total, found = FalseAlarms(0, 0, 0), {}
    begun = time.perf_counter()
    for kind in KINDS:
        rng = np.random.default_rng([options.seed, KINDS.index(kind)])
        streams, deviation = healthy(kind, rng, options.streams)
        alarms = false_alarms(streams)
        print(alarms.row(kind), flush=True)
        total = FalseAlarms(*(a + b for a, b in zip(total, alarms, strict=True)))
        found[kind] = (streams[: options.delays], deviation)
    print(total.row("all"))
    print(f"\n{1e6 * (time.perf_counter() - begun) / (total.streams * STEPS):.1f} us an observation\n")
    print(f"`drift`: delay after a change at observation {CHANGE}, {options.delays} streams: median (caught within "
          f"{SOON}, within {LATE}, in %)\n")  # fmt: skip
    print("| noise | " + " | ".join(CHANGES) + " |")
    print("|---" * (len(CHANGES) + 1) + "|")
    for kind, (streams, deviation) in found.items():
        cells = delays(streams, deviation)
        print(f"| {kind} | " + " | ".join(delay_cell(cells[name]) for name in CHANGES) + " |", flush=True)


def print_trend(options: argparse.Namespace) -> None:
    """Measure `trend` and print both tables."""
    print(f"\n`trend`: streams of {STEPS} observations with a false warning; the threshold lies {AWAY:g} standard "
          "deviations above the middle\n")  # fmt: skip
    print("| noise | streams with a warning |")
    print("|---|---|")
    for kind in KINDS:
        rng = np.random.default_rng([options.seed, 10 + KINDS.index(kind)])
        streams, deviation = healthy(kind, rng, options.delays)
        print(f"| {kind} | {trend_alarms(kind, streams, deviation)} of {options.delays} |", flush=True)
    noises = (0.05, 0.2, 0.5)
    print(f"\n`trend`: observations between the warning and the crossing ({LEADS} exponentials from 0.1 to {GOAL:g}, "
          f"within {WITHIN}): median (least); 0: not seen coming\n")  # fmt: skip
    print("| growth an observation | " + " | ".join(f"noise {noise:g}" for noise in noises) + " |")
    print("|---" * (len(noises) + 1) + "|")
    for growth in (0.02, 0.05, 0.2):
        rng = np.random.default_rng([options.seed, int(1000 * growth)])
        found = [leads(growth, noise, rng) for noise in noises]
        cells = " | ".join(f"{statistics.median(row):.0f} ({min(row)})" for row in found)
        print(f"| {100 * growth:.0f} % | {cells} |")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=400, help="healthy streams of each kind of noise")
    parser.add_argument("--delays", type=int, default=200, help="streams of each kind that a change is put into")
    parser.add_argument("--seed", type=int, default=4071)
    options = parser.parse_args()
    if not 0 < options.delays <= options.streams:
        parser.error("--delays must lie between 1 and --streams")
    print_drift(options)
    print_trend(options)


if __name__ == "__main__":
    main()
