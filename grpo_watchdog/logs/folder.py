"""Folder: which files below a path are logs, and which of them are one run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from grpo_watchdog.errors import LogError
from grpo_watchdog.journal import FILE as JOURNAL

_STATE = "trainer_state.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)$")
_ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".log", ".out", ".parquet", ".wandb", ".ipynb")
_NOT_LOGS = re.compile(
    r"(config|tokenizer|vocab|merges|special_tokens|adapter|generation|model\.safetensors|package|"
    r"wandb-metadata|wandb-summary|requirements)",
)
_MOST = 100_000  # files that are looked at below one folder


def logs_in(path: str | Path) -> list[tuple[str, ...]]:
    """Return the runs below a path, each as its files in order; a file is a run by itself, and so is "-".

    Event files in one folder are one run. Of the checkpoints of one run only the newest trainer_state.json counts: the
    others are its beginning.

    Raises:
        LogError: there is no such path, or no log below it.
    """
    if str(path) == "-":
        return [("-",)]
    place = Path(path)
    if not place.is_dir():
        if not place.exists():
            raise LogError(f"{place}: no such file or folder")
        return [(str(place),)]
    runs = sorted(_runs(place))
    if not runs:
        raise LogError(
            f"{place}: no log in this folder; looked for event files, {_STATE}, {JOURNAL} and *{', *'.join(_ENDINGS)}"
        )
    return runs


def _runs(root: Path) -> Iterator[tuple[str, ...]]:
    events: dict[Path, list[Path]] = {}
    states: dict[Path, tuple[int, Path]] = {}
    for count, file in enumerate(_files(root)):
        if count >= _MOST:
            raise LogError(f"{root}: more than {_MOST} files; name the folders of the runs")
        if "tfevents" in file.name:
            events.setdefault(file.parent, []).append(file)
        elif file.name == _STATE:
            number = _CHECKPOINT.search(file.parent.name)
            run = file.parent.parent if number else file.parent
            newest = (int(number[1]) if number else 1 << 60, file)
            states[run] = max(newest, states.get(run, newest))
        elif _a_log(file):
            yield (str(file),)
    yield from ((str(file),) for _, file in states.values())
    yield from (tuple(map(str, sorted(files))) for files in events.values())


def _files(root: Path) -> Iterator[Path]:
    for file in root.rglob("*"):
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(root).parts):
            yield file


def _a_log(file: Path) -> bool:
    name = file.name.removesuffix(".gz")
    return name == JOURNAL or (name.endswith(_ENDINGS) and not _NOT_LOGS.search(name))
