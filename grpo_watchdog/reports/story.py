"""The story of a run in one language: verdict first, then each incident, what to do next, what could not be seen.

Formats only dress it: a Section is a heading and lines, a line is a depth and a text.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from grpo_watchdog.actions import KNOB_ACTIONS
from grpo_watchdog.journal import decoded
from grpo_watchdog.reports.run import IncidentStory, Run
from grpo_watchdog.reports.words import WORDS
from grpo_watchdog.rule import Text

_REMEDIES = 3  # causes whose remedies are worth listing


class Section(NamedTuple):
    """One part of a report; lines are (depth, text)."""

    heading: str
    lines: list[tuple[int, str]]


def tell(run: Run, lang: str) -> list[Section]:
    """Return the whole story."""
    teller = _Teller(run, lang)
    return [
        teller.verdict(),
        *(teller.incident(story) for story in run.incidents),
        *teller.advice(),
        teller.unseen(),
        *teller.notes(),
    ]


def next_settings(run: Run) -> dict[str, float]:
    """Return the limits that the incidents' levels ask for, at their worst, for the next run: knob name to value."""
    settings: dict[str, float] = {}
    for story in run.incidents:
        rank, book = story.evidence[0]["rank"], story.book
        useless = {e["action"] for e in story.effects if not e["helped"] and e["action"] == "raise_kl_coef"}
        for name, target in book.rules[story.rule].ladder[rank - 1].do.items():
            action = KNOB_ACTIONS.get(name)
            if action is None or name in useless:  # it was given, KL did not fall, and it was taken back
                continue
            base = run.bases.get(action.knob, getattr(book.base, action.knob))
            scaled = book.policy.targets == "scaled" and action.knob in run.bases
            limit = action.merge(base, book.limit(name, float(target), base, scaled=scaled))
            settings[action.knob] = action.merge(settings.get(action.knob, limit), limit)
    return settings


def next_starts(run: Run) -> dict[str, float]:
    """Return what the next run should begin with, by the likeliest causes and what this one had: knob to value."""
    starts: dict[str, float] = {}
    for story in run.incidents:
        for cause in _likeliest(story):
            for name, factor in story.book.causes[cause["cause"]].next_.items():
                if name in run.bases:
                    starts.setdefault(name, run.bases[name] * factor)
    return starts


def tied(story: IncidentStory) -> list[str]:
    """Return the causes between which nothing tells: as much speaks for each as for the first; else nothing."""
    best = [cause["cause"] for cause in _likeliest(story)]
    return best if len(best) > 1 else []


def _likeliest(story: IncidentStory) -> list[dict[str, Any]]:
    def weight(cause: dict[str, Any]) -> tuple[int, int]:
        return len(cause["supported"]), -len(cause["contradicted"])

    return [cause for cause in story.causes if weight(cause) == weight(story.causes[0])]


def advice(story: IncidentStory, lang: str) -> list[str]:
    """Return the remedies for an incident's likeliest causes, and what its levels advise that no knob can turn."""
    remedies = [story.book.causes[c["cause"]].remedy for c in story.causes[:_REMEDIES]]
    levels = story.book.rules[story.rule].ladder[: story.evidence[0]["rank"]]
    return [_text(text, lang) for text in (*remedies, *(level.advice for level in levels)) if text is not None]


class _Teller:
    def __init__(self, run: Run, lang: str) -> None:
        self._run, self._lang, self._words = run, lang, WORDS[lang]

    def _say(self, key: str, **values: Any) -> str:
        return self._words[key].format(**values)

    def verdict(self) -> Section:
        run = self._run
        worst = self._say("worst", rows=run.rows, first=run.first_step, last=run.last_step, book=run.book.name)
        lines = [worst if run.rows else self._say("empty")]
        if not run.halted:
            lines.append(self._say("goes_on", now=self._say(run.now)))
        else:
            ignored = run.halted_at is not None and run.last_step is not None and run.last_step > run.halted_at
            lines.append(self._say("halt_ignored" if ignored else "halted", why=run.halted, step=run.halted_at))
        held_back = [a for a in run.actions if a.get("held_back")]
        if held_back:
            lines.append(self._say("held_back", n=len(held_back)))
        back = [a for a in run.actions if a["action"] == "rollback" and a["ok"] and not a.get("held_back")]
        if back:
            steps = ", ".join(f"{int(a['before'])} -> {int(a['after'])}" for a in back)
            lines.append(self._say("rollbacks", n=len(back), steps=steps))
        if run.doses:
            doses = ", ".join(f"{KNOB_ACTIONS[name].knob} {limit:g}" for name, limit in run.doses.items())
            lines.append(self._say("doses", doses=doses))
        if not run.incidents:
            lines.append(self._say("no_incident"))
        return Section(f"{self._say('title')}: {self._say(run.verdict)}", [(0, line) for line in lines])

    def incident(self, story: IncidentStory) -> Section:
        title = _text(story.book.rules[story.rule].title, self._lang)
        heading = self._say("incident", id=story.id, title=title, severity=self._say(story.severity))
        end = self._say("open") if story.closed is None else self._say("closed", step=story.closed)
        began = story.evidence[0]["since"]
        key = "since" if story.since >= began else "since_signs"
        lines = [(0, self._say(key, since=began, first=story.since, end=end)), (0, self._say("evidence"))]
        lines += [(1, self._evidence(story, finding)) for finding in story.evidence]
        if story.causes:
            lines.append((0, self._say("causes")))
            lines += [line for cause in story.causes for line in self._cause(story, cause)]
        if len(alike := tied(story)) > 1:
            titles = "; ".join(_text(story.book.causes[cause].title, self._lang) for cause in alike)
            lines.append((1, self._say("cannot_tell", causes=titles)))
        if story.checks:
            lines.append((0, self._say("checks")))
            passed = [check["name"] for check in story.checks if check["passed"]]
            lines += [(1, self._check(check)) for check in story.checks if not check["passed"]]
            lines += [(1, self._say("passed_checks", names=", ".join(passed)))] if passed else []
        lines.append((0, self._say("did")))
        done = [(a["step"], self._action(a)) for a in story.actions] + [
            (e["step"], self._effect(e)) for e in story.effects
        ]
        lines += [(1, line) for _, line in sorted(done, key=lambda pair: pair[0])] or [(1, self._say("did_nothing"))]
        return Section(heading, lines)

    def advice(self) -> list[Section]:
        run = self._run
        if not run.incidents:
            return []
        lines = []
        settings = next_settings(run)
        if settings:
            listed = [
                self._say("setting", name=name, value=number(value), base=number(run.bases[name]))
                if name in run.bases
                else f"{name} {number(value)}"
                for name, value in settings.items()
            ]
            lines.append(self._say("settings", settings=", ".join(listed)))
        for name, value in next_starts(run).items():
            if name not in settings:
                lines.append(self._say("next_value", name=name, was=number(run.bases[name]), value=number(value)))
        for story in run.incidents:
            lines += [text for text in advice(story, self._lang) if text not in lines]
        if run.halted and run.proven:
            lines.append(self._say("resume", step=run.proven[-1], path=str(run.path)))
        elif run.halted:
            lines += [self._say("restart"), self._say("more_checkpoints")]
        return [Section(self._say("next"), [(0, line) for line in lines])]

    def unseen(self) -> Section:
        lines = []
        for blind in self._run.blind:
            rule = self._run.book.rules[blind["rule"]]
            missing = self._say("missing", names=", ".join(blind["missing"])) if blind["missing"] else ""
            title = _text(rule.title, self._lang)
            lines.append((0, self._say("blind", title=title, reason=blind["reason"], missing=missing)))
            if rule.switch_on is not None:
                lines.append((1, _text(rule.switch_on, self._lang)))
        return Section(self._say("unseen"), lines or [(0, self._say("all_seen"))])

    def notes(self) -> list[Section]:
        sections = [Section(self._say("attach"), [(0, line) for line in self._run.briefing])]
        if self._run.notices:
            lines = [(0, text if step is None else f"{self._say('step', step=step)}: {text}")
                     for step, text in self._run.notices]  # fmt: skip
            sections.insert(0, Section(self._say("notices"), lines))
        return sections

    def _evidence(self, story: IncidentStory, finding: dict[str, Any]) -> str:
        shown = f"{finding['metric']} = {number(finding['worst'])}"
        if finding["limit"] is not None:
            shown += f" ({self._say('against', limit=number(finding['limit']))})"
        if finding["note"]:
            shown += f": {finding['note']}"
        mark = f"[{self._say('symptom')}] " if finding["inhibited_by"] else ""
        return f"{mark}{_text(story.book.rules[finding['rule']].title, self._lang)}: {shown}"

    def _cause(self, story: IncidentStory, cause: dict[str, Any]) -> list[tuple[int, str]]:
        reasons = []
        if cause["supported"]:
            reasons.append(self._say("for", what="; ".join(cause["supported"])))
        if cause["contradicted"]:
            reasons.append(self._say("contra", what="; ".join(cause["contradicted"])))
        title = _text(story.book.causes[cause["cause"]].title, self._lang)
        if not reasons:
            return [(1, f"{title} ({self._say('no_evidence')})")]
        return [(1, title), (2, " | ".join(reasons))]

    def _check(self, check: dict[str, Any]) -> str:
        key = "unknown_check" if check["passed"] is None else "failed_check"
        return f"{check['name']}: {self._say(key)}: {check['detail']}"

    def _action(self, action: dict[str, Any]) -> str:
        why = action.get("held_back")
        would = f"{self._say(why)} " if why else ""
        line = f"{self._say('step', step=action['step'])}: {would}{action['action']}"
        before, after = number(action["before"]), number(action["after"])
        if action["before"] is not None or action["after"] is not None:
            held = action["before"] == action["after"]
            line += f" {self._say('held_at', value=after)}" if held else f" {before} -> {after}"
        if not action["ok"]:
            line += f" {self._say('failed', detail=action['detail'])}"
        return f"{line} ({action['reason']})"

    def _effect(self, effect: dict[str, Any]) -> str:
        shown = {key: number(effect[key]) for key in ("before", "after")}
        what = {"action": effect["action"], "metric": effect["metric"], **shown}
        line = self._say("helped" if effect["helped"] else "not_helped", **what)
        return f"{self._say('step', step=effect['step'])}: {line}"


def number(value: Any) -> str:  # noqa: ANN401
    """Return a value of the journal for a person: six digits; a dash where there is none."""
    value = decoded(value)
    return "-" if value is None else f"{value:.6g}" if isinstance(value, float | int) else str(value)


def _text(text: Text, lang: str) -> str:
    return text.zh if lang == "zh" else text.en
