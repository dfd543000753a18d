"""Backtest: rulebooks held against recorded runs, before one of their rules may touch a live one.

What a run would have been told, when, and what would have been done, run by run and in all, and where the books differ.
With labels (a CSV of file, severity, trouble_step, must_by) also whether that was right and in time.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from grpo_watchdog.errors import ConfigurationError, LogError
from grpo_watchdog.journal import encode
from grpo_watchdog.logs import logs_in
from grpo_watchdog.recorded import Recorded, recorded
from grpo_watchdog.rulebook import Rulebook

_SEVERITIES = ("ok", "warn", "crit", "disputed")


class Label(NamedTuple):
    """What is right for one run.

    Attributes:
        severity: ok, warn, crit, or disputed, which is not counted.
        trouble_step: the first bad step; infinity where there is none.
        must_by: the latest step at which an alarm is still of use; infinity where there is none.
        steps_per_row: of a log that does not number its rows [steps].
    """

    severity: str
    trouble_step: float
    must_by: float
    steps_per_row: int


class Result(NamedTuple):
    """One rulebook on one run.

    Attributes:
        book: its name.
        path: the run.
        verdict: the worst level.
        alarm_step: the first step at a warning or above, or None.
        critical_step: the first step at critical, or None.
        alarms: incidents that were opened.
        steps: that the run spans.
        acts: what would have been done: step and action.
        outcome: against the label: caught, late, softened, missed, over, silent, false; "" without one.
        lead: steps between the first alarm that counts and must_by; None where there is none.
    """

    book: str
    path: str
    verdict: str
    alarm_step: int | None
    critical_step: int | None
    alarms: int
    steps: int
    acts: tuple[tuple[int, str], ...]
    outcome: str
    lead: float | None


def read_labels(path: Path) -> dict[str, Label]:
    """Return labels by file name.

    Raises:
        ConfigurationError: a column is missing, or a value is not what it can be; says the line.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            labels: dict[str, Label] = {}
            for number, row in enumerate(csv.DictReader(file), start=2):
                if row["file"] in labels:
                    raise ConfigurationError(f"{path}:{number}: {row['file']} is there twice")
                labels[row["file"]] = _label(path, number, row)
            return labels
    except KeyError as error:
        raise ConfigurationError(f"{path}:1: no column {error}; needed: file, severity, must_by") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigurationError(f"{path}: cannot be read as CSV: {error}") from error


def _label(path: Path, line: int, row: Mapping[str, str]) -> Label:
    if row["severity"] not in _SEVERITIES:
        raise ConfigurationError(f"{path}:{line}: severity {row['severity']!r}; allowed: {', '.join(_SEVERITIES)}")
    try:
        trouble, by = (float(row.get(name) or "inf") for name in ("trouble_step", "must_by"))
        per_row = int(row.get("steps_per_row") or 1)
    except ValueError as error:
        raise ConfigurationError(f"{path}:{line}: {error}; steps are numbers, or empty") from error
    if math.isnan(trouble) or math.isnan(by) or per_row < 1:
        given = f"trouble_step {trouble}, must_by {by}, steps_per_row {per_row}"
        raise ConfigurationError(f"{path}:{line}: {given}; steps are numbers, or empty, and a row is 1 step or more")
    return Label(row["severity"], trouble, by, per_row)


def backtest(
    paths: Sequence[str | Path], books: Sequence[Rulebook], labels: Mapping[str, Label] | None = None
) -> tuple[list[Result], list[tuple[str, str]]]:
    """Return every book on every run, run by run; and (path, why) of what could not be read.

    Raises:
        LogError: a path does not exist, or a folder holds no log.
    """
    labels = labels or {}
    results, unread = list[Result](), list[tuple[str, str]]()
    for path in paths:
        for files in logs_in(path):
            label = labels.get(Path(files[0]).name)
            if labels and label is None:
                continue
            try:
                for book in books:
                    per_row = 1 if label is None else label.steps_per_row
                    results += [_result(book.name, run, label) for run in recorded(files, book, steps_per_row=per_row)]
            except LogError as error:
                unread.append((files[0], str(error)))
    return results, unread


def _result(book: str, run: Recorded, label: Label | None) -> Result:
    story = run.story
    steps = 0 if story.last_step is None or story.first_step is None else story.last_step - story.first_step + 1
    acts = tuple((act.step, act.action) for act in run.would_act)
    outcome, lead = ("", None) if label is None else _judged(run, label)
    return Result(book, run.path, run.verdict, run.alarm_step, run.critical_step, len(story.incidents), steps, acts,
                  outcome, lead)  # fmt: skip


def _judged(run: Recorded, label: Label) -> tuple[str, float | None]:
    alarm = math.inf if run.alarm_step is None else run.alarm_step
    critical = math.inf if run.critical_step is None else run.critical_step
    by = min(label.must_by, 1e18)
    if label.severity == "ok":
        return ("silent" if alarm == math.inf else "false critical" if critical < math.inf else "false warning"), None
    if label.severity == "disputed":
        return "disputed", None
    wanted = critical if label.severity == "crit" else alarm
    lead = label.must_by - wanted
    if label.severity == "warn" and critical < math.inf:
        outcome = "over"
    elif wanted <= by:
        outcome = "caught"
    elif wanted < math.inf:
        outcome = "late"
    else:
        outcome = "softened" if alarm <= by else "missed"
    return outcome, lead if math.isfinite(lead) else None


def summary(results: Sequence[Result], book: str) -> dict[str, Any]:
    """Return one book in figures: alarms, and with labels what was caught, in time, and what was not silent."""
    mine = [result for result in results if result.book == book]
    steps = sum(result.steps for result in mine)
    figures: dict[str, Any] = {
        "book": book,
        "runs": len(mine),
        "alarmed": sum(result.alarm_step is not None for result in mine),
        "critical": sum(result.critical_step is not None for result in mine),
        "alarms_per_1000_steps": round(1000 * sum(result.alarms for result in mine) / steps, 3) if steps else None,
        "would_act": sum(bool(result.acts) for result in mine),
    }
    if any(result.outcome for result in mine):
        outcomes = [result.outcome for result in mine]
        figures |= {name: outcomes.count(name) for name in dict.fromkeys(sorted(outcomes))}
        leads = sorted(result.lead for result in mine if result.lead is not None)
        figures["median_lead"] = leads[len(leads) // 2] if leads else None
    return figures


def differences(results: Sequence[Result]) -> list[tuple[Result, ...]]:
    """Return the runs on which the books do not say, or would not do, the same at the same step."""
    by_run: dict[str, list[Result]] = {}
    for result in results:
        by_run.setdefault(result.path, []).append(result)
    return [tuple(group) for group in by_run.values() if len({_said(result) for result in group}) > 1]


def _said(result: Result) -> tuple[Any, ...]:
    return result.verdict, result.alarm_step, result.critical_step, result.acts


def as_json(results: Sequence[Result], unread: Sequence[tuple[str, str]]) -> str:
    """Return one JSON object, schema 1."""
    books = list(dict.fromkeys(result.book for result in results))
    whole = {
        "schema": 1,
        "books": [summary(results, book) for book in books],
        "runs": [
            {**result._asdict(), "acts": [{"step": step, "action": action} for step, action in result.acts]}
            for result in results
        ],
        "differ": [group[0].path for group in differences(results)],
        "unread": [{"path": path, "error": error} for path, error in unread],
    }
    return encode(whole).decode() + "\n"


def as_text(results: Sequence[Result], unread: Sequence[tuple[str, str]]) -> str:
    """Return a table of runs, the books in figures, and where they differ."""
    head = f"{'run':40} {'book':14} {'verdict':9} {'alarm':>7} {'critical':>8} {'lead':>6} {'alarms/1000':>11}"
    lines = [f"{head}  would do"]
    for result in results:
        rate = f"{1000 * result.alarms / result.steps:.2f}" if result.steps else "-"
        lead = "-" if result.lead is None else f"{result.lead:g}"
        acts = ", ".join(f"{action} at {step}" for step, action in result.acts[:2]) or "-"
        more = f" and {len(result.acts) - 2} more" if len(result.acts) > 2 else ""  # noqa: PLR2004 - two are shown
        lines.append(
            f"{Path(result.path).name[-40:]:40} {result.book[:14]:14} {result.verdict:9} {_dash(result.alarm_step):>7} "
            f"{_dash(result.critical_step):>8} {lead:>6} {rate:>11}  {acts}{more}"
            + (f"  [{result.outcome}]" if result.outcome else "")
        )
    lines.append("")
    for book in dict.fromkeys(result.book for result in results):
        figures = summary(results, book)
        shown = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in figures.items() if name != "book")
        lines.append(f"{book}: {shown}")
    groups = differences(results)
    if len({result.book for result in results}) > 1:
        lines.append(f"\nThe books differ on {len(groups)} run(s)")
        lines += [f"  {Path(group[0].path).name}: " + "; ".join(map(_short, group)) for group in groups]
    lines += [f"not read: {error}" for _, error in unread]
    return "\n".join(lines) + "\n"


def _short(result: Result) -> str:
    acts = f", {result.acts[0][1]} at {result.acts[0][0]}" if result.acts else ""
    when = f"alarm {_dash(result.alarm_step)}, critical {_dash(result.critical_step)}"
    return f"{result.book} {result.verdict} ({when}{acts})"


def _dash(step: int | None) -> str:
    return "-" if step is None else str(step)
