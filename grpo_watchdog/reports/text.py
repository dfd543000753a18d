"""Plain text, for a terminal."""

from __future__ import annotations

import textwrap

from grpo_watchdog.reports.run import Run
from grpo_watchdog.reports.story import tell

_WIDTH = 110


def render(run: Run, lang: str = "en") -> str:
    """Return the report as plain text."""
    blocks = []
    for section in tell(run, lang):
        lines = [section.heading, "-" * min(_WIDTH, len(section.heading))]
        for depth, text in section.lines:
            indent = "  " * depth
            lines.append(textwrap.fill(text, _WIDTH, initial_indent=f"{indent}- ", subsequent_indent=f"{indent}  "))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"
