"""Causes: what may be behind an incident, what speaks for it or against it, and what to do about it next time."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from grpo_watchdog.rule import MetricName, Model, Number, Positive, Text

_Setting = Literal["learning_rate", "kl_coef", "clip_epsilon"]


class Evidence(Model):
    """What speaks for a cause when it holds, and against it when it does not. Exactly one of the three.

    Attributes:
        check: a model check that failed.
        rule: another rule that fires.
        metric: a metric (with `above` or `below`); knobs are metrics too.
    """

    check: str | None = None
    rule: str | None = None
    metric: MetricName | None = None
    above: Number | None = None
    below: Number | None = None

    @model_validator(mode="after")
    def _one(self) -> Evidence:
        if sum(x is not None for x in (self.check, self.rule, self.metric)) != 1:
            raise ValueError("evidence is exactly one of check, rule and metric")
        if self.metric is not None and (self.above is None) == (self.below is None):
            raise ValueError("a metric needs exactly one of above and below")
        return self


class Cause(Model):
    """A likely cause, and what to do about it next time.

    Attributes:
        title: what to call it.
        remedy: what to do about it.
        evidence: what speaks for or against it.
        next_: by setting, the factor on what this run had that the next one should begin with.
    """

    title: Text
    remedy: Text
    evidence: list[Evidence] = Field(default_factory=list)
    next_: dict[_Setting, Positive] = Field(default_factory=dict, alias="next")
