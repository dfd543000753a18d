"""The rescue benchmark: live faults in real trainings, what each policy saves of them, and what it costs otherwise.

For every cell the same training is run healthy, with the fault and nobody watching, and with the fault under each
policy. Finished runs are kept in `runs.jsonl`, and a benchmark that was stopped goes on from there.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from grpo_watchdog.errors import ConfigurationError
from grpo_watchdog.lab import runs, tables
from grpo_watchdog.lab.cells import Cell, Job, Row
from grpo_watchdog.lab.faults import FAULTS, LOOKALIKES
from grpo_watchdog.lab.policies import POLICIES
from grpo_watchdog.lab.scores import scores
from grpo_watchdog.lab.store import Progress, Store
from grpo_watchdog.lab.training import TASKS

Split = Literal["development", "test"]
HELD_OUT_TASK = "chain"  # its faults are never run in the development split: nothing can have been tuned on them
FIRST_SEED = {"development": 0, "test": 1000}
SECONDS_A_RUN = 1.0  # for the estimate before the first run
QUICK_POLICIES = ("none", "guarded", "documented", "oracle")


class Sizes(NamedTuple):
    """How much is run.

    Attributes:
        seeds: of every fault and severity.
        healthy: seeds of healthy runs, none and guarded only.
        compared: how many of these every policy is run on.
        lookalikes: seeds of every look-alike; the first `compared` // 4 under every policy.
        severities: how many of a fault's, the severest first; None for all.
    """

    seeds: int
    healthy: int
    compared: int
    lookalikes: int
    severities: int | None


FULL = Sizes(seeds=2, healthy=100, compared=8, lookalikes=8, severities=None)
DEVELOPMENT = Sizes(seeds=2, healthy=20, compared=4, lookalikes=4, severities=None)
QUICK = Sizes(seeds=1, healthy=3, compared=1, lookalikes=1, severities=1)


class Options(NamedTuple):
    """What is asked for, checked."""

    sizes: Sizes
    tasks: tuple[str, ...]
    policies: tuple[str, ...]
    events: tuple[str, ...]  # of faults and look-alikes; () for all, and then healthy runs too
    split: Split


def main(  # noqa: PLR0913 - one keyword for each option of the command
    *,
    quick: bool = False,
    as_json: bool = False,
    task: Sequence[str] | str | None = None,
    policy: Sequence[str] | str | None = None,
    fault: Sequence[str] | str | None = None,
    split: str = "development",
    seeds: int | None = None,
    jobs: int | None = None,
    out: str | Path = "runs/rescue",
    fresh: bool = False,
) -> int:
    """Run the benchmark, write its results into a folder and print the table.

    Args:
        quick: one seed, the severest of each fault, four policies: minutes instead of an hour.
        as_json: print the figures as one JSON object instead of the table.
        task: which tasks; all where left out. One name or several, as for policy and fault.
        policy: which policies beside none.
        fault: which faults or look-alikes.
        split: "development" or "test": other seeds, other severities, and in the test split more healthy runs.
        seeds: of every fault and severity; healthy runs and look-alikes keep their number.
        jobs: processes; as many as there are cores where left out.
        out: the folder.
        fresh: begin anew, even where there are runs that could be kept.

    Returns:
        The exit code, 0.

    Raises:
        ConfigurationError: a name is unknown, or a number is not above 0; says what is allowed.
    """
    sizes = QUICK if quick else FULL if split == "test" else DEVELOPMENT
    for name, value in (("seeds", seeds), ("jobs", jobs)):
        if value is not None and value < 1:
            raise ConfigurationError(f"{name} is {value}; allowed: whole numbers above 0")
    asked = Options(
        sizes if seeds is None else sizes._replace(seeds=seeds),
        _known("task", task, TASKS),
        (
            "none",
            *(p for p in _known("policy", policy, QUICK_POLICIES if quick else POLICIES, POLICIES) if p != "none"),
        ),
        () if fault is None else _known("fault", fault, [*FAULTS, *LOOKALIKES]),
        "test" if _known("split", split, FIRST_SEED) == ("test",) else "development",
    )
    began = time.perf_counter()
    store = Store(Path(out), fresh=fresh)
    first, second = plan(asked)
    total = sum(len(job.policies) for job in (*first, *second))
    workers = jobs or _cores()
    _say(f"{total} runs in {len(first) + len(second)} cells on {workers} processes: about "
         f"{total * SECONDS_A_RUN / workers / 60:.0f} min; results in {store.folder}")  # fmt: skip
    for line in store.notes:
        _say(line)
    progress = Progress(total)
    _run(first, store, workers, progress)
    healthy = {(r.task, r.seed): r.reward for r in store.rows.values() if r.kind == "healthy" and r.policy == "none"}
    _run([job._replace(healthy=healthy[job.cell.task, job.cell.seed]) for job in second], store, workers, progress)
    rows = [store.rows[f"{job.cell.key}/{name}"] for job in (*first, *second) for name in job.policies]
    _write(rows, asked, store.folder, as_json=as_json, seconds=time.perf_counter() - began)
    return 0


def plan(asked: Options) -> tuple[list[Job], list[Job]]:
    """Return the healthy jobs, which come first, and all others; the healthy runs of every seed are among them."""
    start, sizes = FIRST_SEED[asked.split], asked.sizes
    ill = [cell for task in asked.tasks for cell in _fault_cells(task, asked)]
    alike = [
        Cell(task, "lookalike", name, 0.0, start + number)
        for task in asked.tasks
        for name, lookalike in LOOKALIKES.items()
        if task in lookalike.tasks and (not asked.events or name in asked.events)
        for number in range(sizes.lookalikes)
    ]
    most = 0 if asked.events else sizes.healthy
    needed = {(task, start + number) for task in asked.tasks for number in range(most)}
    needed |= {(cell.task, cell.seed) for cell in (*ill, *alike)}
    few = tuple(p for p in asked.policies if p in ("none", "guarded"))
    well = []
    for task, seed in sorted(needed, key=lambda pair: (asked.tasks.index(pair[0]), pair[1])):
        number = seed - start
        watched = asked.policies if number < min(most, sizes.compared) else few if number < most else ("none",)
        well.append(Job(Cell(task, "healthy", "", 0.0, seed), watched))
    all_watch = max(1, sizes.compared // 4)
    others = [Job(cell, asked.policies) for cell in ill]
    others += [Job(cell, asked.policies if cell.seed - start < all_watch else few) for cell in alike]
    return well, others


def _fault_cells(task: str, asked: Options) -> Iterator[Cell]:
    if task == HELD_OUT_TASK and asked.split == "development":
        return
    for name, fault in FAULTS.items():
        if task not in fault.tasks or (asked.events and name not in asked.events):
            continue
        severities = fault.test_severities if asked.split == "test" else fault.severities
        kept = severities if asked.sizes.severities is None else severities[-asked.sizes.severities :]
        for severity in kept:
            for number in range(asked.sizes.seeds):
                yield Cell(task, "fault", name, severity, FIRST_SEED[asked.split] + number)


def _run(jobs: Sequence[Job], store: Store, workers: int, progress: Progress) -> None:
    """Run what is not in the store yet."""
    left = []
    for job in jobs:
        missing = tuple(name for name in job.policies if f"{job.cell.key}/{name}" not in store.rows)
        progress.pass_over(len(job.policies) - len(missing))
        if missing:
            alone = store.rows.get(f"{job.cell.key}/none")
            left.append(job._replace(policies=missing, unwatched=None if alone is None else alone.reward))
    if workers == 1:
        for job in left:
            progress.tick(store.add(runs.do(job)))
        return
    # Spawned, not forked: torch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker) as pool:
        try:
            for done in as_completed([pool.submit(runs.do, job) for job in left]):
                progress.tick(store.add(done.result()))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is the parent's to handle
    torch.set_num_threads(1)


def _write(rows: Sequence[Row], asked: Options, folder: Path, *, as_json: bool, seconds: float) -> None:
    scored = [scores(rows, name) for name in asked.policies]
    cells, steps = len({row.cell for row in rows}), sum(row.ran for row in rows)
    about = (
        f"{asked.split} split: {len(rows):,} runs in {cells:,} cells, {steps:,} training steps; "
        f"tasks {', '.join(asked.tasks)}; seeds from {FIRST_SEED[asked.split]}."
    )
    if asked.split == "development" and HELD_OUT_TASK in asked.tasks:
        about += f" The faults of {HELD_OUT_TASK} are held out: they run in the test split only."
    page = tables.markdown(scored, rows, about, HELD_OUT_TASK)
    (folder / "table.md").write_text(page, encoding="utf-8")
    (folder / "results.csv").write_text(tables.as_csv(rows), encoding="utf-8")
    (folder / "plot.svg").write_text(tables.svg(scored), encoding="utf-8")
    if as_json:
        told = {"split": asked.split, "runs": len(rows), "steps": steps, "seconds": round(seconds, 1)}
        print(json.dumps({**told, "policies": tables.as_json(scored)}))
    else:
        print(page, end="")
    _say(f"{seconds:.0f} s; table.md, results.csv and plot.svg are in {folder}")


def _known(
    what: str, given: Sequence[str] | str | None, default: Iterable[str], allowed: Iterable[str] = ()
) -> tuple[str, ...]:
    """Return the names asked for, or all of the default.

    Raises:
        ConfigurationError: one is unknown; says what is allowed.
    """
    names = tuple(default) if given is None else (given,) if isinstance(given, str) else tuple(given)
    known = tuple(allowed) or tuple(default)
    for name in names:
        if name not in known:
            raise ConfigurationError(f"{what} is {name!r}; allowed: {', '.join(known)}")
    return names


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
