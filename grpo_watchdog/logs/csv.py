"""CSV and its like: separated by commas, semicolons, tabs or bars; notebook tables; W&B and TensorBoard exports."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import PurePath

from grpo_watchdog.logs.cells import Layout, absent, cells_in, layout_of
from grpo_watchdog.logs.json_text import beginning
from grpo_watchdog.logs.records import STEPS, Record, row_of, rows_of
from grpo_watchdog.logs.row import Row
from grpo_watchdog.logs.source import Source

NAME = "csv"
_CURVE = ("wall time", "step", "value")  # as TensorBoard hands one curve out
_TIMES = ("Wall time", "_timestamp", "_runtime", "Relative Time (Process)", "Relative Time (Wall)")
_OF_RUN = " - "  # between the run and the metric in what W&B hands out of a panel
_BOUNDS = ("__MIN", "__MAX")
_SILENT = 500_000  # lines without a number, one after the other: what follows is no table any more
_INDEX = ("", "Unnamed: 0")  # as pandas writes it


def recognises(source: Source) -> bool:
    """Return whether there is a heading with rows of numbers under it."""
    return layout_of(beginning(source)) is not None


def rows(source: Source) -> Iterator[Row]:
    """Yield the rows; where the columns name several runs, one of each run a line.

    Raises:
        LogError: there is no heading.
    """
    layout = layout_of(beginning(source))
    if layout is None:
        raise source.error("1", "no heading with numbers under it")
    names = [" ".join(name.replace(" / ", "/").split()) for name in layout.heading]
    if tuple(name.lower() for name in names) == _CURVE:
        stem = PurePath(source.path).name.removesuffix(".gz").removesuffix(".csv")
        names = ["", "step", stem.partition("-tag-")[2] or stem]
    if len(set(names)) < len(names):
        source.say("a column's name stands twice: the last one counts")
    runs = _runs(names)
    if runs:
        return _by_run(source, layout, names, runs)
    return rows_of(_records(source, layout, names), source)


def _records(source: Source, layout: Layout, names: list[str]) -> Iterator[tuple[str, Record]]:
    ragged, first, told = 0, 0, 0
    loose = layout.separator in " |"
    steps = [at for at, name in enumerate(names) if name in STEPS] if loose else []
    for count, given in cells_in(source, layout):
        if count - told > _SILENT:
            source.say(f"line {count}: no number in the {_SILENT} lines before: the rest is left out")
            break
        indexed = len(given) == len(names) + 1 and layout.separator == " "  # as pandas prints it
        cells = given[1:] if indexed else given
        if loose and (len(cells) != len(names) or any(layout.value(cells[at]) is None for at in steps)):
            continue  # a line of text under or within the table
        if len(cells) != len(names):
            ragged += 1
            first = first or count
        record = _record(layout, names, cells)
        if any(isinstance(value, float) for value in record.values()):  # else text, or the heading again
            told = count
            yield f"line {count}", record
    if ragged:
        source.say(f"lines with more or fewer cells than the heading: {ragged}; the first is line {first}")


def _record(layout: Layout, names: list[str], cells: list[str]) -> dict[str, object]:
    """Return what stands in a line, numbers as numbers."""
    try:
        if len(cells) == len(names) and not any("_" in cell for cell in cells):
            return {name: float(cell) for name, cell in zip(names, cells, strict=True) if name not in _INDEX}
    except ValueError:
        pass  # nearly every line is of numbers alone; this one is not
    record: dict[str, object] = {}
    for name, cell in zip(names, cells, strict=False):
        value = layout.value(cell)
        if value is not None:
            record[name] = value
        elif not absent(cell):
            record[name] = cell.strip()
    for name in _INDEX:
        record.pop(name, None)
    return record


def _runs(names: Sequence[str]) -> dict[int, tuple[str, str]]:
    """Return run and metric by column where all columns are called `run - metric`."""
    rest = [name for name in names if name not in STEPS and name not in _TIMES]
    if not rest or not all(_OF_RUN in name for name in rest):
        return {}
    named = {at: name.rpartition(_OF_RUN) for at, name in enumerate(names) if _OF_RUN in name}
    return {at: (run, metric) for at, (run, _, metric) in named.items() if not metric.endswith(_BOUNDS)}


def _by_run(source: Source, layout: Layout, names: list[str], runs: dict[int, tuple[str, str]]) -> Iterator[Row]:
    step = next((at for at, name in enumerate(names) if name in STEPS), None)
    for count, cells in cells_in(source, layout):
        found: dict[str, dict[str, object]] = {}
        for at, (run, metric) in runs.items():
            value = layout.value(cells[at]) if at < len(cells) else None
            if value is not None:
                found.setdefault(run, {})[metric] = value
        for run, record in found.items():
            if step is not None and step < len(cells):
                record.setdefault("step", cells[step])
            row = row_of(record, source, run, f"line {count}")
            if row is not None:
                yield row
