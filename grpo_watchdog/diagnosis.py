"""Diagnosis: findings become incidents: one root, its symptoms under it, likely causes with the evidence.

The causes are the rulebook's, in the document's order. Those with evidence for them come first, those with
only evidence against them last; without evidence the order stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from grpo_watchdog.controls import Check
from grpo_watchdog.findings import Finding
from grpo_watchdog.rule import RANK
from grpo_watchdog.rulebook import Evidence, Rulebook


class RankedCause(NamedTuple):
    """One likely cause.

    Attributes:
        cause: its id in the rulebook.
        supported: what speaks for it.
        contradicted: what speaks against it.
    """

    cause: str
    supported: tuple[str, ...]
    contradicted: tuple[str, ...]


class Incident(NamedTuple):
    """One trouble with one root.

    Attributes:
        id: counts up over the run.
        rule: the root's rule.
        severity: the worst that the root reached.
        since: the step at which the root began to hold.
        opened: the step at which it began to fire.
        evidence: the root's finding first, then its symptoms'.
        causes: likely causes, the likeliest first.
        checks: what the look at the model found, when it was looked at.
    """

    id: int
    rule: str
    severity: str
    since: int
    opened: int
    evidence: tuple[Finding, ...]
    causes: tuple[RankedCause, ...]
    checks: tuple[Check, ...] = ()


class Closed(NamedTuple):
    """The end of an incident, and why it ended."""

    id: int
    rule: str
    step: int
    why: str


class Diagnosis:
    """Keeps the open incidents."""

    def __init__(self, book: Rulebook) -> None:
        """Start with none."""
        self._book = book
        self._count = 0
        self.open: dict[str, Incident] = {}

    def diagnose(
        self, findings: Sequence[Finding], values: Mapping[str, float], checks: Sequence[Check], step: int
    ) -> tuple[list[Incident], list[Closed]]:
        """Bring the incidents up to date; return those that opened or grew worse, and those that ended."""
        parent = {f.rule: f.inhibited_by for f in findings}
        roots = [f for f in findings if not f.inhibited_by and RANK[f.severity] >= RANK["warning"]]
        symptoms: dict[str, list[Finding]] = {f.rule: [] for f in roots}
        for finding in findings:
            root = _root(finding.rule, parent)
            if finding.inhibited_by and root in symptoms:
                symptoms[root].append(finding)
        closed = self._close(set(symptoms), parent, step)
        news = []
        for finding in roots:
            old = self.open.get(finding.rule)
            evidence = (finding, *symptoms[finding.rule])
            if old is not None and RANK[finding.severity] <= RANK[old.severity]:
                self.open[finding.rule] = old._replace(evidence=evidence)
                continue
            self._count += old is None
            number, opened = (self._count, step) if old is None else (old.id, old.opened)
            causes = self._rank(finding.rule, findings, values, checks)
            incident = Incident(
                number, finding.rule, finding.severity, finding.since, opened, evidence, causes, tuple(checks)
            )
            self.open[finding.rule] = incident
            news.append(incident)
        return news, closed

    def close_all(self, step: int, why: str) -> list[Closed]:
        """End every incident, as after a rollback."""
        closed = [Closed(i.id, i.rule, step, why) for i in self.open.values()]
        self.open.clear()
        return closed

    def state_dict(self) -> dict[str, Any]:
        """Return the open incidents as JSON-able values."""
        return {"count": self._count, "open": [list(i) for i in self.open.values()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self._count = state["count"]
        self.open = {i.rule: i for i in map(_incident, state["open"])}

    def _close(self, roots: set[str], parent: Mapping[str, str], step: int) -> list[Closed]:
        closed = []
        for rule in [rule for rule in self.open if rule not in roots]:
            incident = self.open.pop(rule)
            why = f"explained by {_root(rule, parent)}" if rule in parent else "no longer holds"
            closed.append(Closed(incident.id, rule, step, why))
        return closed

    def _rank(
        self, rule: str, findings: Sequence[Finding], values: Mapping[str, float], checks: Sequence[Check]
    ) -> tuple[RankedCause, ...]:
        firing = {f.rule for f in findings}
        ranked = []
        for cause in self._book.rules[rule].causes:
            supported, contradicted = [], []
            for evidence in self._book.causes[cause].evidence:
                for holds, text in _weigh(evidence, firing, values, checks):
                    (supported if holds else contradicted).append(text)
            ranked.append(RankedCause(cause, tuple(supported), tuple(contradicted)))
        ranked.sort(key=lambda c: 0 if c.supported else 2 if c.contradicted else 1)
        return tuple(ranked)


def _root(rule: str, parent: Mapping[str, str]) -> str:
    while parent.get(rule):
        rule = parent[rule]
    return rule


def _weigh(
    evidence: Evidence, firing: set[str], values: Mapping[str, float], checks: Sequence[Check]
) -> list[tuple[bool, str]]:
    """Return whether the evidence holds, with what was seen; nothing where it cannot be told."""
    if evidence.rule is not None:
        return [(True, f"{evidence.rule} fires")] if evidence.rule in firing else []
    if evidence.check is not None:
        return [(not c.passed, c.detail) for c in checks if c.name == evidence.check and c.passed is not None]
    value = values.get(evidence.metric or "")
    if value is None or value != value:  # noqa: PLR0124 - not-a-number speaks neither for nor against
        return []
    if evidence.above is not None:
        holds, sign, limit = value > evidence.above, ">", evidence.above
    else:
        limit = evidence.below if evidence.below is not None else 0.0
        holds, sign = value < limit, "<"
    return [(holds, f"{evidence.metric} {value:.3g} {sign if holds else 'not ' + sign} {limit:.3g}")]


def _incident(row: Sequence[Any]) -> Incident:
    evidence = tuple(Finding(*f) for f in row[5])
    causes = tuple(RankedCause(c[0], tuple(c[1]), tuple(c[2])) for c in row[6])
    return Incident(*row[:5], evidence, causes, tuple(Check(*c) for c in row[7]))
