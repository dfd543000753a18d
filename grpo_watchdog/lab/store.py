"""What a benchmark keeps while it runs: finished runs on disk, and how far it is on the screen."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import grpo_watchdog
from grpo_watchdog.lab.cells import Row
from grpo_watchdog.rulebook import load, shipped

_DECIDE_NOTHING = (
    "backtest.py",
    "cli/",
    "diagnosed.py",
    "lab/corpus",
    "lab/demo.py",
    "lab/scores.py",
    "lab/tables.py",
    "logs/",
    "recorded.py",
    "reports/",
)  # no run's result hangs on them
_EVERY = 0.05  # the share of the runs after which a line is printed where there is no terminal


def fingerprint() -> str:
    """Return a hash of the code and the rulebooks that results hang on."""
    package = Path(grpo_watchdog.__file__).parent
    seal = hashlib.sha256(torch.__version__.encode())
    for file in sorted(package.rglob("*.py")):
        name = file.relative_to(package).as_posix()
        if not name.startswith(_DECIDE_NOTHING):
            seal.update(f"\0{name}\0".encode() + file.read_bytes())
    for book in shipped():
        seal.update(f"\0{book}\0{load(book).digest}".encode())
    return seal.hexdigest()[:16]


class Store:
    """The finished runs of a folder, in `runs.jsonl`: the fingerprint first, then a line a run.

    Args:
        folder: made where it is not there.
        fresh: whether what is there is dropped.

    Attributes:
        rows: by key.
        notes: what has to be said about what was there.
    """

    def __init__(self, folder: Path, *, fresh: bool) -> None:
        """Take over what an earlier benchmark of the same code left."""
        self.folder, self._file = folder, folder / "runs.jsonl"
        self.rows: dict[str, Row] = {}
        self.notes: list[str] = []
        folder.mkdir(parents=True, exist_ok=True)
        seal = fingerprint()
        if self._file.exists() and not fresh:
            self._take_over(seal)
        lines = [json.dumps({"fingerprint": seal}), *(json.dumps(row._asdict()) for row in self.rows.values())]
        temporary = folder / ".runs.jsonl"
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        temporary.replace(self._file)

    def add(self, rows: Sequence[Row]) -> int:
        """Keep finished runs; return how many."""
        with self._file.open("a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row._asdict()) + "\n")
                self.rows[row.key] = row
        return len(rows)

    def _take_over(self, seal: str) -> None:
        first, *lines = self._file.read_text(encoding="utf-8").splitlines() or [""]
        if _read(first).get("fingerprint") != seal:
            self.notes.append("the code or a rulebook has changed since the runs in runs.jsonl: starting over")
            return
        for line in lines:
            data = _read(line)
            if data:  # the last line is torn where a benchmark was killed
                row = Row.from_json(data)
                self.rows[row.key] = row
        self.notes.append(f"{len(self.rows)} finished runs found in runs.jsonl; those asked for are not run again")


class Progress:
    """A bar on a terminal, a line every 5 % elsewhere.

    Args:
        total: how many runs there are.
    """

    def __init__(self, total: int) -> None:
        """Start the clock."""
        self._total, self._done, self._passed, self._said = max(1, total), 0, 0, 0.0
        self._began, self._bar = time.perf_counter(), sys.stderr.isatty()

    def pass_over(self, count: int) -> None:
        """Count runs that need not be run."""
        self._passed += count

    def tick(self, count: int) -> None:
        """Count runs that are done, and show it where it is time."""
        self._done += count
        done = self._done + self._passed
        share = min(1.0, done / self._total)
        left = (time.perf_counter() - self._began) / self._done * max(0, self._total - done)
        text = f"{done} of {self._total} runs, about {left / 60:.1f} min left"
        if self._bar:
            filled = int(40 * share)
            end = "\n" if done >= self._total else ""
            print(f"\r[{'#' * filled}{'.' * (40 - filled)}] {text}   ", end=end, file=sys.stderr, flush=True)
        elif share - self._said >= _EVERY or done >= self._total:
            self._said = share
            print(text, file=sys.stderr, flush=True)


def _read(line: str) -> dict[str, object]:
    try:
        data = json.loads(line)
    except ValueError:
        return {}
    return data if isinstance(data, dict) else {}
