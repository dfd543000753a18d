"""One recorded run, and all of them: everything that the tables need is computed here, in one pass over each log."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from grpo_watchdog.backtest import read_labels
from grpo_watchdog.errors import WatchdogError
from recorded_parts.otherwise import OTHERWISE  # type: ignore[import-not-found] # found beside the script
from recorded_parts.packages import PACKAGES, called  # type: ignore[import-not-found]
from recorded_parts.tables import Run  # type: ignore[import-not-found]
from recorded_parts.variants import (  # type: ignore[import-not-found]
    BOOKS,
    FACTORS,
    Call,
    Threshold,
    ablated,
    all_moved,
    book,
    call,
    fired,
    read_steps,
    scaled,
    without,
)


class Study(NamedTuple):
    """Everything that was computed on one run.

    Attributes:
        error: why it could not be read, or "".
        calls: by rulebook and package; None where a package is not installed.
        cpu: by the same, the seconds that it took.
        fired: by rule and severity, the first step.
        without: by rule, what the run is called without it.
        moved: by threshold and factor, what it is called then, where that is another.
        scales: by factor, what it is called with all thresholds moved.
        otherwise: by how it is logged otherwise, what it is called then.
    """

    error: str = ""
    calls: dict[str, Call | None] = {}  # noqa: RUF012 - never written to
    cpu: dict[str, float] = {}  # noqa: RUF012
    fired: dict[str, dict[str, int]] = {}  # noqa: RUF012
    without: dict[str, Call] = {}  # noqa: RUF012
    moved: dict[tuple[Threshold, float], Call] = {}  # noqa: RUF012
    scales: dict[float, Call] = {}  # noqa: RUF012
    otherwise: dict[str, Call] = {}  # noqa: RUF012


def read_runs(folder: Path) -> list[Run]:
    """Return the labels of a folder.

    Raises:
        ConfigurationError: they cannot be used; says where.
    """
    path = folder / "labels.csv"
    labels = read_labels(path)
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    runs = []
    for row in rows:
        label = labels[row["file"]]
        readings = (row.get("severity_1") or label.severity, row.get("severity_2") or label.severity)
        name, family = row.get("name") or row["file"], row.get("family") or row["file"]
        runs.append(Run(name, row["file"], label.severity, readings, row.get("label") or "", label.trouble_step,
                               label.must_by, label.steps_per_row, family))  # fmt: skip
    return runs


def study(run: Run, folder: Path, *, quick: bool) -> Study:
    """Return everything about one run."""
    begun = time.process_time()
    try:
        steps = read_steps(folder / run.file, run.steps_per_row)
    except WatchdogError as error:
        return Study(str(error))
    cpu = {"reading": time.process_time() - begun}
    calls: dict[str, Call | None] = {}

    def timed(name: str, contestant: Callable[[], Call | None]) -> None:
        begun = time.process_time()
        calls[name] = contestant()
        cpu[name] = time.process_time() - begun

    for name in BOOKS:
        rules = book(name)
        timed(name, partial(call, rules, steps))
    for name in PACKAGES:
        timed(name, partial(called, name, steps))
    if quick:
        return Study(calls=calls, cpu=cpu)
    guarded, base = book("guarded"), calls["guarded"]
    first = fired(guarded, steps)
    scales = {factor: call(all_moved("guarded", factor), steps) for factor in FACTORS}
    return Study(
        "", calls, cpu, first, ablated(guarded, steps, first), scaled(guarded, steps, base), {**scales, 1.0: base},
        {name: call(guarded, logged(steps)) for name, logged in OTHERWISE.items()},
    )  # fmt: skip


def recall(job: tuple[Run, Sequence[str]], folder: Path) -> Call:
    """Return what the guarded rulebook calls a run without some rules."""
    run, dropped = job
    return call(without(book("guarded"), dropped), read_steps(folder / run.file, run.steps_per_row))


class Measured(NamedTuple):
    """All runs and what was computed on them."""

    runs: list[Run]
    studies: dict[str, Study]

    def calls(self, name: str) -> dict[str, Call | None]:
        """Return what a rulebook or package calls each run."""
        return {run.name: self.studies[run.name].calls.get(name) for run in self.runs}

    def families(self) -> dict[str, list[Run]]:
        """Return the runs by family."""
        found: dict[str, list[Run]] = {}
        for run in self.runs:
            found.setdefault(run.family, []).append(run)
        return found
