"""What all rules share: texts in two languages, the levels a rule can reach, and its examples.

The kinds of rule live in `detectors/`, each as a subclass of `Rule` beside the code that evaluates it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, field_validator

from grpo_watchdog.actions import ACTIONS
from grpo_watchdog.metrics import METRICS

Severity = Literal["notice", "warning", "critical"]
SEVERITIES: tuple[str, ...] = ("ok", "notice", "warning", "critical")
RANK: dict[str, int] = {name: rank for rank, name in enumerate(SEVERITIES)}
Number = Annotated[float, Field(allow_inf_nan=False)]


class Model(BaseModel):
    """Strict about names: a field that nobody knows is a mistake, not a comment."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, strict=True)


class Text(Model):
    """A sentence in English and in Chinese (the document's language)."""

    en: str
    zh: str


def _known(name: str) -> str:
    if name not in METRICS:
        raise ValueError(f"no metric is called {name!r}; allowed: {', '.join(METRICS)}")
    return name


def _doses(do: dict[str, Any]) -> dict[str, Any]:
    for name, value in do.items():
        if name not in ACTIONS:
            raise ValueError(f"no action is called {name!r}; allowed: {', '.join(ACTIONS)}")
        flag = isinstance(value, bool)
        if ACTIONS[name].takes == "flag" and value is not True:
            raise ValueError(f"{name} takes true, not {value!r}")
        if ACTIONS[name].takes == "number" and (flag or value <= 0):
            raise ValueError(f"{name} takes a number above 0, not {value!r}")
    return do


class Level(Model):
    """One severity of a rule, and what is done when it fires.

    Attributes:
        severity: notice, warning or critical.
        do: action name to target; `true` for actions that take none.
    """

    severity: Severity
    do: dict[str, StrictBool | Number] = {}

    _check_do = field_validator("do")(_doses)


class Example(Model):
    """A test that lives beside its rule: rows go in, the rule's severity after the last row comes out.

    Attributes:
        rows: metric values, one mapping a step.
        repeat: how many times the rows are given in a row.
        expect: the severity of this rule after the last row, or "blind".
        do: the doses that the whole rulebook then asks for, where stated.
    """

    rows: Annotated[list[dict[str, float | None]], Field(min_length=1)]
    repeat: Annotated[int, Field(ge=1, le=1000)] = 1
    expect: Literal["ok", "notice", "warning", "critical", "blind"]
    do: dict[str, StrictBool | Number] | None = None

    @field_validator("rows")
    @classmethod
    def _metrics(cls, rows: list[dict[str, float | None]]) -> list[dict[str, float | None]]:
        for row in rows:
            for name in row:
                _known(name)
        return rows


class Rule(Model):
    """What every kind of rule has.

    Attributes:
        title: what to call it in a report.
        source: where in the document, or in the readings, it stands.
        for_: consecutive observations on which it must hold before it fires [observations].
        keep_firing_for: consecutive observations on which it must not hold before it stops [observations].
        inhibits: rules that are this one's symptoms: while this fires, theirs are listed under it.
        causes: likely causes, in the document's order.
        examples: its tests.
    """

    kind: str
    title: Text
    source: str
    for_: Annotated[int, Field(alias="for", ge=1, le=100_000)] = 1
    keep_firing_for: Annotated[int, Field(ge=1, le=100_000)] = 5
    inhibits: list[str] = []
    causes: list[str] = []
    switch_on: Text | None = None
    examples: list[Example] = []

    @property
    def ladder(self) -> tuple[Level, ...]:
        """Return the levels this rule can reach, mildest first."""
        raise NotImplementedError


class SingleRule(Rule):
    """A rule that either holds or does not.

    Attributes:
        severity: what it is when it holds.
        do: what is done then.
    """

    severity: Severity
    do: dict[str, StrictBool | Number] = {}

    _check_do = field_validator("do")(_doses)

    @property
    def ladder(self) -> tuple[Level, ...]:
        """Return the one level."""
        return (Level(severity=self.severity, do=self.do),)


MetricName = Annotated[str, Field(json_schema_extra={"enum": list(METRICS)})]
known_metric = _known
