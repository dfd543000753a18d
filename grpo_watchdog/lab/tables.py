"""The rescue benchmark's results as a Markdown table, a CSV file, JSON and a small plot."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from typing import Any
from xml.sax.saxutils import escape

from grpo_watchdog.lab.cells import Row
from grpo_watchdog.lab.scores import (
    HARM,
    OUT_OF_REACH,
    PER_STEPS,
    Figure,
    Scores,
    harmed,
    in_reach,
    mean,
    rescue,
)

_COLUMNS: tuple[tuple[str, str], ...] = (
    ("rescue", "rescue"),
    ("in reach", "rescue_in_reach"),
    ("worst class", "rescue_worst"),
    ("no harm: mean", "keeps"),
    ("5 %", "keeps_low"),
    ("false per 20,000", "false_interventions"),
    ("healthy only", "false_healthy"),
    ("recall", "recall"),
    ("delay", "delay"),
    ("to the first act", "act_delay"),
    ("steps lost", "lost"),
    ("cause right", "right"),
    ("on harmless", "on_harmless"),
    ("halted", "halted"),
)
_BAR, _LEFT, _WIDTH = 22, 120, 300  # of the plot [pixels]

_LEGEND = f"""\
Each figure is followed by the number of runs behind it, the rates by the number of steps.

- rescue: mean of (R_watched - R_unwatched) / (R_healthy - R_unwatched) over harmful cells, those in which the final
  true reward with nobody watching is at most {HARM:g} of the healthy one; "in reach" leaves out the (class, task) pairs
  of which the oracle itself rescues less than {OUT_OF_REACH:g}; "worst class" is the lowest mean of a fault class.
- no harm: final reward over that of the same run with nobody watching, on healthy and look-alike runs.
- false per {PER_STEPS:,}: interventions (steps on which something was done) in {PER_STEPS:,} steps of healthy and
  look-alike runs.
- recall: share of harmful cells with an alarm or an intervention at or after the onset; delay: median steps to it.
- cause right: share of the harmful cells with a likeliest cause in which it names the fault.
- on harmless: share of the injections that did no harm in which the policy intervened.
"""


def markdown(scored: Sequence[Scores], rows: Sequence[Row], about: str, held_out: str) -> str:
    """Return the whole page."""
    parts = ["# Rescue benchmark", about, "## Policies", _policies(scored), _LEGEND]
    parts += ["## Rescue by task", _by_task(scored, held_out)]
    parts += ["## By fault class and task", _by_class(rows)]
    harmless = _harmless(rows)
    if harmless:
        parts += ["## Injections that did no harm", harmless]
    crashed = sorted({f"{row.task}, {row.event or row.kind}: {row.crashed}" for row in rows if row.crashed})
    if crashed:
        parts += ["## Runs that an error ended", "\n".join(f"- {line}" for line in crashed)]
    return "\n\n".join(parts) + "\n"


def as_csv(rows: Sequence[Row]) -> str:
    """Return every run as a line; interventions as `step:action`, failed ones with a `!`."""
    written = io.StringIO()
    table = csv.writer(written, lineterminator="\n")
    table.writerow(Row._fields)
    for row in rows:
        done = " ".join(f"{step}:{name}{'' if ok else '!'}" for step, name, ok in row.interventions)
        table.writerow(["" if value is None else value for value in row._replace(interventions=done)])  # type: ignore[arg-type] # text for the file only
    return written.getvalue()


def as_json(scored: Sequence[Scores]) -> dict[str, Any]:
    """Return the figures by policy as JSON-able values; what has no runs behind it is null."""
    return {s.policy: {name: _plain(value) for name, value in s._asdict().items() if name != "policy"} for s in scored}


def svg(scored: Sequence[Scores]) -> str:
    """Return two bar charts side by side: the mean rescue fraction, and the false interventions."""
    panels = (
        ("mean rescue fraction", [s.rescue for s in scored]),
        (f"false interventions per {PER_STEPS:,} steps", [s.false_interventions for s in scored]),
    )
    height = 60 + _BAR * len(scored)
    total = _LEFT + 2 * (_WIDTH + 80)
    drawn = [f'<text x="4" y="{48 + _BAR * i}">{escape(s.policy)}</text>' for i, s in enumerate(scored)]
    for number, (title, figures) in enumerate(panels):
        drawn += _panel(title, figures, _LEFT + number * (_WIDTH + 80))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{total}" height="{height}" font-family="sans-serif" '
        f'font-size="13">\n<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(drawn) + "\n</svg>\n"
    )


def shown(figure: Figure) -> str:
    """Return a figure with the number of runs behind it."""
    return "-" if math.isnan(figure.value) else f"{figure.value:.2f} ({figure.n:,})"


def _policies(scored: Sequence[Scores]) -> str:
    head = ["policy", *(title for title, _ in _COLUMNS)]
    lines = []
    for s in scored:
        cells = [shown(getattr(s, name)) for _, name in _COLUMNS]
        if s.worst_class:
            cells[2] += f" {s.worst_class}"
        lines.append([s.policy, *cells])
    return _table(head, lines)


def _by_task(scored: Sequence[Scores], held_out: str) -> str:
    tasks = sorted({task for s in scored for task in s.rescue_by_task})
    head = ["policy", *(f"{task} (held out)" if task == held_out else task for task in tasks)]
    none = mean([])
    return _table(head, [[s.policy, *(shown(s.rescue_by_task.get(task, none)) for task in tasks)] for s in scored])


def _by_class(rows: Sequence[Row]) -> str:
    """Return, for each (class, task) with harm: how much, and what guarded and the oracle rescue."""
    reach = in_reach(rows)
    bad = [row for row in rows if harmed(row)]
    lines = []
    for event, task in sorted({(row.event, row.task) for row in bad}):
        own = {
            p: [r for r in bad if (r.event, r.task, r.policy) == (event, task, p)]
            for p in ("none", "guarded", "oracle")
        }
        left = mean(row.unwatched / row.healthy for row in own["none"])
        guarded = own["guarded"]
        seen = mean(
            float(row.alarm is not None or any(i[0] >= row.onset for i in row.interventions)) for row in guarded
        )
        right = mean(float(row.right) for row in guarded if row.right is not None)
        figures = (left, mean(map(rescue, guarded)), mean(map(rescue, own["oracle"])), seen, right)
        lives = next(row.lives_in for row in bad if (row.event, row.task) == (event, task))
        out = "" if reach.get((event, task), True) else "out of reach"
        lines.append([event, lives, task, *map(shown, figures), out])
    head = [
        "fault",
        "lives in",
        "task",
        "unwatched / healthy",
        "guarded",
        "oracle",
        "guarded sees it",
        "cause right",
        "",
    ]
    return _table(head, lines)


def _harmless(rows: Sequence[Row]) -> str:
    """Return which injections did no harm, and how often."""
    cells = {row.cell: harmed(row) for row in rows if row.kind == "fault" and row.policy == "none"}
    lines = []
    for event, task in sorted({(cell.event, cell.task) for cell in cells}):
        found = [harm for cell, harm in cells.items() if (cell.event, cell.task) == (event, task)]
        if not all(found):
            lines.append([event, task, f"{found.count(False)} of {len(found)}"])
    return _table(["injection", "task", "harmless"], lines) if lines else ""


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = "|".join("---" for _ in head)
    return "\n".join([f"| {' | '.join(head)} |", f"|{rule}|", *(f"| {' | '.join(line)} |" for line in lines)])


def _plain(value: Any) -> Any:  # noqa: ANN401 - a figure, figures by name, a word or a count
    if isinstance(value, Figure):
        return {"value": None if math.isnan(value.value) else value.value, "n": value.n}
    if isinstance(value, dict):
        return {name: _plain(figure) for name, figure in value.items()}
    return value


def _panel(title: str, figures: Sequence[Figure], left: int) -> list[str]:
    most = max([1.0, *(f.value for f in figures if not math.isnan(f.value))])
    drawn = [f'<text x="{left}" y="20" font-weight="bold">{escape(title)}</text>']
    for number, figure in enumerate(figures):
        top = 34 + _BAR * number
        if math.isnan(figure.value):
            drawn.append(f'<text x="{left}" y="{top + 14}" fill="gray">-</text>')
            continue
        length = _WIDTH * max(0.0, figure.value) / most
        drawn.append(f'<rect x="{left}" y="{top}" width="{length:.1f}" height="{_BAR - 6}" fill="#4477aa"/>')
        drawn.append(f'<text x="{left + length + 5:.1f}" y="{top + 14}">{figure.value:.2f}</text>')
    return drawn
