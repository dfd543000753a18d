"""Row: what every reader yields."""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """One row of a log, with the log's own keys.

    Attributes:
        step: its number, or None where the log does not number its rows.
        values: what was logged here. NaN was logged as NaN; what was not logged here is not in it.
        run: which of several runs in one file it belongs to; "" where there is one.
        place: where it stands, "line 12" say; "" where the format has no places.
    """

    step: int | None
    values: dict[str, float]
    run: str = ""
    place: str = ""
