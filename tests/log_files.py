"""Logs written into a file and read back through the public door, for the tests of the readers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from grpo_watchdog.logs import Row, opened


class Read(NamedTuple):
    """What a log was read as."""

    formats: list[str]
    rows: list[Row]
    notices: list[str]

    @property
    def steps(self) -> list[int | None]:
        return [row.step for row in self.rows]

    @property
    def values(self) -> list[dict[str, float]]:
        return [row.values for row in self.rows]

    @property
    def runs(self) -> list[str]:
        return [row.run for row in self.rows]


def read(folder: Path, content: str | bytes, name: str = "train.log") -> Read:
    """Write a log and read it."""
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with opened((str(file),)) as log:
        rows = list(log.rows)
    return Read(log.formats, rows, log.notices)


def same(one: float, other: float) -> bool:
    """Return whether two numbers are alike, not-a-number with itself too."""
    return one == other or (math.isnan(one) and math.isnan(other))
