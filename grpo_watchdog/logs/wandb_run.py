from __future__ import annotations
from collections.abc import Iterator
from grpo_watchdog.logs.row import Row
from grpo_watchdog.logs.source import Source

NAME = "wandb"


def recognises(source: Source) -> bool:
    return False


def rows(source: Source) -> Iterator[Row]:
    yield from ()
