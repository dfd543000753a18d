"""Watch: one rule goes inactive -> pending -> firing.

A level fires after `for` consecutive observations and is left after `keep_firing_for` consecutive ones below it (with
hysteresis, where the rule has it). A missing metric neither starts nor ends anything: absent is not healthy.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any, NamedTuple

from grpo_watchdog.detectors import Reading, detector
from grpo_watchdog.detectors.detector import Memoryless
from grpo_watchdog.detectors.sleep import Interval, Sleeper
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
        "calm",
        "detector",
        "finding",
        "held",
        "ladder",
        "loud",
        "missing",
        "needs",
        "needs_all",
        "over",
        "read",
        "rule",
        "rule_id",
        "seen",
        "settled",
        "since",
        "sleeper",
        "watched",
    )

    def __init__(self, rule_id: str, rule: Rule) -> None:
        """Start inactive."""
        self.rule_id, self.rule = rule_id, rule
        self.detector = detector(rule)
        self.read = self.detector.read
        self.sleeper = self.detector if isinstance(self.detector, Sleeper) else None
        told = (self.detector.quiet or self.detector.steady) if isinstance(self.detector, Memoryless) else None
        self.watched = () if told is None else (told[0],)  # the metric by which one without a memory sleeps
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
        self.calm = False  # it sees, and nothing fires or begins to

    def update(self, values: Mapping[str, float], step: int) -> bool:
        """Look at one step; return whether the finding changed in rank."""
        return self.take(self.read(values, firing=self.held > 0) if self.able(values) else None, step)

    def able(self, values: Mapping[str, float]) -> bool:
        """Return whether it can see by these metrics."""
        given = self.needs
        beside = self.rule.beside
        if beside and not any(map(values.__contains__, beside)):
            return False
        return all(map(values.__contains__, given)) if self.needs_all else not given.isdisjoint(values)

    def miss(self, observations: int) -> None:
        """Count observations on which it could not see."""
        if observations:
            self.missing += observations
            self.calm = False

    def take(self, reading: Reading | None, step: int) -> bool:
        """Learn what the detector saw; return whether the finding changed in rank."""
        if reading is None:
            self.miss(1)
            return False
        self.seen, self.missing = True, 0
        rank = reading.rank
        if not rank and not self.active:
            self.calm = True
            return False
        if self.settled and rank == self.held == reading.sticky:
            return False
        changed = self._advance(reading, step)
        self.settled = rank == self.held == reading.sticky and rank > 0 and not self.loud and not any(self.below[:rank])
        return changed

    def columns(self, given: Container[str]) -> tuple[str, ...]:
        """Return the metrics on whose values it depends whether it may sleep; none where it never does."""
        return self.watched if self.sleeper is None else self.sleeper.columns(given)

    def sleep(self) -> tuple[Interval, ...] | None:
        """Return, by column, the closed interval within which the next value changes nothing, where there is one."""
        if self.missing or not self.seen:
            return None
        if self.sleeper is not None:
            return None if self.active else self.sleeper.sleep()
        told = self.detector.steady if self.settled else None if self.active else self.detector.quiet
        return None if told is None else (told[1:],)

    def _advance(self, reading: Reading, step: int) -> bool:
        before, rule = self.held, self.rule
        for level in range(len(self.over)):
            self.over[level] = self.over[level] + 1 if reading.rank > level else 0
            self.below[level] = self.below[level] + 1 if reading.sticky <= level else 0
            if self.over[level] >= rule.in_a_row:
                self.held = max(self.held, level + 1)
        while self.held and self.below[self.held - 1] >= rule.keep_firing_for:
            self.held -= 1
        if reading.rank and self.since is None:
            self.since, self.age = step, 0
        self.age = max(self.age + 1, reading.back) if self.active else reading.back
        self.active = self.held > 0 or reading.rank > 0
        self.calm = not self.active
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
        self.calm = self.seen and not self.missing and not self.active
        self.finding = None if state["finding"] is None else Finding(*state["finding"])
        self.loud = self.finding is not None and self.finding.severity != "notice"
        self.detector.load_state_dict(state["detector"])
