"""Markdown, for an issue, a pull request or a page."""

from __future__ import annotations

from grpo_watchdog.reports.run import Run
from grpo_watchdog.reports.story import tell


def render(run: Run, lang: str = "en") -> str:
    """Return the report as Markdown."""
    blocks = []
    for index, section in enumerate(tell(run, lang)):
        lines = [f"{'#' if index == 0 else '##'} {section.heading}", ""]
        lines += [f"{'  ' * depth}- {_escaped(text)}" for depth, text in section.lines]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def _escaped(text: str) -> str:
    for mark in "\\`*_<>|":
        text = text.replace(mark, f"\\{mark}")
    return text
