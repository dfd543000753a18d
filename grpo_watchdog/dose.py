"""Dose: what rules ask for, what is in force, and whether it helped.

Doses are limits (a ceiling for the learning rate and the clip, a floor for the KL coefficient), so giving one twice
changes nothing and several merge into the safest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from grpo_watchdog.actions import ACTIONS
from grpo_watchdog.rulebook import Rulebook
from grpo_watchdog.watch import Finding


class Dose(NamedTuple):
    """A limit in force.

    Attributes:
        limit: the ceiling or floor.
        rule: the rule that asked for it.
        rank: the level of the rule that asked for it.
        given: the observation at which it was given.
        metric: what must shrink for it to have helped; "" where that cannot be told: a rollback was done with it.
        value: the size of that metric when it was given.
        judged: whether its effect was looked at.
    """

    limit: float
    rule: str
    rank: int
    given: int
    metric: str
    value: float
    judged: bool = False


class Effect(NamedTuple):
    """Whether a dose helped, some observations later."""

    action: str
    rule: str
    metric: str
    before: float
    after: float
    helped: bool


class Want(NamedTuple):
    """What the firing rules ask of one action, merged; `age` is how long ago the oldest of these troubles began."""

    target: float
    rule: str
    rank: int
    reason: str
    age: int = 0


def wanted(book: Rulebook, findings: Sequence[Finding]) -> dict[str, Want]:
    """Return what all firing rules together ask of each action: the safest of each; symptoms ask for nothing."""
    wants: dict[str, Want] = {}
    for finding in findings:
        if finding.inhibited_by or finding.alone:
            continue
        reason = _reason(finding)
        for name, target in book.rules[finding.rule].ladder[finding.rank - 1].do.items():
            new = Want(float(target), finding.rule, finding.rank, reason, finding.age)
            old = wants.get(name)
            if old is None or ACTIONS[name].merge(old.target, new.target) != old.target:
                wants[name] = new if old is None else new._replace(age=max(old.age, new.age))
            elif finding.age > old.age:
                wants[name] = old._replace(age=finding.age)
    return wants


def _reason(finding: Finding) -> str:
    limit = "" if finding.limit is None else f" against {finding.limit:g}"
    return f"{finding.metric} {finding.value:.6g}{limit}" + (f" ({finding.note})" if finding.note else "")
