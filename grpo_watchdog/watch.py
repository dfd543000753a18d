"""Watch: one rule goes inactive -> pending -> firing.

A level fires after `for` consecutive observations and is left after `keep_firing_for` consecutive ones below it (with
hysteresis, where the rule has it). A missing metric neither starts nor ends anything: absent is not healthy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from grpo_watchdog.detectors import Reading, detector
from grpo_watchdog.rule import Rule


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
        age: how long ago the trouble began, as far as the detector can tell [observations].
        alone: whether nothing corroborates it where something must: it then asks for nothing.
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
    age: int = 0
    alone: bool = False


class Watch:
    """The state of one rule."""

    __slots__ = (
        "active",
        "age",
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
        self.age = 0  # observations since it began to hold, or since the detector says that it began
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
            self.since, self.age = step, 0
        self.age = max(self.age + 1, reading.back) if self.active else reading.back
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
            return old._replace(rank=self.held, severity=severity, value=reading.value, age=self.age)
        worst = reading.value
        if old is not None and not abs(worst) > abs(old.worst) and worst == worst:  # noqa: PLR0124 - NaN is worst
            worst = old.worst
        return Finding(self.rule_id, severity, self.held, since, step, reading.metric, reading.value, worst,
                       reading.limit, reading.note, age=self.age)  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON-able values."""
        return {
            "over": list(self.over), "below": list(self.below), "held": self.held, "active": self.active,
            "since": self.since, "finding": None if self.finding is None else list(self.finding),
            "missing": self.missing, "seen": self.seen, "settled": self.settled, "detector": self.detector.state_dict(),
            "age": self.age,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self.over, self.below, self.held = list(state["over"]), list(state["below"]), state["held"]
        self.active, self.since, self.age = state["active"], state["since"], state["age"]
        self.missing, self.seen, self.settled = state["missing"], state["seen"], state["settled"]
        self.finding = None if state["finding"] is None else Finding(*state["finding"])
        self.loud = self.finding is not None and self.finding.severity != "notice"
        self.detector.load_state_dict(state["detector"])
