"""How the lab's own trainings are written down: each format as some trainer or hand-written loop writes it."""

from __future__ import annotations

import csv
import gzip
import io
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

Rows = Sequence[tuple[int, dict[str, float]]]


def suffix(path: Path) -> str:
    """Return the format that a file's name asks for, ".csv.gz" say."""
    return "".join(path.suffixes)


def write_gzip(path: Path, text: str) -> None:
    """Compress a text; the same text gives the same bytes."""
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def _jsonl(rows: Rows) -> str:
    return "".join(json.dumps({"step": step, **values}) + "\n" for step, values in rows)


def _csv(rows: Rows) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["step", *rows[0][1]], lineterminator="\n")
    writer.writeheader()
    writer.writerows({"step": step, **values} for step, values in rows)
    return text.getvalue()


def _console(rows: Rows) -> str:
    """Return lines as verl's console logger has them."""
    return "".join(
        " - ".join([f"step:{step}", *(f"{k}:{v}" for k, v in values.items())]) + "\n" for step, values in rows
    )


def _events(path: Path, rows: Rows) -> None:
    from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - slow to import, and only here

    with tempfile.TemporaryDirectory() as folder:
        with SummaryWriter(folder) as writer:
            for step, values in rows:
                for name, value in values.items():
                    writer.add_scalar(name, value, step)
        take_events(Path(folder), path)


def take_events(folder: Path, path: Path) -> None:
    """Move the one event file of a folder to a name that does not tell the machine."""
    (found,) = folder.rglob("events.out.tfevents.*")
    shutil.move(found, path)


SINKS: dict[str, Callable[[Path, Rows], object]] = {
    ".jsonl": lambda path, rows: path.write_text(_jsonl(rows), encoding="utf-8"),
    ".jsonl.gz": lambda path, rows: write_gzip(path, _jsonl(rows)),
    ".csv": lambda path, rows: path.write_text(_csv(rows), encoding="utf-8"),
    ".csv.gz": lambda path, rows: write_gzip(path, _csv(rows)),
    ".log": lambda path, rows: path.write_text(_console(rows), encoding="utf-8"),
    ".log.gz": lambda path, rows: write_gzip(path, _console(rows)),
    ".tfevents": _events,
}
