"""Diagnose: every run in some files or folders, decided from its log, and told in text, Markdown or JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpo_watchdog.errors import LogError
from grpo_watchdog.journal import encode
from grpo_watchdog.logs import logs_in
from grpo_watchdog.metrics import METRICS
from grpo_watchdog.recorded import Recorded, recorded, refuse_trainer
from grpo_watchdog.reports.run import IncidentStory
from grpo_watchdog.reports.story import Section, advice, next_settings, next_starts, tell, tied
from grpo_watchdog.reports.words import WORDS
from grpo_watchdog.rule import RANK
from grpo_watchdog.rulebook import Rulebook, load

_WIDTH = 110
_KNOWN_SHOWN = 12  # unknown keys that are named


@dataclass
class Diagnosed:
    """What was found in all paths.

    Attributes:
        runs: those that could be read.
        unread: (path, why) of files that were named and could not be.
        passed_over: (path, why) of files that merely lay in a folder, and are no logs.
    """

    runs: list[Recorded] = field(default_factory=list)
    unread: list[tuple[str, str]] = field(default_factory=list)
    passed_over: list[tuple[str, str]] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """Return the worst of all."""
        return max((run.verdict for run in self.runs), key=RANK.__getitem__, default="ok")


def diagnose(
    paths: str | Path | Sequence[str | Path],
    rules: str | Path | Rulebook = "guarded",
    *,
    trainer: str | None = None,
    steps_per_row: int = 1,
    progress: Callable[[str, int], None] | None = None,
) -> Diagnosed:
    """Return what became of recorded runs, and what would have been done.

    Args:
        paths: files or folders of logs of any format that is known; "-" is standard input.
        rules: a rulebook: a name, a path or a loaded one.
        trainer: whose names the keys are; None recognises it from them.
        steps_per_row: of a log that does not number its rows [steps].
        progress: called with a path and the bytes of it that were just read.

    Raises:
        LogError: a path does not exist, a folder holds no log, or there is no such trainer.
        RulebookError: the rulebook cannot be used.
    """
    book = rules if isinstance(rules, Rulebook) else load(rules)
    refuse_trainer(trainer)
    found = Diagnosed()
    for path in [paths] if isinstance(paths, str | Path) else paths:
        files = logs_in(path)
        named = files == [(str(path),)]
        for log in files:
            tick = None if progress is None else lambda size, log=log: progress(log[0], size)
            try:
                found.runs += recorded(log, book, trainer=trainer, steps_per_row=steps_per_row, progress=tick)
            except LogError as error:
                (found.unread if named else found.passed_over).append((log[0], str(error)))
    return found


def as_json(found: Diagnosed, lang: str = "en") -> str:
    """Return one JSON object, schema 1; not-a-number and infinity are strings."""
    whole = {
        "schema": 1,
        "runs": [_as_dict(run, lang) for run in found.runs],
        "unread": [{"path": path, "error": error} for path, error in found.unread],
        "passed_over": [{"path": path, "error": error} for path, error in found.passed_over],
    }
    return encode(whole).decode() + "\n"


def as_text(found: Diagnosed, lang: str = "en") -> str:
    """Return plain text: a table where there are several runs, then each run."""
    words, blocks = WORDS[lang], list[str]()
    if len(found.runs) > 1:
        rows = _table(found, words)
        widths = [max(_wide(row[i]) for row in rows) for i in range(len(rows[0]))]
        padded = [[cell + " " * (width - _wide(cell)) for cell, width in zip(row, widths, strict=True)] for row in rows]
        blocks.append("\n".join("  ".join(row).rstrip() for row in padded))
    for run in found.runs:
        for heading, lines in _sections(run, lang):
            shown = [heading, "-" * min(_WIDTH, _wide(heading))]
            for depth, text in lines:
                indent = "  " * depth
                shown.append(textwrap.fill(text, _WIDTH, initial_indent=f"{indent}- ", subsequent_indent=f"{indent}  "))
            blocks.append("\n".join(shown))
    return "\n\n".join([*blocks, *_left_out(found, words)]) + "\n"


def as_markdown(found: Diagnosed, lang: str = "en") -> str:
    """Return Markdown: a table where there are several runs, then each run."""
    words, blocks = WORDS[lang], list[str]()
    if len(found.runs) > 1:
        head, *rows = _table(found, words)
        table = [_row(head), _row(["---"] * len(head)), *map(_row, rows)]
        blocks.append("\n".join(table))
    for run in found.runs:
        first, *others = _sections(run, lang)
        for mark, (heading, lines) in (("#", first), *(("##", section) for section in others)):
            listed = "\n".join(f"{'  ' * depth}- {text}" for depth, text in lines)
            blocks.append(f"{mark} {heading}\n\n{listed}")
    return "\n\n".join([*blocks, *_left_out(found, words)]) + "\n"


FORMATS: dict[str, Callable[[Diagnosed, str], str]] = {"text": as_text, "markdown": as_markdown, "json": as_json}


def _as_dict(run: Recorded, lang: str) -> dict[str, Any]:
    story = run.story
    return {
        "path": run.path,
        "trainer": run.trainer,
        "formats": list(dict.fromkeys(run.formats)),
        "rows": story.rows,
        "first_step": story.first_step,
        "last_step": story.last_step,
        "verdict": run.verdict,
        "alarm_step": run.alarm_step,
        "critical_step": run.critical_step,
        "incidents": [_incident(incident, lang) for incident in story.incidents],
        "would_act": [act._asdict() for act in run.would_act],
        "next_settings": {**next_starts(story), **next_settings(story)},
        "blind": [_blind(run, blind, lang) for blind in story.blind],
        "unknown_keys": run.unknown,
        "notices": [*run.notices, *(text for _, text in story.notices)],
    }


def _incident(story: IncidentStory, lang: str) -> dict[str, Any]:
    return {
        "cause": story.causes[0]["cause"] if story.causes else story.rule,
        "rule": story.rule,
        "severity": story.severity,
        "first_step": story.since,
        "closed_step": story.closed,
        "evidence": [{key: finding[key] for key in ("rule", "metric", "step", "value", "limit", "note")}
                     for finding in story.evidence],
        "causes": story.causes,
        "cannot_tell_apart": tied(story),
        "advice": advice(story, lang),
    }  # fmt: skip


def _blind(run: Recorded, blind: dict[str, Any], lang: str) -> dict[str, Any]:
    hint = run.story.book.rules[blind["rule"]].switch_on
    shown = None if hint is None else hint.zh if lang == "zh" else hint.en
    if shown is None and blind["missing"]:
        shown = WORDS[lang]["log_these"].format(names=", ".join(blind["missing"]))
    return {"rule": blind["rule"], "missing": blind["missing"], "reason": blind["reason"], "switch_on": shown}


def _sections(run: Recorded, lang: str) -> list[Section]:
    words = WORDS[lang]
    story = tell(run.story, lang)
    first, *others = [section for section in story if section.lines and section.heading != words["unseen"]]
    others.append(Section(words["unseen"], _unseen(run, words)))
    how = words["read_as"].format(trainer=run.trainer, formats=", ".join(dict.fromkeys(run.formats)))
    when = [words["when"].format(alarm=_or_dash(run.alarm_step), critical=_or_dash(run.critical_step))]
    lines = [*first.lines, *((0, text) for text in (*(when if run.alarm_step is not None else []), how))]
    if run.unknown:
        shown = ", ".join(run.unknown[:_KNOWN_SHOWN]) + (" ..." if len(run.unknown) > _KNOWN_SHOWN else "")
        lines.append((0, words["unknown_keys"].format(count=len(run.unknown), keys=shown)))
    lines += [(0, notice) for notice in run.notices]
    heading = f"{run.path}: {words[run.verdict]}"
    return [Section(heading, lines), *others]


def _unseen(run: Recorded, words: dict[str, str]) -> list[tuple[int, str]]:
    """Return what the log lacks, and which rules are blind for it; in one line what only a live run can give."""
    by_missing: dict[tuple[str, ...], list[str]] = {}
    live, others = list[str](), list[tuple[int, str]]()
    for blind in run.story.blind:
        missing = tuple(blind["missing"])
        if missing and all(METRICS[name].source == "watchdog" for name in missing):
            live.append(blind["rule"])
        elif missing:
            by_missing.setdefault(missing, []).append(blind["rule"])
        else:
            others.append((0, words["blind"].format(title=blind["rule"], reason=blind["reason"], missing="")))
    lines = [
        (0, words["not_logged"].format(names=", ".join(missing), rules=", ".join(rules)))
        for missing, rules in sorted(by_missing.items(), key=lambda pair: (-len(pair[1]), pair[0]))
    ]
    if live:
        lines.append((0, words["only_live"].format(rules=", ".join(live))))
    return [*lines, *others] or [(0, words["all_seen"])]


def _table(found: Diagnosed, words: dict[str, str]) -> list[list[str]]:
    head = [words[f"column_{name}"] for name in ("run", "trainer", "rows", "verdict", "alarm", "critical", "cause")]
    rows = [
        [run.path, run.trainer, str(run.story.rows), words[run.verdict], _or_dash(run.alarm_step),
         _or_dash(run.critical_step), ", ".join(dict.fromkeys(story.rule for story in run.story.incidents)) or "-"]
        for run in found.runs
    ]  # fmt: skip
    return [head, *rows]


def _left_out(found: Diagnosed, words: dict[str, str]) -> list[str]:
    if not found.passed_over:
        return []
    return ["\n".join([words["passed_over"], *(f"- {error}" for _, error in found.passed_over)])]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _or_dash(step: int | None) -> str:
    return "-" if step is None else str(step)


def _wide(text: str) -> int:
    """Return the columns that a text takes on a terminal: Chinese characters take two."""
    return sum(2 if ord(char) > 0x2E7F else 1 for char in text)  # noqa: PLR2004 - where they begin
