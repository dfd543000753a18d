"""Diagnosis: findings become incidents: one root, its symptoms under it, likely causes with the evidence.

The causes are the rulebook's, in the document's order. A failed look at the model comes first, then what other evidence
speaks for, then what none speaks to, last what evidence speaks against; within each the order stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from grpo_watchdog.causes import Evidence
from grpo_watchdog.controls import Check
from grpo_watchdog.rule import RANK
from grpo_watchdog.rulebook import Rulebook
from grpo_watchdog.watch import Finding


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
    """One trouble with one root. It keeps its number when a deeper root takes over from what proved a symptom.

    Attributes:
        id: counts up over the run.
        rule: the root's rule.
        severity: the worst that it reached.
        since: the step at which the first of it began to hold.
        opened: the step at which the first of it began to fire.
        evidence: the root's finding first, then its symptoms'.
        causes: likely causes, the likeliest first.
        checks: what the look at the model found, when it was looked at.
        rank: the highest level of the root's rule that it reached.
    """

    id: int
    rule: str
    severity: str
    since: int
    opened: int
    evidence: tuple[Finding, ...]
    causes: tuple[RankedCause, ...]
    checks: tuple[Check, ...] = ()
    rank: int = 1


Trouble = tuple[Finding, ...]
"""A root's finding, followed by its symptoms'."""


class Closed(NamedTuple):
    """The end of an incident: it no longer holds, or it proved to be part of another (`into`)."""

    id: int
    rule: str
    step: int
    into: int | None = None


class Diagnosis:
    """Keeps the open incidents.

    Args:
        book: the rulebook.
        bases: what each knob was set to at attach; with scaled targets, what counts as high or low is scaled too.
    """

    def __init__(self, book: Rulebook, bases: Mapping[str, float]) -> None:
        """Start with none."""
        self._book = book
        self._count = 0
        scaled = book.policy.targets == "scaled"
        self._bases = {n: (base, getattr(book.base, n)) for n, base in bases.items() if base} if scaled else {}
        self.open: dict[str, Incident] = {}
        self._knobs = tuple(bases)
        self._settings: dict[int, dict[str, float]] = {}  # by incident: the knobs when it opened, before any dose

    def diagnose(
        self, findings: Sequence[Finding], values: Mapping[str, float], checks: Sequence[Check], step: int
    ) -> tuple[list[Incident], list[Closed]]:
        """Bring the incidents up to date; return those new, worse or of a deeper root, and those that ended."""
        parent = {f.rule: f.inhibited_by for f in findings}
        now, news, closed = dict[str, Incident](), list[Incident](), list[Closed]()
        for troubles, olds in self._clusters(_groups(findings, parent)):
            evidence = tuple(finding for trouble in troubles for finding in trouble)
            old, root = (olds[0] if olds else None), evidence[0]
            closed += [Closed(other.id, other.rule, step, olds[0].id) for other in olds[1:]]
            deeper = old is not None and root.rule == _root(old.rule, parent) != old.rule
            if old is not None and not deeper and not _worse(root, old):
                now[old.rule] = old._replace(evidence=evidence)
                continue
            incident = self._incident(evidence, old, step)
            begun = self._settings.setdefault(incident.id, {n: values[n] for n in self._knobs if n in values})
            causes = self._rank(root.rule, findings, {**values, **begun}, checks)
            now[root.rule] = incident._replace(causes=causes, checks=tuple(checks))
            news.append(now[root.rule])
        kept = {incident.id for incident in now.values()} | {end.id for end in closed}
        closed += [Closed(i.id, i.rule, step) for i in self.open.values() if i.id not in kept]
        self.open = {i.rule: i for i in sorted(now.values(), key=lambda i: (-RANK[i.severity], i.id))}
        for end in closed:
            self._settings.pop(end.id, None)
        return news, closed

    def _clusters(self, troubles: list[Trouble]) -> list[tuple[list[Trouble], list[Incident]]]:
        """Return what belongs together: a trouble, and the open incidents that go on in it."""
        clusters: list[tuple[list[Trouble], list[Incident]]] = [([trouble], []) for trouble in troubles]
        for incident in sorted(self.open.values(), key=lambda i: i.id):
            known = {incident.rule, *(finding.rule for finding in incident.evidence)}
            touched = [c for c in clusters if any(_continues(trouble, incident.rule, known) for trouble in c[0])]
            if touched:
                merged = ([t for c in touched for t in c[0]], [*(i for c in touched for i in c[1]), incident])
                clusters = [merged, *(c for c in clusters if c not in touched)]
        for members, _ in clusters:
            members.sort(key=troubles.index)
        return clusters

    def _incident(self, evidence: Trouble, old: Incident | None, step: int) -> Incident:
        root = evidence[0]
        if old is None:
            self._count += 1
            return Incident(self._count, root.rule, root.severity, root.since, step, evidence, (), (), root.rank)
        worst = max(root.severity, old.severity, key=RANK.__getitem__)
        since = min(old.since, root.since)
        return old._replace(rule=root.rule, severity=worst, since=since, evidence=evidence, rank=root.rank)

    def state_dict(self) -> dict[str, Any]:
        """Return the open incidents as JSON-able values."""
        settings = {str(number): dict(knobs) for number, knobs in self._settings.items()}
        return {"count": self._count, "open": [list(i) for i in self.open.values()], "settings": settings}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self._count = state["count"]
        self.open = {i.rule: i for i in map(_incident, state["open"])}
        self._settings = {int(number): dict(knobs) for number, knobs in state["settings"].items()}

    def _rank(
        self, rule: str, findings: Sequence[Finding], values: Mapping[str, float], checks: Sequence[Check]
    ) -> tuple[RankedCause, ...]:
        firing = {f.rule for f in findings}
        ranked: list[tuple[int, RankedCause]] = []
        for name in self._book.rules[rule].causes:
            supported, contradicted, proven = list[str](), list[str](), False
            for evidence in self._book.causes[name].evidence:
                for holds, text in _weigh(evidence, firing, values, checks, self._bases):
                    (supported if holds else contradicted).append(text)
                    proven |= holds and evidence.check is not None
            strength = 0 if proven else 1 if supported else 3 if contradicted else 2
            ranked.append((strength, RankedCause(name, tuple(supported), tuple(contradicted))))
        ranked.sort(key=lambda pair: pair[0])
        return tuple(cause for _, cause in ranked)


def _continues(trouble: Trouble, root: str, known: set[str]) -> bool:
    """Return whether a trouble is an incident's root, explains it, or is what is left of it."""
    return trouble[0].rule in known or any(finding.rule == root for finding in trouble)


def _worse(root: Finding, incident: Incident) -> bool:
    if RANK[root.severity] != RANK[incident.severity]:
        return RANK[root.severity] > RANK[incident.severity]
    return root.rule == incident.rule and root.rank > incident.rank


def _groups(findings: Sequence[Finding], parent: Mapping[str, str]) -> list[Trouble]:
    """Return, for every root at a warning or above, its finding followed by its symptoms'; worst first."""
    groups = {f.rule: [f] for f in findings if not f.inhibited_by and RANK[f.severity] >= RANK["warning"]}
    for finding in findings:
        root = _root(finding.rule, parent)
        if finding.inhibited_by and root in groups:
            groups[root].append(finding)
    return [tuple(group) for group in groups.values()]


def _root(rule: str, parent: Mapping[str, str]) -> str:
    while parent.get(rule):
        rule = parent[rule]
    return rule


def _weigh(
    evidence: Evidence,
    firing: set[str],
    values: Mapping[str, float],
    checks: Sequence[Check],
    bases: Mapping[str, tuple[float, float]],
) -> list[tuple[bool, str]]:
    """Return whether the evidence holds, with what was seen; nothing where it cannot be told."""
    if evidence.rule is not None:
        return [(True, f"{evidence.rule} fires")] if evidence.rule in firing else []
    if evidence.check is not None:
        return [(not c.passed, c.detail) for c in checks if c.name == evidence.check and c.passed is not None]
    name = evidence.metric or ""
    value = values.get(name)
    if value is None or value != value:  # noqa: PLR0124 - not-a-number speaks neither for nor against
        return []
    base, documented = bases.get(name, (1.0, 1.0))
    if evidence.above is not None:
        limit, sign = base * (evidence.above / documented), ">"
        holds = value > limit
    else:
        limit, sign = base * ((evidence.below or 0.0) / documented), "<"
        holds = value < limit
    return [(holds, f"{name} {value:.3g} {sign if holds else 'not ' + sign} {limit:.3g}")]


def _incident(row: Sequence[Any]) -> Incident:
    evidence = tuple(Finding(*f) for f in row[5])
    causes = tuple(RankedCause(c[0], tuple(c[1]), tuple(c[2])) for c in row[6])
    number, rule, severity, since, opened = row[:5]
    checks = tuple(Check(*c) for c in row[7])
    return Incident(number, rule, severity, since, opened, evidence, causes, checks, row[8])
