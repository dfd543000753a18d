"""Reports of a run, one file a format, each with `render(run, lang) -> str`.

A new format is a file here and a line in FORMATS.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from grpo_watchdog.errors import ConfigurationError
from grpo_watchdog.reports import json, markdown, text
from grpo_watchdog.reports.run import Run, read_run
from grpo_watchdog.reports.words import WORDS

FORMATS: dict[str, Callable[[Run, str], str]] = {
    "text": text.render,
    "markdown": markdown.render,
    "json": json.render,
}

LANGUAGES = tuple(WORDS)


def report(run_dir: str | Path, format: str = "text", lang: str = "en") -> str:  # noqa: A002 - what everyone calls it
    """Return the report of a run.

    Args:
        run_dir: the folder that was given to attach.
        format: text, markdown or json.
        lang: en or zh.

    Raises:
        ConfigurationError: no such format or language.
        JournalError: there is no journal there that can be read.
    """
    if format not in FORMATS:
        raise ConfigurationError(f"no format is called {format!r}; allowed: {', '.join(FORMATS)}")
    if lang not in LANGUAGES:
        raise ConfigurationError(f"no language is called {lang!r}; allowed: {', '.join(LANGUAGES)}")
    return FORMATS[format](read_run(run_dir), lang)


__all__ = ["FORMATS", "LANGUAGES", "Run", "read_run", "report"]
