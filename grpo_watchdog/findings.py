"""Findings: every rule of a rulebook, step by step: what fires, what explains what, and what is blind.

A rule whose cause fires at the same severity or above is that cause's symptom.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from grpo_watchdog.metrics import METRICS, Step
from grpo_watchdog.roster import Roster
from grpo_watchdog.rule import RANK, Rule
from grpo_watchdog.rulebook import Rulebook
from grpo_watchdog.watch import Finding, Watch

_MILDER = {"critical": "warning", "warning": "notice", "notice": "notice"}
_NEAR = 15  # observations after the beginning of a finding within which its witness must have begun
_MISSING_FOR = 10  # observations without a metric after which its rule counts as blind again
_STEADY = frozenset(
    name
    for name, metric in METRICS.items()
    if metric.source == "watchdog" or name in ("learning_rate", "kl_coef", "clip_epsilon", "grad_norm_limit")
)  # settings, and invariants: to stay the same is what they are for
_FROZEN_EVERY, _FROZEN_TIMES = 10, 10  # looked at every 10, equal 10 times: frozen over 100 observations


class Blind(NamedTuple):
    """One rule that cannot see."""

    rule: str
    missing: tuple[str, ...]
    reason: str


class Findings:
    """All rules of a rulebook, evaluated step by step.

    Args:
        book: the rulebook. The order of its rules in the file does not matter.
    """

    def __init__(self, book: Rulebook) -> None:
        """Start with every rule inactive."""
        self._watches = [Watch(rule_id, rule) for rule_id, rule in sorted(book.rules.items())]
        self._rules = {w.rule_id: w.rule for w in self._watches}
        self._roster = Roster(self._watches)
        self._observations = 0
        self._last: Mapping[str, float] = {}
        self._sampled: dict[str, float] = {}
        self._unchanged: dict[str, int] = {}
        self.firing: tuple[Finding, ...] = ()
        self._began: dict[str, int] = {}  # by rule that fires: the observation at which it began to

    def detect(self, step: Step) -> tuple[Finding, ...]:
        """Return what fires after this step, worst first; symptoms carry the rule that explains them.

        Notices are brought up to date when anything starts, ends or changes in rank, not on every step.
        """
        values = step.values
        if self._roster.look(values, step.number):
            self.firing = self._explained([w.finding for w in self._watches if w.finding is not None])
        self._last = values
        self._observations += 1
        if self._observations % _FROZEN_EVERY == 0:
            self._look_for_frozen(values)
        return self.firing

    def expect(self, metrics: Collection[str]) -> None:
        """Begin anew with every rule that looks at one of these metrics: what they were says nothing any more."""
        self._roster.catch_up()
        self._watches = [
            Watch(w.rule_id, w.rule) if not set(metrics).isdisjoint(w.detector.needs) else w for w in self._watches
        ]
        self._roster = Roster(self._watches)
        self.firing = self._explained([w.finding for w in self._watches if w.finding is not None])

    def blind(self) -> tuple[Blind, ...]:
        """Return the rules that cannot see, and why: a metric is absent, frozen, or says nothing."""
        self._roster.catch_up()
        found = [self._blindness(watch) for watch in self._watches]
        return tuple(blind for blind in found if blind is not None)

    def _blindness(self, watch: Watch) -> Blind | None:
        needs, beside = watch.detector.needs, watch.rule.beside
        if beside and not watch.seen and not any(name in self._last for name in beside):
            return Blind(watch.rule_id, tuple(beside), "never given")
        missing = tuple(name for name in needs if name not in self._last)
        absent = bool(missing) and (watch.detector.needs_all or len(missing) == len(needs))
        if absent and not watch.seen:
            return Blind(watch.rule_id, missing, "never given")
        if absent and watch.missing >= _MISSING_FOR:
            return Blind(watch.rule_id, missing, f"not given for {watch.missing} observations")
        if watch.missing >= _MISSING_FOR:
            return Blind(watch.rule_id, (), "given, but nothing can be inferred from the values")
        frozen = tuple(name for name in needs if self._unchanged.get(name, 0) >= _FROZEN_TIMES)
        if frozen and (watch.detector.needs_all or len(frozen) == len(needs)) and not watch.held:
            shown = ", ".join(f"{name} = {self._sampled[name]:g}" for name in frozen)
            count = _FROZEN_EVERY * _FROZEN_TIMES
            return Blind(
                watch.rule_id, frozen, f"frozen: {shown}, the same to the bit for {count} observations or more"
            )
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every rule as JSON-able values."""
        self._roster.catch_up()
        return {
            "watches": {w.rule_id: w.state_dict() for w in self._watches},
            "observations": self._observations,
            "last": dict(self._last),
            "sampled": dict(self._sampled),
            "unchanged": dict(self._unchanged),
            "began": dict(self._began),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned; rules that it does not know keep theirs."""
        self._roster.catch_up()
        for watch in self._watches:
            if watch.rule_id in state["watches"]:
                watch.load_state_dict(state["watches"][watch.rule_id])
        self._observations, self._last = state["observations"], dict(state["last"])
        self._sampled, self._unchanged = dict(state["sampled"]), dict(state["unchanged"])
        self._began = dict(state["began"])
        self._roster = Roster(self._watches)
        self.firing = self._explained([w.finding for w in self._watches if w.finding is not None])

    def _explained(self, found: list[Finding]) -> tuple[Finding, ...]:
        """Mark symptoms: a cause explains what it inhibits, unless that is more severe than itself."""
        rules = self._rules
        names = {f.rule for f in found}
        began = {name: self._began.get(name, self._observations) for name in names}
        self._began = began
        found = [_weighed(f, rules[f.rule], began) for f in found]
        severity = {f.rule: RANK[f.severity] for f in found}
        marked = []
        for finding in found:
            causes = [
                f.rule for f in found
                if finding.rule in rules[f.rule].inhibits and severity[f.rule] >= severity[finding.rule] and not f.alone
            ]  # fmt: skip
            causes.sort(key=lambda rule: (-severity[rule], rule))
            marked.append(finding._replace(inhibited_by=causes[0] if causes else ""))
        marked.sort(key=lambda f: (-RANK[f.severity], f.since, f.rule))
        return tuple(marked)

    def _look_for_frozen(self, values: Mapping[str, float]) -> None:
        sampled, unchanged = self._sampled, self._unchanged
        for name, value in values.items():
            steady = sampled.get(name) == value and name not in _STEADY
            unchanged[name] = unchanged.get(name, 0) + 1 if steady else 0
            sampled[name] = value


def _weighed(finding: Finding, rule: Rule, began: Mapping[str, int]) -> Finding:
    """Return a finding that needs a witness and has none, or is contradicted, one level milder, asking for nothing.

    A witness that begins long after what it should bear witness to is of something else: a finding that stands would
    otherwise wait for the first spike, however soon that heals.
    """
    latest = began[finding.rule] + _NEAR
    seen = not rule.corroborated_by or any(began.get(name, latest + 1) <= latest for name in rule.corroborated_by)
    if seen and not any(name in began for name in rule.contradicted_by):
        return finding
    return finding._replace(severity=rule.alone or _MILDER[finding.severity], alone=True)
