"""Rulebooks: what to look for, how bad it is, what to do. One YAML page each; no code, no other file but `extends`.

A rulebook is named by a word (`documented`, shipped in `rules/`) or by a path. `extends` builds on a shipped
one or on a file in the same folder: mappings are merged key by key, everything else is replaced, and a rule
or cause set to null is left out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator

from grpo_watchdog import pages
from grpo_watchdog.actions import ACTIONS, KNOB_ACTIONS
from grpo_watchdog.causes import Cause
from grpo_watchdog.detectors import AnyRule
from grpo_watchdog.errors import ConfigurationError, Problem, RulebookError
from grpo_watchdog.faults import problems_of, references, sentence
from grpo_watchdog.pages import shipped
from grpo_watchdog.rule import Doses, Model, Number, Positive, Text, no_such
from grpo_watchdog.scalars import shown
from grpo_watchdog.yaml_source import Places

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

__all__ = ["Base", "Cause", "Policy", "Rulebook", "from_json", "load", "shipped"]

Id = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
Count = Annotated[int, Field(ge=0, le=1_000_000)]


class VetoPolicy(Model):
    """Which optimizer steps are skipped before they land. A gradient that is not finite always is.

    Attributes:
        factor: a gradient norm this many times the run's own median is absurd.
        most: absurd steps that are skipped within 64 before the next is let through: the run may have changed.
    """

    factor: Annotated[Number, Field(ge=10)] = 1000.0
    most: Annotated[int, Field(ge=1, le=1000)] = 3


class Policy(Model):
    """When to act and when to let go. All counts are observations, not the trainer's step numbers.

    Attributes:
        on_divergence: "rollback" (and go on with doses) or "halt" at a finding that asks for a rollback.
        targets: "absolute" takes the documented targets as they stand; "scaled" takes their ratio to `base`
            and applies it to what this run started with.
        checkpoint_every: observations between checkpoints; 0 takes none by itself.
        probation: healthy observations after which a checkpoint counts as proven.
        keep: how many proven checkpoints are kept.
        rollback_budget: rollbacks after which the run halts for good.
        recur_within: trouble this soon after a rollback goes deeper.
        recover_after: healthy observations after which doses are lifted; doubles each time they had to be given again.
        cooldown: observations for which a dose that was taken back is not given again, unless by a higher level.
        effect_within: observations after which a dose must have shown its effect.
        check_every: observations between looks at the model; 0 looks only when something is critical.
        mode: "act"; "shadow" decides and journals everything and touches nothing; "approve" asks before it acts.
        shadow: rules and actions that only say what they would have done, whatever the mode.
        approve_within: observations for which a question waits for its answer.
        approve_default: what counts as the answer then.
        veto: poisoned optimizer steps that are skipped before they land, or null for none.
        tripwires: whether weights, moments and reference are watched for writes outside the optimizer's steps.
        replay_data: whether a rollback brings the data and the random state back too; false goes on with fresh data.
        ladder: what `escalate` does the first time, and each time that the trouble comes back within `recur_within`.
        harm: rules that show harm: beyond the ladder's first rung only while one of them fires. Trouble that comes back
            and does no harm is reported and lived with. Empty: beyond it in any case.
        rewarm: once healthy for `recover_after`, a limit is loosened by this factor, and again, up to what the run
            started with, where it stays; null lifts it at once.
    """

    on_divergence: Literal["rollback", "halt"] = "rollback"
    targets: Literal["absolute", "scaled"] = "absolute"
    checkpoint_every: Count = 0
    probation: Annotated[int, Field(ge=1, le=1_000_000)] = 20
    keep: Annotated[int, Field(ge=1, le=1000)] = 3
    rollback_budget: Count = 3
    recur_within: Count = 200
    recover_after: Annotated[int, Field(ge=1, le=10_000_000)] = 200
    cooldown: Count = 20
    effect_within: Annotated[int, Field(ge=1, le=10_000)] = 10
    check_every: Count = 50
    mode: Literal["act", "shadow", "approve"] = "act"
    shadow: list[str] = Field(default_factory=list)
    approve_within: Annotated[int, Field(ge=1, le=1_000_000)] = 20
    approve_default: Literal["no", "yes"] = "no"
    veto: VetoPolicy | None = None
    tripwires: bool = False
    replay_data: bool = True
    ladder: Annotated[list[Doses], Field(max_length=16)] = Field(default_factory=list)
    harm: list[str] = Field(default_factory=list)
    rewarm: Annotated[Number, Field(gt=1)] | None = None

    @field_validator("ladder")
    @classmethod
    def _safe(cls, ladder: list[Doses]) -> list[Doses]:
        for rung in ladder:
            if not rung or "escalate" in rung:
                raise ValueError("a rung names what to do, and escalate is what climbs it")
            for name, factor in rung.items():
                action = KNOB_ACTIONS.get(name)
                if action is not None and action.merge(1.0, factor) != factor:
                    word = "at most" if action.safe == "min" else "at least"
                    raise ValueError(f"{name} takes a factor of {word} 1 on a rung, not {factor:g}")
        return ladder


class Base(Model):
    """The settings from which the documented targets step down: what `targets: scaled` divides by."""

    learning_rate: Positive
    kl_coef: Positive
    clip_epsilon: Positive
    grad_norm_limit: Positive = 1.0


class Rulebook(Model):
    """One rulebook, complete: whatever it extends is merged in."""

    schema_version: Annotated[Literal[1], Field(alias="schema")]
    name: str
    title: Text
    source: str
    extends: str | None = None
    base: Base
    policy: Policy = Policy()
    causes: dict[Id, Cause] = Field(default_factory=dict)
    rules: Annotated[dict[Id, AnyRule], Field(min_length=1)]

    @field_validator("rules")
    @classmethod
    def _policy_fits(cls, rules: dict[str, AnyRule], info: ValidationInfo) -> dict[str, AnyRule]:
        policy = info.data.get("policy")
        if policy is None:  # it is wrong by itself
            return rules
        faults = _misfits(policy, rules)
        if faults:
            raise ValueError("; ".join(faults))
        return rules

    def as_json(self) -> str:
        """Return everything that decides, as JSON: what a journal carries. The examples do not decide."""
        return self.model_dump_json(by_alias=True, exclude={"rules": {"__all__": {"examples"}}})

    @property
    def digest(self) -> str:
        """Return a hash of all that decides and is said; neither the order in the file nor how it was built enters."""
        said = json.loads(self.as_json())
        del said["extends"]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]

    def with_policy(self, options: Mapping[str, Any]) -> Rulebook:
        """Return this rulebook with some of its policy set anew.

        Raises:
            ConfigurationError: an option is unknown or cannot be what was given; says what is allowed.
        """
        faults = [no_such("option", name, Policy.model_fields) for name in options if name not in Policy.model_fields]
        try:
            policy = Policy.model_validate(
                {**self.policy.model_dump(), **{k: v for k, v in options.items() if k in Policy.model_fields}}
            )
        except ValidationError as error:
            faults += [_told(fault) for fault in error.errors()]
        else:
            faults += _misfits(policy, self.rules)
        if faults:
            raise ConfigurationError("; ".join(faults)) from None
        return self.model_copy(update={"policy": policy})

    def limit(self, action: str, target: float, base: float, *, scaled: bool) -> float:
        """Return the limit that a documented target means for a run that started with `base`."""
        if not scaled or action not in KNOB_ACTIONS or base == 0:  # nothing can be scaled from 0
            return target
        reference: float = getattr(self.base, KNOB_ACTIONS[action].knob)
        return base * (target / reference)


def load(book: str | Path) -> Rulebook:
    """Return a rulebook by name or path.

    Raises:
        RulebookError: every problem at once, each as file:line:column.
    """
    return _validate(pages.read(book))


def from_json(data: object) -> Rulebook:
    """Return the rulebook that a journal carries.

    Raises:
        RulebookError: it is none.
    """
    places = Places(("<journal>", 1, 1))
    if not isinstance(data, dict):
        raise RulebookError([Problem("<journal>", 1, 1, f"a rulebook is a mapping, not {type(data).__name__}")])
    return _validate(pages.Page(data, places))


def _misfits(policy: Policy, rules: Mapping[str, AnyRule]) -> list[str]:
    """Return what a policy names that is not there, and what rules ask that it has no answer to."""
    known = [*ACTIONS, "veto", *rules]
    faults = [no_such("rule or action", name, known) for name in policy.shadow if name not in known]
    faults += [no_such("rule", name, rules) for name in policy.harm if name not in rules]
    asking = [rule_id for rule_id, rule in rules.items() if any("escalate" in level.do for level in rule.ladder)]
    if asking and not policy.ladder:
        faults.append(f"rule {asking[0]} asks to escalate, and policy.ladder has no rung")
    return faults


def _told(fault: ErrorDetails) -> str:
    """Return what is wrong with an option, in one sentence."""
    place, last = ".".join(map(str, fault["loc"])), str(fault["loc"][-1])
    if fault["type"] == "extra_forbidden":
        what, allowed = ("action", ACTIONS) if place.startswith("ladder") else ("field", VetoPolicy.model_fields)
        return f"{place}: {no_such(what, last, allowed)}"
    return f"{place} is {shown(fault['input'])}: {sentence(fault['msg']).removeprefix('value error, ')}"


def _forget_removed(page: pages.Page) -> None:
    """Drop what still names a rule or cause that a page took out: taking one out is enough said."""
    gone = {"rules": set[str](), "causes": set[str]()}
    for key in page.removed:
        if len(key) == 2 and key[0] in gone:  # noqa: PLR2004 - ("rules", name)
            gone[str(key[0])].add(str(key[1]))
    rules = page.data.get("rules")
    naming = [(field, gone["rules"]) for field in ("inhibits", "corroborated_by", "contradicted_by")]
    for rule in rules.values() if isinstance(rules, dict) else ():
        for field, names in (*naming, ("causes", gone["causes"])):
            if names and isinstance(rule, dict) and isinstance(rule.get(field), list):
                rule[field] = [name for name in rule[field] if name not in names]
    causes = page.data.get("causes")
    for cause in causes.values() if isinstance(causes, dict) else ():
        if gone["rules"] and isinstance(cause, dict) and isinstance(cause.get("evidence"), list):
            cause["evidence"] = [
                e for e in cause["evidence"] if not (isinstance(e, dict) and e.get("rule") in gone["rules"])
            ]


def _validate(page: pages.Page) -> Rulebook:
    _forget_removed(page)
    for field in ("rules", "causes"):  # one order, whatever the file's
        if isinstance(page.data.get(field), dict):
            page.data = {**page.data, field: dict(sorted(page.data[field].items()))}
    problems = [*page.problems, *references(page)]
    try:
        book = Rulebook.model_validate(page.data)
    except ValidationError as error:
        problems += problems_of(error, page, Rulebook.model_json_schema())
    if problems:
        raise RulebookError(list(dict.fromkeys(problems)))
    return book
