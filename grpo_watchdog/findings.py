"""Findings: a rule goes inactive -> pending -> firing, and says when it is blind.

A level fires after `for` consecutive observations and is left after `keep_firing_for` consecutive ones
below it (with hysteresis, where the rule has it). A missing metric neither starts nor ends anything: absent is
not healthy. A rule whose cause fires at the same severity or above is that cause's symptom.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from grpo_watchdog.detectors import Reading, detector
from grpo_watchdog.metrics import Step
from grpo_watchdog.rule import RANK, Rule
from grpo_watchdog.rulebook import Rulebook

_MISSING_FOR = 10  # observations without a metric after which its rule counts as blind again
_FROZEN_EVERY, _FROZEN_TIMES = 10, 10  # looked at every 10, equal 10 times: frozen over 100 observations


class Finding(NamedTuple):
    """One rule that fires.

    Attributes:
        rule: the rule's id.
        severity: notice, warning or critical.
        rank: which of the rule's levels, 1 the mildest.
        since: the step at which it began to hold.
        step: the step at which it last held.
        metric: the metric that decided.
        value: its value when last seen.
        worst: the value furthest out since it began.
        limit: the limit that it was held against.
        note: what the numbers do not say.
        inhibited_by: the firing rule that explains this one, or "".
    """

    rule: str
    severity: str
    rank: int
    since: int
    step: int
    metric: str
    value: float
    worst: float
    limit: float | None
    note: str = ""
    inhibited_by: str = ""


class Blind(NamedTuple):
    """One rule that cannot see."""

    rule: str
    missing: tuple[str, ...]
    reason: str


class Watch:
    """The state of one rule."""

    __slots__ = (
        "active",
        "below",
        "detector",
        "finding",
        "held",
        "ladder",
        "loud",
        "missing",
        "needs",
        "needs_all",
        "over",
        "rule",
        "rule_id",
        "seen",
        "settled",
        "since",
    )

    def __init__(self, rule_id: str, rule: Rule) -> None:
        """Start inactive."""
        self.rule_id, self.rule = rule_id, rule
        self.detector = detector(rule)
        self.needs, self.needs_all = frozenset(self.detector.needs), self.detector.needs_all
        self.ladder = rule.ladder
        levels = len(self.ladder)
        self.over = [0] * levels  # consecutive observations at or above each level
        self.below = [0] * levels  # consecutive observations below it
        self.held = 0  # the level that fires
        self.active = False  # pending or firing
        self.loud = False  # firing above a notice
        self.settled = False  # a notice that simply goes on
        self.since: int | None = None
        self.finding: Finding | None = None
        self.missing = 0  # consecutive observations without what it needs
        self.seen = False

    def update(self, values: Mapping[str, float], step: int) -> bool:
        """Look at one step; return whether the finding changed in rank."""
        every, given = self.needs_all, self.needs
        able = all(map(values.__contains__, given)) if every else not given.isdisjoint(values)
        reading = self.detector.read(values, firing=self.held > 0) if able else None
        if reading is None:
            self.missing += 1
            return False
        self.seen, self.missing = True, 0
        rank = reading.rank
        if not rank and not self.active:
            return False
        if self.settled and rank == self.held == reading.sticky:
            return False
        changed = self._advance(reading, step)
        self.settled = rank == self.held == reading.sticky and rank > 0 and not self.loud and not any(self.below[:rank])
        return changed

    def interval(self) -> tuple[str, float, float] | None:
        """Return the metric and the closed interval within which the next value changes nothing, where there is one."""
        if self.missing or not self.seen:
            return None
        if self.settled:
            return self.detector.steady
        return None if self.active else self.detector.quiet

    def _advance(self, reading: Reading, step: int) -> bool:
        before, rule = self.held, self.rule
        for level in range(len(self.over)):
            self.over[level] = self.over[level] + 1 if reading.rank > level else 0
            self.below[level] = self.below[level] + 1 if reading.sticky <= level else 0
            if self.over[level] >= rule.for_:
                self.held = max(self.held, level + 1)
        while self.held and self.below[self.held - 1] >= rule.keep_firing_for:
            self.held -= 1
        if reading.rank and self.since is None:
            self.since = step
        self.active = self.held > 0 or reading.rank > 0
        if not self.active:
            self.since = None
        self.finding = self._finding(reading, step) if self.held else None
        self.loud = self.finding is not None and self.finding.severity != "notice"
        return self.held != before

    def _finding(self, reading: Reading, step: int) -> Finding:
        old, severity = self.finding, self.ladder[self.held - 1].severity
        since = step if self.since is None else self.since
        if not reading.rank and old is not None:  # still firing, on its way out
            return old._replace(rank=self.held, severity=severity, value=reading.value)
        worst = reading.value
        if old is not None and not abs(worst) > abs(old.worst) and worst == worst:  # noqa: PLR0124 - NaN is worst
            worst = old.worst
        return Finding(self.rule_id, severity, self.held, since, step, reading.metric, reading.value, worst,
                       reading.limit, reading.note)  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON-able values."""
        return {
            "over": list(self.over), "below": list(self.below), "held": self.held, "active": self.active,
            "since": self.since, "finding": None if self.finding is None else list(self.finding),
            "missing": self.missing, "seen": self.seen, "settled": self.settled, "detector": self.detector.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self.over, self.below, self.held = list(state["over"]), list(state["below"]), state["held"]
        self.active, self.since = state["active"], state["since"]
        self.missing, self.seen, self.settled = state["missing"], state["seen"], state["settled"]
        self.finding = None if state["finding"] is None else Finding(*state["finding"])
        self.loud = self.finding is not None and self.finding.severity != "notice"
        self.detector.load_state_dict(state["detector"])


class Findings:
    """All rules of a rulebook, evaluated step by step.

    Args:
        book: the rulebook. The order of its rules in the file does not matter.
    """

    def __init__(self, book: Rulebook) -> None:
        """Start with every rule inactive."""
        self._watches = [Watch(rule_id, rule) for rule_id, rule in sorted(book.rules.items())]
        sleepers = [w for w in self._watches if w.detector.quiet or w.detector.steady]
        self._sleepers, self._awake = sleepers, sleepers  # awake: those that the next value may change
        self._asleep: list[tuple[Watch, str, float, float]] = []
        self._always = [w for w in self._watches if w not in sleepers]
        self._observations = 0
        self._last: Mapping[str, float] = {}
        self._sampled: dict[str, float] = {}
        self._unchanged: dict[str, int] = {}
        self.firing: tuple[Finding, ...] = ()

    def detect(self, step: Step) -> tuple[Finding, ...]:
        """Return what fires after this step, worst first; symptoms carry the rule that explains them.

        Notices are brought up to date when anything starts, ends or changes in rank, not on every step.
        """
        values, number, dirty, turned = step.values, step.number, False, False
        get = values.get
        for watch, metric, low, high in self._asleep:
            if not low <= get(metric, _NAN) <= high:
                dirty |= watch.update(values, number) or watch.loud
                turned = True
        for watch in self._awake:
            dirty |= watch.update(values, number) or watch.loud
            turned = turned or watch.interval() is not None
        for watch in self._always:
            dirty |= watch.update(values, number) or watch.loud
        if turned:
            self._sort()
        if dirty:
            self.firing = self._explained([w.finding for w in self._watches if w.finding is not None])
        self._last = values
        self._observations += 1
        if self._observations % _FROZEN_EVERY == 0:
            self._look_for_frozen(values)
        return self.firing

    def _sort(self) -> None:
        """Put to sleep whom only a value outside an interval can change; most rules of a healthy run."""
        self._asleep, self._awake = [], []
        for watch in self._sleepers:
            interval = watch.interval()
            if interval is None:
                self._awake.append(watch)
            else:
                self._asleep.append((watch, *interval))

    def blind(self) -> tuple[Blind, ...]:
        """Return the rules that cannot see, and why: a metric is absent, frozen, or says nothing."""
        found = [self._blindness(watch) for watch in self._watches]
        return tuple(blind for blind in found if blind is not None)

    def _blindness(self, watch: Watch) -> Blind | None:
        needs = watch.detector.needs
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
        return {
            "watches": {w.rule_id: w.state_dict() for w in self._watches},
            "observations": self._observations,
            "last": dict(self._last),
            "sampled": dict(self._sampled),
            "unchanged": dict(self._unchanged),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned; rules that it does not know keep theirs."""
        for watch in self._watches:
            if watch.rule_id in state["watches"]:
                watch.load_state_dict(state["watches"][watch.rule_id])
        self._observations, self._last = state["observations"], dict(state["last"])
        self._sampled, self._unchanged = dict(state["sampled"]), dict(state["unchanged"])
        self._sort()
        self.firing = self._explained([w.finding for w in self._watches if w.finding is not None])

    def _explained(self, found: list[Finding]) -> tuple[Finding, ...]:
        """Mark symptoms: a cause explains what it inhibits, unless that is more severe than itself."""
        rules = {w.rule_id: w.rule for w in self._watches}
        severity = {f.rule: RANK[f.severity] for f in found}
        marked = []
        for finding in found:
            causes = [
                f.rule for f in found
                if finding.rule in rules[f.rule].inhibits and severity[f.rule] >= severity[finding.rule]
            ]  # fmt: skip
            causes.sort(key=lambda rule: (-severity[rule], rule))
            marked.append(finding._replace(inhibited_by=causes[0] if causes else ""))
        marked.sort(key=lambda f: (-RANK[f.severity], f.since, f.rule))
        return tuple(marked)

    def _look_for_frozen(self, values: Mapping[str, float]) -> None:
        sampled, unchanged = self._sampled, self._unchanged
        for name, value in values.items():
            unchanged[name] = unchanged.get(name, 0) + 1 if sampled.get(name) == value else 0
            sampled[name] = value


_NAN = float("nan")
