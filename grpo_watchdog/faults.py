"""Faults: what is wrong with a rulebook, in words that say what is allowed, each at its place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from grpo_watchdog.detectors import KINDS
from grpo_watchdog.errors import Problem
from grpo_watchdog.pages import Page
from grpo_watchdog.rule import no_such
from grpo_watchdog.scalars import shown
from grpo_watchdog.yaml_source import Key

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic_core import ErrorDetails


def problems_of(error: ValidationError, page: Page, schema: dict[str, Any]) -> list[Problem]:
    """Return what pydantic found, each with its place."""
    found = [_problem(fault, page, schema) for fault in error.errors(include_url=False)]
    return [problem for problem in found if problem is not None]


def references(page: Page) -> list[Problem]:
    """Return what names a rule or cause that is not there, and circles of inhibition.

    Looks at raw data, so that these are said beside whatever else is wrong.
    """
    problems: list[Problem] = []
    rules, causes = _mappings(page.data.get("rules")), _mappings(page.data.get("causes"))

    def want(what: str, name: object, known: Mapping[str, Any], key: Key) -> None:
        if isinstance(name, str) and name not in known:
            stem = ".".join(map(str, key[:2]))
            problems.append(Problem(*page.places.value(key), f"{stem}: {no_such(what, name, known)}"))

    naming = [(field, "rule", rules) for field in ("inhibits", "corroborated_by", "contradicted_by")]
    for rule_id, rule in rules.items():
        for field, what, known in (*naming, ("causes", "cause", causes)):
            for index, name in enumerate(_list(rule, field)):
                want(what, name, known, ("rules", rule_id, field, index))
                if field == "inhibits" and rule_id in (way := _inhibited(name, rules)):
                    place = page.places.value(("rules", rule_id, field, index))
                    round_trip = " inhibits ".join((rule_id, *way[: way.index(rule_id) + 1]))
                    problems.append(Problem(*place, f"rules.{rule_id}: a circle: {round_trip}"))
    for cause_id, cause in causes.items():
        for index, evidence in enumerate(_list(cause, "evidence")):
            if isinstance(evidence, dict):
                want("rule", evidence.get("rule"), rules, ("causes", cause_id, "evidence", index, "rule"))
    return problems


def sentence(message: str) -> str:
    """Return pydantic's message as the second half of one of ours."""
    return f"{message[0].lower()}{message[1:]}".removeprefix("input ")


def _problem(fault: ErrorDetails, page: Page, schema: dict[str, Any]) -> Problem | None:
    """Return a fault with its place, in words; None where a problem of the page itself is behind it."""
    loc, kind = fault["loc"], fault["type"]
    path = loc[:2] + loc[3:] if loc[0] == "rules" else loc  # the third part names the kind of the rule
    key, found = _key(path, page.data)
    if any(key[: len(spoiled)] == spoiled for spoiled in page.spoiled):
        return None
    name, place = ".".join(map(str, key)) or "rulebook", page.places.value(key)
    last, given = str(loc[-1]), fault["input"]
    tail = "" if isinstance(given, dict | list) else f", not {shown(given)}"
    match kind:
        case "missing":
            message = f"{last} is missing"
        case "union_tag_not_found":
            message = f"kind is missing; allowed: {', '.join(KINDS)}"
        case "union_tag_invalid":
            name, place = f"{name}.kind", page.places.value((*key, "kind"))
            message = no_such("kind", str(found["kind"]), KINDS)
        case "extra_forbidden":
            place = page.places.word(key)
            allowed = _fields_at(schema, loc[:-1])
            name = ".".join(map(str, key[:-1])) or "rulebook"
            actions = key[-2:-1] == ("do",) or key[:2] == ("policy", "ladder")
            message = no_such("action" if actions else "field", last, allowed)
        case "value_error":
            message = str(fault["ctx"]["error"])
        case "model_type" | "model_attributes_type" | "dict_type" if given is not None:
            message = f"should be a mapping{tail}"
        case _ if given is None and key[:1] in (("rules",), ("causes",)) and len(key) == 2:  # noqa: PLR2004
            message = "null leaves out what an extended rulebook has, and there is no such thing"
        case _:
            message = sentence(fault["msg"]) + tail
    if last == "[key]":
        place = page.places.word(key)
    return Problem(*place, f"{name}: {message}")


def _key(path: tuple[str | int, ...], data: Any) -> tuple[Key, Any]:  # noqa: ANN401
    """Return the part of a location that is a path into the data, and what stands there."""
    key: list[str | int] = []
    for part in path:
        there = part in data if isinstance(data, dict) else isinstance(data, list) and part in range(len(data))
        if not there:
            break
        data = data[part]
        key.append(part)
    return tuple(key), data


def _fields_at(schema: dict[str, Any], location: tuple[str | int, ...]) -> list[str]:
    """Return the fields that a JSON schema allows at a place, given as pydantic gives it."""
    node = schema
    for part in (*location, None):
        options = [node, *node.get("anyOf", ())]
        node = next((o for o in options if "$ref" in o or "properties" in o or "items" in o), node)
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
        if part is None:
            break
        if "discriminator" in node:
            node = {"$ref": node["discriminator"]["mapping"][part]}
        elif part in node.get("properties", {}):
            node = node["properties"][part]
        elif isinstance(part, int):
            node = node.get("items", {})
        else:
            node = node.get("additionalProperties") or next(iter(node.get("patternProperties", {}).values()), {})
    return list(node.get("properties", {}))


def _mappings(value: object) -> dict[str, dict[str, Any]]:
    return {k: v for k, v in value.items() if isinstance(v, dict)} if isinstance(value, dict) else {}


def _list(owner: Mapping[str, Any], name: str) -> list[Any]:
    value = owner.get(name)
    return value if isinstance(value, list) else []


def _inhibited(name: object, rules: Mapping[str, Any]) -> list[str]:
    """Return a rule and everything that it inhibits, directly or through others, nearest first."""
    found: list[str] = []
    todo = [name]
    while todo:
        rule_id = todo.pop(0)
        if isinstance(rule_id, str) and rule_id in rules and rule_id not in found:
            found.append(rule_id)
            todo.extend(_list(rules[rule_id], "inhibits"))
    return found
