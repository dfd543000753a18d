"""JSON, for scripts: one run, schema 1."""

from __future__ import annotations

from typing import Any

from grpo_watchdog.journal import encode
from grpo_watchdog.reports.run import IncidentStory, Run
from grpo_watchdog.reports.story import advice, next_settings


def render(run: Run, lang: str = "en") -> str:
    """Return the report as one JSON object; not-a-number and infinity are strings."""
    return encode(as_dict(run, lang)).decode() + "\n"


def as_dict(run: Run, lang: str = "en") -> dict[str, Any]:
    """Return the report as plain values."""
    return {
        "schema": 1,
        "path": str(run.path),
        "rulebook": run.book.name,
        "rows": run.rows,
        "first_step": run.first_step,
        "last_step": run.last_step,
        "verdict": run.verdict,
        "level_at_end": run.now,
        "halted": run.halted or None,
        "incidents": [_incident(story, lang) for story in run.incidents],
        "actions": run.actions,
        "in_force": run.doses,
        "proven_checkpoints": run.proven,
        "next_settings": next_settings(run),
        "blind": [_blind(run, blind, lang) for blind in run.blind],
        "briefing": run.briefing,
        "notices": [{"step": step, "text": text} for step, text in run.notices],
    }


def _incident(story: IncidentStory, lang: str) -> dict[str, Any]:
    return {
        "id": story.id,
        "rule": story.rule,
        "cause": story.causes[0]["cause"] if story.causes else None,
        "severity": story.severity,
        "first_step": story.since,
        "closed_step": story.closed,
        "evidence": [
            {
                "rule": finding["rule"],
                "metric": finding["metric"],
                "step": finding["step"],
                "value": finding["value"],
                "limit": finding["limit"],
                "note": finding["note"],
                "symptom_of": finding["inhibited_by"] or None,
            }
            for finding in story.evidence
        ],
        "causes": story.causes,
        "checks": story.checks,
        "actions": story.actions,
        "effects": story.effects,
        "advice": advice(story, lang),
    }


def _blind(run: Run, blind: dict[str, Any], lang: str) -> dict[str, Any]:
    hint = run.book.rules[blind["rule"]].switch_on
    return {**blind, "switch_on": None if hint is None else hint.zh if lang == "zh" else hint.en}
