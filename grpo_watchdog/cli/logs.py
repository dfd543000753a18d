"""The commands on recorded runs: diagnose and backtest."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from grpo_watchdog.backtest import as_json, as_text, backtest, read_labels
from grpo_watchdog.diagnosed import FORMATS, diagnose
from grpo_watchdog.errors import WatchdogError
from grpo_watchdog.names import FAMILIES
from grpo_watchdog.reports import LANGUAGES
from grpo_watchdog.rule import RANK
from grpo_watchdog.rulebook import load

EXIT = {"ok": 0, "notice": 0, "warning": 10, "critical": 20}
UNUSABLE = 1
_WORTH_A_BAR = 32 << 20  # bytes of a file
_EVERY = 8 << 20  # bytes between two looks of the bar


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add both commands to the parser."""
    diagnosed = commands.add_parser(
        "diagnose",
        help="what went wrong in recorded runs, since when, why, and what to change",
        description="Reads whatever a trainer wrote: TensorBoard event files, trainer_state.json, JSON, JSONL, CSV, "
        "parquet, notebooks, console logs, W&B run files, this project's journal; gzipped too. Exit code 0: nothing "
        "above a notice, 10: a warning, 20: critical, 1: something could not be read.",
    )
    diagnosed.add_argument("paths", nargs="+", metavar="PATH", help="files or folders; - is standard input")
    diagnosed.add_argument("--rules", default="guarded", metavar="BOOK", help="rulebook (default guarded)")
    diagnosed.add_argument("--format", choices=FORMATS, default="text")
    diagnosed.add_argument("--output", type=Path, metavar="FILE", help="write there instead of printing")
    names = f"whose names the keys are (default: told by the keys): {', '.join(FAMILIES)}"
    diagnosed.add_argument("--trainer", choices=FAMILIES, metavar="NAME", help=names)
    per_row = "of a log that does not number its rows (default 1)"
    diagnosed.add_argument("--steps-per-row", type=_above_zero, default=1, metavar="N", help=per_row)
    diagnosed.add_argument("--lang", choices=LANGUAGES, default="en")
    diagnosed.set_defaults(run=_diagnose)

    tested = commands.add_parser("backtest", help="hold rulebooks against recorded runs before they touch a live one")
    tested.add_argument("paths", nargs="+", metavar="PATH", help="files or folders")
    tested.add_argument("--rules", action="append", required=True, metavar="BOOK", help="a rulebook; may be repeated")
    right = "what is right: columns file, severity (ok, warn, crit), trouble_step, must_by"
    tested.add_argument("--labels", type=Path, metavar="CSV", help=right)
    tested.add_argument("--format", choices=("text", "json"), default="text")
    tested.set_defaults(run=_backtest)


def _diagnose(options: argparse.Namespace) -> int:
    bar = _Bar()
    found = diagnose(options.paths, options.rules, trainer=options.trainer, steps_per_row=options.steps_per_row,
                     progress=bar.tick)  # fmt: skip
    bar.clear()
    for _, error in found.unread:
        print(f"grpo-watchdog: {error}", file=sys.stderr)
    if found.runs or options.format == "json":
        _give(FORMATS[options.format](found, options.lang), options.output)
    return UNUSABLE if found.unread else EXIT[found.verdict]


def _backtest(options: argparse.Namespace) -> int:
    labels = None if options.labels is None else read_labels(options.labels)
    books = [load(name) for name in options.rules]
    results, unread = backtest(options.paths, books, labels)
    render: Callable[..., str] = as_json if options.format == "json" else as_text
    print(render(results, unread), end="")
    if unread and not results:
        return UNUSABLE
    return EXIT[max((result.verdict for result in results), key=RANK.__getitem__, default="ok")]


def _give(text: str, output: Path | None) -> None:
    if output is None:
        print(text, end="")
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise WatchdogError(f"{output}: {error.strerror}") from error


class _Bar:
    """How much of a large file is read, on a terminal."""

    def __init__(self) -> None:
        self._path, self._size, self._read, self._shown = "", 0, 0, 0

    def tick(self, path: str, size: int) -> None:
        """Count what was read; show it now and then."""
        if path != self._path:
            self._path, self._read, self._shown = path, 0, 0
            self._size = Path(path).stat().st_size if Path(path).is_file() else 0
        self._read += size
        if self._size >= _WORTH_A_BAR and self._read - self._shown >= _EVERY and sys.stderr.isatty():
            self._shown = self._read
            done = min(1.0, self._read / self._size)
            print(f"\r{Path(path).name} [{'#' * round(30 * done):30}] {done:4.0%}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """End the line of the bar, where there is one."""
        if self._shown:
            print(file=sys.stderr)


def _above_zero(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be above 0, not {value}")
    return value
