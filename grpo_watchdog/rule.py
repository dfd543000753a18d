"""What all rules share: texts in two languages, the levels a rule can reach, and its examples.

The kinds of rule live in `detectors/`, each as a subclass of `Rule` beside the code that evaluates it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Literal, Self, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from typing_extensions import TypedDict  # pydantic itself needs it below Python 3.12

from grpo_watchdog.actions import ACTIONS
from grpo_watchdog.metrics import METRICS
from grpo_watchdog.scalars import shown

Severity = Literal["notice", "warning", "critical"]
SEVERITIES: tuple[str, ...] = ("ok", "notice", "warning", "critical")
RANK: dict[str, int] = {name: rank for rank, name in enumerate(SEVERITIES)}
Number = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0)]


def no_such(what: str, name: str, allowed: Iterable[str]) -> str:
    """Return the sentence for a name that nobody knows: what was given, what was meant, what is allowed."""
    known = list(allowed)
    near = difflib.get_close_matches(name[:60], known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"no {what} is called {name[:60]!r}; {hint}allowed: {', '.join(known) or 'none'}"


def _known(name: str) -> str:
    if name not in METRICS:
        raise ValueError(no_such("metric", name, METRICS))
    return name


MetricName = Annotated[str, AfterValidator(_known), Field(json_schema_extra={"enum": list(METRICS)})]


def _flag(value: object) -> object:
    if value is not True:
        raise ValueError(f"takes true, not {shown(value)}")
    return value


if TYPE_CHECKING:
    Doses: TypeAlias = dict[str, float]
else:
    Flag = Annotated[Literal[True], BeforeValidator(_flag)]
    Doses = TypedDict(
        "Doses",
        {name: Flag if action.takes == "flag" else Positive for name, action in ACTIONS.items()},
        total=False,
    )
    Doses.__pydantic_config__ = ConfigDict(extra="forbid", strict=True)


class Model(BaseModel):
    """Strict about names: a field that nobody knows is a mistake, not a comment."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, defer_build=True)  # keeps the import light


class Text(Model):
    """A sentence in English and in Chinese (the document's language)."""

    en: str
    zh: str


class Level(Model):
    """One severity of a rule, and what is done when it fires.

    Attributes:
        severity: notice, warning or critical.
        do: action name to target; `true` for actions that take none.
        advice: what to set for the next run that no knob can turn.
    """

    severity: Severity
    do: Doses = Field(default_factory=dict)
    advice: Text | None = None


class Example(Model):
    """A test that lives beside its rule: rows go in, the rule's severity after the last row comes out.

    Attributes:
        rows: metric values, one mapping a step.
        repeat: how many times the rows are given in a row.
        expect: the severity of this rule after the last row, or "blind".
        do: the doses that the whole rulebook then asks for, where stated.
    """

    rows: Annotated[list[dict[MetricName, float | None]], Field(min_length=1)]
    repeat: Annotated[int, Field(ge=1, le=1000)] = 1
    expect: Literal["ok", "notice", "warning", "critical", "blind"]
    do: Doses | None = None


class Rule(Model):
    """What every kind of rule has.

    Attributes:
        title: what to call it in a report.
        source: where in the document, or in the readings, it stands.
        for_: observations on which it must hold before it fires: in a row, or of the last `out_of` [observations].
        out_of: the observations that `for` is counted over; none means in a row [observations].
        keep_firing_for: consecutive observations on which it must not hold before it stops [observations].
        inhibits: rules that are this one's symptoms: while this fires, theirs are listed under it.
        corroborated_by: rules of which one must fire too; until then this one is a level milder and asks for nothing.
        contradicted_by: rules of which none may fire; while one does, the same.
        alone: its severity while nothing corroborates it, or something contradicts it; none means a level milder.
        beside: metrics of which one must be given beside its own, or it is blind: its claim rests on them too.
        causes: likely causes, in the document's order.
        switch_on: what to log where the rule is blind.
        examples: its tests.
    """

    kind: str
    title: Text
    source: str
    for_: Annotated[int, Field(alias="for", ge=1, le=100_000)] = 1
    out_of: Annotated[int, Field(ge=2, le=10_000)] | None = None
    keep_firing_for: Annotated[int, Field(ge=1, le=100_000)] = 5
    inhibits: list[str] = Field(default_factory=list)
    corroborated_by: list[str] = Field(default_factory=list)
    contradicted_by: list[str] = Field(default_factory=list)
    alone: Severity | None = None
    beside: list[MetricName] = Field(default_factory=list)
    causes: list[str] = Field(default_factory=list)
    switch_on: Text | None = None
    examples: list[Example] = Field(default_factory=list)

    @model_validator(mode="after")
    def _room_for_all(self) -> Self:
        if self.out_of is not None and self.out_of < self.for_:
            raise ValueError(f"out_of must not be below for, and {self.out_of} is below {self.for_}")
        return self

    @property
    def ladder(self) -> tuple[Level, ...]:
        """Return the levels this rule can reach, mildest first."""
        raise NotImplementedError

    @property
    def in_a_row(self) -> int:
        """Return for how many observations in a row its detector's reading must stand before it fires."""
        return self.for_ if self.out_of is None else 1  # what is counted over a window, the detector counts


class SingleRule(Rule):
    """A rule that either holds or does not.

    Attributes:
        severity: what it is when it holds.
        do: what is done then.
        advice: what to set for the next run that no knob can turn.
    """

    severity: Severity
    do: Doses = Field(default_factory=dict)
    advice: Text | None = None

    @property
    def ladder(self) -> tuple[Level, ...]:
        """Return the one level."""
        return (Level(severity=self.severity, do=self.do, advice=self.advice),)
