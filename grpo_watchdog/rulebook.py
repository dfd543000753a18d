"""Rulebooks: what to look for, how bad it is, what to do. One YAML page each; no code, no other file but `extends`.

A rulebook is named by a word (`documented`, shipped in `rules/`) or by a path. `extends` builds on a shipped
one or on a file in the same folder: mappings are merged key by key, everything else is replaced, and a rule
or cause set to null is left out.
"""

from __future__ import annotations

import difflib
import hashlib
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from grpo_watchdog.actions import KNOB_ACTIONS
from grpo_watchdog.detectors import AnyRule
from grpo_watchdog.errors import Problem, RulebookError
from grpo_watchdog.rule import Model, Number, Text
from grpo_watchdog.yaml_source import Key, Source

_PACKAGED = Path(__file__).parent / "rules"
_CHECKOUT = Path(__file__).parent.parent / "rules"
_DEEPEST = 8
Count = Annotated[int, Field(ge=0, le=1_000_000)]


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


class Evidence(Model):
    """What speaks for a cause when it holds, and against it when it does not. Exactly one of the four.

    Attributes:
        check: a model check that failed.
        rule: another rule that fires.
        metric: a metric (with `above` or `below`); knobs are metrics too.
    """

    check: str | None = None
    rule: str | None = None
    metric: str | None = None
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
    """A likely cause, and what to do about it next time."""

    title: Text
    remedy: Text
    evidence: list[Evidence] = []


class Base(Model):
    """The settings from which the documented targets step down: what `targets: scaled` divides by."""

    learning_rate: Annotated[Number, Field(gt=0)]
    kl_coef: Annotated[Number, Field(gt=0)]
    clip_epsilon: Annotated[Number, Field(gt=0)]
    grad_norm_limit: Annotated[Number, Field(gt=0)] = 1.0


class Rulebook(Model):
    """One rulebook, complete: whatever it extends is merged in."""

    schema_version: Annotated[Literal[1], Field(alias="schema")]
    name: str
    title: Text
    source: str
    extends: str | None = None
    base: Base
    policy: Policy = Policy()
    causes: dict[str, Cause] = {}
    rules: Annotated[dict[str, AnyRule], Field(min_length=1)]

    def as_json(self) -> str:
        """Return everything that decides, as JSON: what a journal carries. The examples do not decide."""
        return self.model_dump_json(by_alias=True, exclude={"rules": {"__all__": {"examples"}}})

    @cached_property
    def digest(self) -> str:
        """Return a hash of all that decides; the order of rules in the file does not enter."""
        return hashlib.sha256(self.as_json().encode()).hexdigest()[:16]

    def limit(self, action: str, target: float, base: float, *, scaled: bool) -> float:
        """Return the limit that a documented target means for a run that started with `base`."""
        if not scaled or action not in KNOB_ACTIONS:
            return target
        reference: float = getattr(self.base, KNOB_ACTIONS[action].knob)
        return base * (target / reference)


def load(book: str | Path) -> Rulebook:
    """Return a rulebook by name or path.

    Raises:
        RulebookError: every problem at once, each as file:line:column.
    """
    data, places = _merged(_find(str(book)), depth=0)
    return _validate(data, places)


def from_json(data: dict[str, Any]) -> Rulebook:
    """Return the rulebook that a journal carries."""
    return _validate(data, Places({(): ("<journal>", 1, 1)}))


def shipped() -> list[str]:
    """Return the names of the rulebooks that come with the package."""
    return sorted(path.stem for path in _folder().glob("*.yaml"))


class Places(dict[Key, tuple[str, int, int]]):
    """Path into the merged data to where it stands; falls back to the nearest parent."""

    def of(self, key: Key) -> tuple[str, int, int]:
        """Return the place."""
        while key and key not in self:
            key = key[:-1]
        return self[key]


def _folder() -> Path:
    return _PACKAGED if _PACKAGED.is_dir() else _CHECKOUT


def _find(book: str) -> Path:
    if book.endswith((".yaml", ".yml")) or "/" in book or "\\" in book:
        return Path(book)
    path = _folder() / f"{book}.yaml"
    if not path.is_file():
        near = difflib.get_close_matches(book, shipped(), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        message = f"no rulebook is called {book!r}: shipped are {', '.join(shipped())}, else give a path ending in .yaml{hint}"
        raise RulebookError([Problem(book, 1, 1, message)])
    return path


def _merged(path: Path, depth: int) -> tuple[dict[str, Any], Places]:
    source = Source(path)
    data, places = source.data, Places(source.places)
    if not isinstance(data, dict):
        raise RulebookError([Problem(str(path), 1, 1, "a rulebook is a mapping with schema, name, rules ...")])
    parent = data.get("extends")
    if parent is None:
        return data, places
    where = places.of(("extends",))
    if depth >= _DEEPEST:
        raise RulebookError([Problem(*where, f"extends more than {_DEEPEST} deep: a circle?")])
    below, below_places = _merged(_parent(parent, path, where), depth + 1)
    _overlay(below, below_places, data, places, ())
    return below, below_places


def _parent(parent: object, path: Path, where: tuple[str, int, int]) -> Path:
    if parent in shipped():
        return _folder() / f"{parent}.yaml"
    folder = path.resolve().parent
    if isinstance(parent, str) and parent.endswith((".yaml", ".yml")) and Path(parent).name == parent:
        inside = (folder / parent).resolve()
        if inside.parent == folder and inside.is_file():
            return inside
    allowed = f"{', '.join(shipped())} or the name of a .yaml file in the same folder"
    raise RulebookError([Problem(*where, f"extends {parent!r} is not to be had; allowed: {allowed}")])


def _overlay(below: dict[str, Any], below_places: Places, data: dict[str, Any], places: Places, key: Key) -> None:
    """Lay one mapping over another, in place; null removes."""
    for name, value in data.items():
        at = (*key, name)
        if isinstance(value, dict) and isinstance(below.get(name), dict):
            _overlay(below[name], below_places, value, places, at)
            continue
        if value is None and name in below and key:
            del below[name]
            continue
        below[name] = value
        for path in [p for p in below_places if p[: len(at)] == at]:
            del below_places[path]
        below_places.update({p: place for p, place in places.items() if p[: len(at)] == at})


def _validate(data: dict[str, Any], places: Places) -> Rulebook:
    for field in ("rules", "causes"):  # one order, whatever the file's
        if isinstance(data.get(field), dict):
            data = {**data, field: dict(sorted(data[field].items()))}
    problems: list[Problem] = []
    book: Rulebook | None = None
    try:
        book = Rulebook.model_validate(data)
    except ValidationError as error:
        for fault in error.errors(include_url=False):
            key = _data_key(fault["loc"], data)
            problems.append(Problem(*places.of(key), _message(fault, key)))
    if book is not None:
        problems.extend(_references(book, places))
    if problems or book is None:
        raise RulebookError(list(dict.fromkeys(problems)))
    return book


def _data_key(loc: tuple[str | int, ...], data: Any) -> Key:  # noqa: ANN401
    """Return the part of a pydantic location that is a path into the data (it also names union members)."""
    key: list[str | int] = []
    for part in loc:
        if (isinstance(data, dict) and part in data) or (isinstance(data, list) and isinstance(part, int) and part < len(data)):
            data = data[part]
        else:
            continue
        key.append(part)
    return tuple(key)


def _message(fault: Any, key: Key) -> str:  # noqa: ANN401
    name = ".".join(map(str, key)) or "rulebook"
    last = fault["loc"][-1] if fault["loc"] else ""
    match fault["type"]:
        case "missing":
            return f"{name}: {last} is missing"
        case "extra_forbidden":
            return f"{name}: no such field is known here"
        case "value_error":
            return f"{name}: {fault['ctx']['error']}"
        case _:
            shown = fault["input"]
            tail = "" if isinstance(shown, dict | list) else f", not {shown!r}"
            return f"{name}: {fault['msg'][0].lower()}{fault['msg'][1:]}{tail}"


def _references(book: Rulebook, places: Places) -> list[Problem]:
    """Return what names a rule or cause that is not there, and circles of inhibition."""
    problems: list[Problem] = []

    def want(name: str, known: dict[str, Any], what: str, key: Key) -> None:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; allowed: {', '.join(known) or 'none'}"
            problems.append(
                Problem(*places.of(key), f"{'.'.join(map(str, key[:-1]))}: no {what} is called {name!r}{hint}")
            )

    for rule_id, rule in book.rules.items():
        for index, name in enumerate(rule.inhibits):
            key: Key = ("rules", rule_id, "inhibits", index)
            want(name, book.rules, "rule", key)
            if name in book.rules and rule_id in _inhibited(name, book):
                message = f"rules.{rule_id}: inhibits goes in a circle: {name} inhibits {rule_id}"
                problems.append(Problem(*places.of(key), message))
        for index, name in enumerate(rule.causes):
            want(name, book.causes, "cause", ("rules", rule_id, "causes", index))
    for cause_id, cause in book.causes.items():
        for index, evidence in enumerate(cause.evidence):
            if evidence.rule is not None:
                want(evidence.rule, book.rules, "rule", ("causes", cause_id, "evidence", index, "rule"))
    return problems


def _inhibited(rule_id: str, book: Rulebook) -> set[str]:
    """Return a rule and everything that it inhibits, directly or through others."""
    found, todo = set[str](), [rule_id]
    while todo:
        name = todo.pop()
        if name not in found and name in book.rules:
            found.add(name)
            todo.extend(book.rules[name].inhibits)
    return found
