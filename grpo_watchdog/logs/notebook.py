"""Notebooks: the tables that a trainer draws under a cell, or what it printed there."""

from __future__ import annotations

from collections.abc import Iterator
from html.parser import HTMLParser

from grpo_watchdog.logs.console import rows_in
from grpo_watchdog.logs.json_text import beginning, documents
from grpo_watchdog.logs.numbers import number
from grpo_watchdog.logs.records import Record, rows_of
from grpo_watchdog.logs.row import Row
from grpo_watchdog.logs.source import Source

NAME = "notebook"
_MOST_CELLS = 2_000_000  # of the tables of one output
_MEASURES = 2  # numbers in a row


def recognises(source: Source) -> bool:
    """Return whether it is a notebook."""
    head = beginning(source)
    marked = '"cell_type"' in head or '"nbformat"' in head
    return head.startswith("{") and '"cells"' in head and (marked or source.path.endswith(".ipynb"))


def rows(source: Source) -> Iterator[Row]:
    """Yield the rows of every cell whose outputs hold a run.

    Raises:
        LogError: it is not JSON.
    """
    found: list[tuple[int, list[Row]]] = []
    for document in documents(source):
        cells = document.get("cells") if isinstance(document, dict) else document
        for count, cell in enumerate(cells if isinstance(cells, list) else [], 1):
            best = _best(cell, source)
            if best:
                found.append((count, best))
    most = max((len(mine) for _, mine in found), default=0)
    found = [(count, mine) for count, mine in found if len(mine) > 1 or len(mine) == most]
    for count, mine in found:
        for row in mine:
            yield row._replace(run=f"cell {count}" if len(found) > 1 else row.run)


def _best(cell: object, source: Source) -> list[Row]:
    """Return the rows of the output of a cell that tells most."""
    outputs = cell.get("outputs") if isinstance(cell, dict) else None
    stream: list[str] = []
    candidates: list[list[Row]] = []
    for output in outputs if isinstance(outputs, list) else []:
        if not isinstance(output, dict):
            continue
        if output.get("output_type") == "stream":
            stream.append(_text(output.get("text")))
        data = output.get("data")
        html = _text(data.get("text/html")) if isinstance(data, dict) else ""
        if "<table" in html:
            candidates.append(list(rows_of(_records(html), source)))
    if stream:
        lines = "".join(stream).replace("\r", "\n").split("\n")
        candidates.append(list(rows_in(enumerate(lines, 1), source)))
    return max(candidates, key=lambda rows: sum(len(row.values) for row in rows), default=[])


def _text(value: object) -> str:
    return "".join(part for part in value if isinstance(part, str)) if isinstance(value, list) else (
        value if isinstance(value, str) else ""
    )  # fmt: skip


class _Table(HTMLParser):
    """Collects the cells of the tables."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[list[str]] = []
        self._cells, self._inside = 0, False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002
        if tag == "tr":
            self.lines.append([])
        elif tag in ("td", "th") and self.lines and self._cells < _MOST_CELLS:
            self.lines[-1].append("")
            self._cells += 1
            self._inside = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.lines[-1][-1] += data


def _records(html: str) -> Iterator[tuple[str, Record]]:
    parser = _Table()
    parser.feed(html)
    names: list[str] = []
    for count, cells in enumerate(parser.lines, 1):
        values = [number(cell) for cell in cells]
        if not any(value is not None for value in values):
            names = [" ".join(cell.replace(" / ", "/").split()) for cell in cells]
        elif len(names) == len(cells):
            record = {name: value for name, value in zip(names, values, strict=True) if name and value is not None}
            if len(record) >= _MEASURES:
                yield f"row {count}", record
