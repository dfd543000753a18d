"""Rulebooks on one recorded run, for `benchmarks/recorded.py`: as they are, less a rule, with a threshold moved.

A run is read once and its rows are kept. Nothing is then computed that cannot differ: a rule that never begins to fire
on a run can be left out of it, and a threshold that changes nothing of when its own rule fires changes nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from grpo_watchdog.detectors import AnyRule
from grpo_watchdog.findings import Findings
from grpo_watchdog.logs import opened
from grpo_watchdog.metrics import METRICS, Intake, Step
from grpo_watchdog.names import recognise
from grpo_watchdog.rule import RANK
from grpo_watchdog.rulebook import Rulebook, load

FACTORS = (0.67, 0.8, 1.25, 1.5)
BOOKS = ("guarded", "documented", "llm", "non-finite only")
_PEEK = 64  # rows whose keys tell the trainer, as `recorded` has it
_OUT = frozenset({"from", "above", "at_least", "by", "high", "floor", "sigmas", "spreads", "near", "share",
                  "share_on_top", "least"})  # fmt: skip
_IN = frozenset({"at_most", "left", "to", "chance"})
_SHARES = frozenset({"near", "share", "share_on_top"})


class Call(NamedTuple):
    """What one run was called: the first step of an alarm and of a critical one; infinity for never."""

    alarm: float = math.inf
    critical: float = math.inf


class Threshold(NamedTuple):
    """One number of one rule.

    Attributes:
        rule: the rule's id.
        path: where in the rule it stands.
        value: what it is.
    """

    rule: str
    path: tuple[str | int, ...]
    value: float


@cache
def book(name: str) -> Rulebook:
    """Return a rulebook by the name that the tables give it."""
    if name != "non-finite only":
        return load(name)
    documented = load("documented")
    metrics = [metric.name for metric in METRICS.values() if metric.source != "watchdog"]
    rule = documented.rules["nonfinite"].model_copy(update={"for_": 1, "metrics": metrics})
    return documented.model_copy(update={"name": name, "rules": {"nonfinite": rule}})


@cache
def diagnosis_rules() -> tuple[str, ...]:
    """Return the rules that rules/diagnosis.yaml adds to the documented ones, as `guarded` has them."""
    own = load("diagnosis").rules.keys() - load("documented").rules.keys()
    return tuple(sorted(own & load("guarded").rules.keys()))


def read_steps(path: Path, steps_per_row: int) -> list[Step]:
    """Return the rows of the first run in a log as canonical steps.

    Raises:
        LogError: nothing in it can be read.
    """
    with opened((str(path),)) as log:
        rows = list(log.rows)
    family = recognise(dict.fromkeys(key for row in rows[:_PEEK] for key in row.values))
    intake, steps = Intake(family.ratio_to), list[Step]()
    for row in rows:
        if row.run != rows[0].run:
            continue
        number = row.step
        if number is None:
            number = steps_per_row + (steps[-1].number if steps else 0)
        elif steps and number < steps[-1].number and number <= steps[0].number:
            break  # it begins anew: another run
        if intake.last >= number:
            intake.rewind(number - 1)
        steps.append(intake.read(number, family.canonical(row.values))[0])
    return steps


def call(rules: Rulebook, steps: Sequence[Step]) -> Call:
    """Return what a rulebook calls a run."""
    findings, alarm = Findings(rules), math.inf
    for step in steps:
        found = findings.detect(step)
        if found and RANK[found[0].severity] >= RANK["warning"]:
            alarm = step.number if alarm == math.inf else alarm
            if found[0].severity == "critical":
                return Call(alarm, step.number)
    return Call(alarm)


def fired(rules: Rulebook, steps: Sequence[Step]) -> dict[str, dict[str, int]]:
    """Return, by rule and severity, the first step at which it was found."""
    findings, first = Findings(rules), dict[str, dict[str, int]]()
    for step in steps:
        for finding in findings.detect(step):
            first.setdefault(finding.rule, {}).setdefault(finding.severity, step.number)
    return first


def _trace(rules: Rulebook, name: str, rule: AnyRule, steps: Sequence[Step]) -> list[tuple[int, int]]:
    """Return when one rule, by itself, fires: (row, rank)."""
    findings = Findings(rules.model_copy(update={"rules": {name: rule}}))
    return [(row, found[0].rank) for row, step in enumerate(steps) if (found := findings.detect(step))]


def without(rules: Rulebook, dropped: Iterable[str]) -> Rulebook:
    """Return a rulebook less some rules; what names one of them as its witness then never has it."""
    gone = set(dropped)
    return rules.model_copy(update={"rules": {name: rule for name, rule in rules.rules.items() if name not in gone}})


def ablated(rules: Rulebook, steps: Sequence[Step], found: Iterable[str]) -> dict[str, Call]:
    """Return what the run is called without each of the rules that fired on it."""
    return {name: call(without(rules, [name]), steps) for name in found}


def thresholds(name: str, rule: AnyRule) -> list[Threshold]:
    """Return every number of a rule that something is held against; zeros have no scale, and whole numbers count."""

    def walk(at: Any, path: tuple[str | int, ...]) -> Iterator[Threshold]:  # noqa: ANN401 - whatever a rule holds
        for key, value in at.items() if isinstance(at, dict) else enumerate(at):
            if isinstance(value, dict | list):
                yield from walk(value, (*path, key))
            elif key in _OUT | _IN | {"low"} and isinstance(value, float) and value:
                yield Threshold(name, (*path, key), float(value))

    return list(walk(_fields(rule), ()))


def _fields(rule: AnyRule) -> dict[str, Any]:
    return rule.model_dump(by_alias=True, exclude={"examples"}, exclude_none=True)


def moved(rule: AnyRule, which: Iterable[Threshold], factor: float) -> AnyRule | None:
    """Return a rule with thresholds further out by a factor (nearer, below 1); None where they cannot be that.

    A limit from below is divided by it. A fraction of one half or more is moved by its distance to 1.
    """
    fields = _fields(rule)
    for threshold in which:
        at: Any = fields
        for key in threshold.path[:-1]:
            at = at[key]
        key, value = threshold.path[-1], threshold.value
        metric = at.get("metric", fields.get("metric", ""))
        share = key in _SHARES or (metric in METRICS and METRICS[metric].unit == "fraction" and key in _OUT)
        if key in _IN or (key == "low" and value > 0):
            at[key] = value / factor
        elif share and 0.5 <= value < 1:  # noqa: PLR2004 - one half, as said above
            at[key] = 1 - (1 - value) / factor
        else:
            at[key] = value * factor
    try:
        return type(rule).model_validate(fields)
    except ValidationError:
        return None


def scaled(rules: Rulebook, steps: Sequence[Step], base: Call) -> dict[tuple[Threshold, float], Call]:
    """Return what the run is called with each threshold moved, where that is not what it is called anyway."""
    given, changed = {name for step in steps for name in step.values}, dict[tuple[Threshold, float], Call]()
    for name in diagnosis_rules():
        rule = rules.rules[name]
        if given.isdisjoint(_looks_at(rule)):
            continue
        plain = _trace(rules, name, rule, steps)
        for threshold in thresholds(name, rule):
            for factor in FACTORS:
                other = moved(rule, [threshold], factor)
                if other is None or _trace(rules, name, other, steps) == plain:
                    continue
                result = call(_replaced(rules, {name: other}), steps)
                if result != base:
                    changed[threshold, factor] = result
    return changed


def _looks_at(rule: AnyRule) -> set[str]:
    fields = _fields(rule)
    signs = [sign["metric"] for sign in fields.get("signs", ())]
    return {*signs, *fields.get("metrics", ()), *([fields["metric"]] if "metric" in fields else [])}


def _replaced(rules: Rulebook, others: Mapping[str, AnyRule]) -> Rulebook:
    return rules.model_copy(update={"rules": {**rules.rules, **others}})


@cache
def all_moved(name: str, factor: float) -> Rulebook:
    """Return a rulebook with every threshold of the diagnosis further out by one factor, as far as each can be."""
    rules = book(name)
    others = {n: moved(rules.rules[n], thresholds(n, rules.rules[n]), factor) for n in diagnosis_rules()}
    return _replaced(rules, {n: other for n, other in others.items() if other is not None})
