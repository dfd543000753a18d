"""Rulebooks: what loads, what does not and what is then said, how one builds on another."""

import contextlib
import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import grpo_watchdog as gw
from grpo_watchdog.rulebook import from_json, shipped
from grpo_watchdog.yaml_source import MAX_BYTES, Source

BAD = Path(__file__).parent / "bad_rules"
DOCUMENTED = gw.load("documented")
PAGE = """
schema: 1
name: mine
title: {en: "Mine", zh: "我的"}
source: "tests"
base: {learning_rate: 1.0e-5, kl_coef: 0.1, clip_epsilon: 0.2}
rules:
  loss:
    kind: outside
    title: {en: "Loss", zh: "损失"}
    source: "tests"
    metric: loss
    low: -10
    high: 10
    severity: warning
"""
CHILD = """
schema: 1
name: child
title: {en: "Child", zh: "子"}
source: "tests"
extends: documented
"""


def write(folder: Path, text: str | bytes, name: str = "book.yaml") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def problems(path: str | Path) -> list[str]:
    """What is said about a rulebook, as `line:column message`."""
    with pytest.raises(gw.RulebookError) as raised:
        gw.load(path)
    assert str(raised.value) == "\n".join(map(str, raised.value.problems))
    assert raised.value.__cause__ is None
    return [f"{p.line}:{p.column} {p.message}" for p in raised.value.problems]


def place_of(text: str, what: str) -> str:
    before = text[: text.index(what)]
    return f"{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))} "


# ── what is wrong, and where ──────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("path", sorted(BAD.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_fault_is_said_at_its_place(path: Path) -> None:
    expected = [line[10:] for line in path.read_text().splitlines() if line.startswith("# expect: ")]
    with pytest.raises(gw.RulebookError) as raised:
        gw.load(path)
    said = [
        f"{'' if p.file == str(path) else Path(p.file).name + ':'}{p.line}:{p.column} {p.message}"
        for p in raised.value.problems
    ]

    assert len(said) == len(expected), said
    assert [(s, e) for s, e in zip(said, expected, strict=True) if not s.startswith(e)] == []
    assert all(re.match(r"[^\n]+\.yaml:\d+:\d+: [^\n]+$", line) for line in str(raised.value).split("\n"))


def test_there_is_a_bad_page_for_every_fault_that_the_issue_names() -> None:
    assert len(list(BAD.glob("*.yaml"))) >= 60


@pytest.mark.parametrize(("content", "said"), [
    (b"", "1:1 a rulebook is a mapping"),
    (b"# only a comment\n", "1:1 a rulebook is a mapping"),
    (b"schema: 1\nname: \xff\n", "2:7 byte 16 is not UTF-8"),
    ("schema: 1".encode("utf-16"), "1:1 byte 0 is not UTF-8"),
    (b"a: " + b"x" * MAX_BYTES, "1:1 too large; a rulebook has at most 1000000 bytes"),
    (b"\x00", "1:1 not YAML"),
    (b"%YAML 3.0\n---\na: 1\n", "1:1 not YAML"),
    (b"[" * 100_000, "1:22 nested more than 20 deep"),
    (b"- " * 100_000, "1:43 nested more than 20 deep"),
])  # fmt: skip
def test_what_is_no_page_at_all(tmp_path: Path, content: bytes, said: str) -> None:
    assert problems(write(tmp_path, content))[0].startswith(said)


def test_a_page_that_cannot_be_opened(tmp_path: Path) -> None:
    assert problems(tmp_path / "none.yaml") == ["1:1 cannot be read: No such file or directory"]
    (tmp_path / "folder.yaml").mkdir()
    assert problems(tmp_path / "folder.yaml") == ["1:1 cannot be read: Is a directory"]
    assert problems("nul\0.yaml")[0].startswith("1:1 cannot be read")
    (said,) = problems("documentd")
    assert said.startswith("1:1 no rulebook is called 'documentd'; did you mean documented? allowed: diagnosis, ")
    assert said.endswith(", or a path ending in .yaml")


def test_a_page_may_not_read_another_folder_through_a_link(tmp_path: Path) -> None:
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    outside.mkdir()
    inside.mkdir()
    write(outside, PAGE, "secret.yaml")
    (inside / "linked.yaml").symlink_to(outside / "secret.yaml")
    text = CHILD.replace("documented", "linked.yaml")
    said = problems(write(inside, text))
    assert said == [
        place_of(text, "linked.yaml") + "extends 'linked.yaml', which is not to be had; allowed: "
        f"{', '.join(shipped())}, or the name of a .yaml file in the same folder"
    ]
    (inside / "near.yaml").symlink_to(write(inside, PAGE, "real.yaml"))
    assert gw.load(write(inside, CHILD.replace("documented", "near.yaml"))).rules.keys() == {"loss"}


def test_a_long_chain_of_pages_ends(tmp_path: Path) -> None:
    write(tmp_path, PAGE, "0.yaml")
    for number in range(1, 12):
        write(tmp_path, CHILD.replace("documented", f"{number - 1}.yaml"), f"{number}.yaml")
    assert gw.load(tmp_path / "8.yaml").rules.keys() == {"loss"}
    assert "extends more than 8 deep" in problems(tmp_path / "9.yaml")[0]


FUZZ = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@FUZZ
@given(st.one_of(st.binary(max_size=200), st.text(max_size=200).map(lambda t: t.encode("utf-8", "surrogatepass"))))
@example(b"a: !!binary x")
@example(b"? ? ? a")
@example(b"&a *a")
@example(b"{a: b}: c")
@example(b"- !<tag:yaml.org,2002:python/name:os.system> x")
@example(b"a: |1\n  b")
@example(b"\xef\xbb\xbfa: 1")
def test_no_bytes_raise_anything_but_a_rulebook_error(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(gw.RulebookError):
        gw.load(write(tmp_path, content))


@FUZZ
@given(st.text(max_size=60))
def test_no_name_raises_anything_but_a_rulebook_error(name: str) -> None:
    if name not in shipped():
        with pytest.raises(gw.RulebookError):
            gw.load(name)


@FUZZ
@given(st.data())
def test_no_damage_to_a_good_page_raises_anything_but_a_rulebook_error(tmp_path: Path, data: st.DataObject) -> None:
    lines = PAGE.split("\n")
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(lines) - 1))
        cut = data.draw(st.integers(0, len(lines[at])))
        junk = data.draw(
            st.sampled_from([":", "- ", "{", "]", "null", "[1]", "{a: 1}", "'", "\t", "&x ", "!y ", "9", ""])
        )
        lines[at] = lines[at][:cut] + junk + lines[at][data.draw(st.integers(cut, len(lines[at]))) :]
    with contextlib.suppress(gw.RulebookError):
        gw.load(write(tmp_path, "\n".join(lines)))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
        ["schema", "name", "rules", "causes", "kind", "loss", "inhibits", "evidence", "band", "do", "title"]
    ), inner, max_size=4), max_leaves=12,
)  # fmt: skip


@FUZZ
@given(JSON)
def test_no_json_raises_anything_but_a_rulebook_error(data: Any) -> None:  # noqa: ANN401
    with pytest.raises(gw.RulebookError):
        from_json(data)


@FUZZ
@given(JSON)
def test_no_json_in_the_place_of_a_rule_or_cause_raises_anything_else(data: Any) -> None:  # noqa: ANN401
    whole = json.loads(DOCUMENTED.as_json())
    whole["rules"]["loss"] = data
    whole["causes"]["missing_limits"] = data
    with pytest.raises(gw.RulebookError):
        from_json(whole)


# ── YAML 1.2 ──────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(("written", "read"), [
    ("1e-6", 1e-6), ("1.0e-6", 1e-6), ("1E-6", 1e-6), ("1.e-6", 1e-6), ("+1", 1), ("-1", -1), (".5", 0.5), ("5.", 5.0),
    ("0x10", 16), ("0o17", 15), ("010", 10), ("1e400", math.inf), (".inf", math.inf), ("-.INF", -math.inf),
    ("9" * 30, int("9" * 30)), ("9" * 500, math.inf), ("true", True), ("False", False), ("null", None), ("~", None),
    ("", None), ("on", "on"), ("yes", "yes"), ("NO", "NO"), ("y", "y"), ("1_000", "1_000"), ("NaN", "NaN"),
    ("inf", "inf"), ("12:30", "12:30"), ("2001-01-01", "2001-01-01"), ("1e", "1e"), ("'1'", "1"), ('"true"', "true"),
    ("0b1", "0b1"), ("+", "+"), (".", "."), ("==", "=="),
])  # fmt: skip
def test_plain_words_are_what_yaml_1_2_says(tmp_path: Path, written: str, read: object) -> None:
    data = Source(write(tmp_path, f"a: {written}\n")).data
    assert data == {"a": read}
    assert type(data["a"]) is type(read)


def test_not_a_number_is_dot_nan_only(tmp_path: Path) -> None:
    assert math.isnan(Source(write(tmp_path, "a: .nan\n")).data["a"])


# ── extends ───────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_child_overrides_a_field_and_keeps_the_others(tmp_path: Path) -> None:
    book = gw.load(write(tmp_path, CHILD + "rules:\n  loss:\n    high: 25\npolicy: {keep: 7}\n"))
    rule = book.rules["loss"]
    assert rule.kind == "outside"
    assert (rule.low, rule.high) == (-10, 25)
    assert (book.name, book.policy.keep, book.policy.on_divergence) == ("child", 7, "rollback")
    assert book.rules.keys() == DOCUMENTED.rules.keys()


def test_a_child_removes_by_null_and_adds(tmp_path: Path) -> None:
    page = CHILD + (
        "rules:\n  mean_reward: null\n  zero_advantage: null\n  collapse: {inhibits: null}\n  loss: {low: null}\n"
        "  kl: {kind: outside, title: {en: KL, zh: KL}, source: tests, metric: kl, high: 3, severity: notice}\n"
        "  nonfinite:\n    inhibits: [saturation]\npolicy: null\n"
    )
    book = gw.load(write(tmp_path, page))
    assert book.rules.keys() == {*DOCUMENTED.rules, "kl"} - {"mean_reward", "zero_advantage"}
    assert book.rules["loss"].kind == "outside"
    assert book.rules["loss"].low is None
    assert book.policy == gw.Policy()


def test_removing_a_rule_or_a_cause_takes_it_out_of_all_that_names_it(tmp_path: Path) -> None:
    book = gw.load(
        write(tmp_path, CHILD + "rules:\n  kl_penalty: null\n  saturation: null\ncauses: {missing_limits: null}\n")
    )
    assert not {"kl_penalty", "saturation"} & {name for rule in book.rules.values() for name in rule.inhibits}
    assert "missing_limits" not in {name for rule in book.rules.values() for name in rule.causes}
    assert "kl_penalty" in DOCUMENTED.rules["log_ratio"].inhibits


def test_the_place_of_a_fault_is_in_the_file_where_it_stands(tmp_path: Path) -> None:
    parent = write(tmp_path, PAGE.replace("high: 10", "high: ten"), "parent.yaml")
    text = CHILD.replace("documented", "parent.yaml") + "rules:\n  loss:\n    low: eleven\n"
    child = write(tmp_path, text)
    with pytest.raises(gw.RulebookError) as raised:
        gw.load(child)
    assert {(p.file, f"{p.line}:{p.column} ") for p in raised.value.problems} == {
        (str(child), place_of(text, "eleven")),
        (str(parent), place_of(parent.read_text(), "ten\n")),
    }


def test_a_null_that_removes_nothing_is_said(tmp_path: Path) -> None:
    text = CHILD + "rules:\n  mean_ration: null\n"
    assert problems(write(tmp_path, text)) == [
        place_of(text, "null")
        + "rules.mean_ration: null leaves out what an extended rulebook has, and there is no such thing"
    ]


def test_a_list_is_replaced_whole_and_its_places_with_it(tmp_path: Path) -> None:
    text = CHILD + "rules:\n  log_ratio:\n    bands:\n      - {from: 3, severity: dire}\n"
    assert problems(write(tmp_path, text)) == [
        place_of(text, "dire")
        + "rules.log_ratio.bands.0.severity: should be 'notice', 'warning' or 'critical', not 'dire'"
    ]


# ── digest, order, JSON ───────────────────────────────────────────────────────────────────────────────────────────
def shuffled(node: Any, rng: random.Random) -> Any:  # noqa: ANN401
    if isinstance(node, dict):
        names = list(node)
        rng.shuffle(names)
        return {name: shuffled(node[name], rng) for name in names}
    return [shuffled(child, rng) for child in node] if isinstance(node, list) else node


@given(st.randoms(use_true_random=False))
@settings(max_examples=20)
def test_the_order_of_the_file_does_not_enter(rng: random.Random) -> None:
    book = from_json(shuffled(json.loads(DOCUMENTED.as_json()), rng))
    assert book.digest == DOCUMENTED.digest
    assert list(book.rules) == list(DOCUMENTED.rules)


def test_the_digest_is_of_what_is_said_and_not_of_how(tmp_path: Path) -> None:
    plain = gw.load(write(tmp_path, PAGE, "plain.yaml"))
    commented = gw.load(write(tmp_path, "# why\n" + PAGE.replace("-10", "-1.0e1"), "commented.yaml"))
    other = gw.load(write(tmp_path, PAGE.replace("high: 10", "high: 11"), "other.yaml"))
    built = CHILD.replace("documented", "other.yaml") + "rules: {loss: {high: 10}}\n"
    built = built.replace("Child", "Mine").replace("子", "我的").replace("child", "mine")
    extended = gw.load(write(tmp_path, built, "extended.yaml"))
    tested = gw.load(write(tmp_path, PAGE + "    examples: [{rows: [{loss: 1}], expect: ok}]\n", "tested.yaml"))

    assert plain.digest == commented.digest == extended.digest == tested.digest
    assert plain.digest != other.digest
    assert plain.digest != plain.with_policy({"keep": 9}).digest
    assert plain.digest == plain.with_policy({"keep": 9}).with_policy({"keep": plain.policy.keep}).digest


def test_a_journal_carries_everything_but_the_examples() -> None:
    carried = from_json(json.loads(DOCUMENTED.as_json()))
    assert "examples" not in DOCUMENTED.as_json()
    assert carried.digest == DOCUMENTED.digest
    assert carried.as_json() == DOCUMENTED.as_json()


@pytest.mark.parametrize("wrong", [None, [], 3, "nan", {}, {"rules": {"x": "nan"}}])
def test_what_a_journal_carries_is_converted_by_nobody(wrong: object) -> None:
    with pytest.raises(gw.RulebookError, match="<journal>:1:1: "):
        from_json(wrong)
    whole = json.loads(DOCUMENTED.as_json())
    whole["rules"]["loss"]["high"] = "10"
    with pytest.raises(gw.RulebookError, match="should be a valid number, not '10'"):
        from_json(whole)


# ── policy ────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_policy_options_replace_the_rulebooks() -> None:
    book = DOCUMENTED.with_policy({"on_divergence": "halt", "targets": "scaled", "keep": 1})
    assert (book.policy.on_divergence, book.policy.targets, book.policy.keep) == ("halt", "scaled", 1)
    assert book.rules == DOCUMENTED.rules
    assert DOCUMENTED.policy.on_divergence == "rollback"
    assert DOCUMENTED.with_policy({}) == DOCUMENTED


@pytest.mark.parametrize(("options", "said"), [
    ({"on_divergance": "halt"}, "no option is called 'on_divergance'; did you mean on_divergence? allowed: on_"),
    ({"on_divergence": "stop"}, "on_divergence is 'stop': should be 'rollback' or 'halt'"),
    ({"keep": 0}, "keep is 0: should be greater than or equal to 1"),
    ({"keep": "3"}, "keep is '3': should be a valid integer"),
    ({"keep": True}, "keep is True: should be a valid integer"),
    ({"probation": 2.5}, "probation is 2.5: should be a valid integer"),
    ({"shadow": ["reward_drop"]}, "no rule or action is called 'reward_drop'"),
    ({"harm": ["nope"]}, "no rule is called 'nope'; allowed: "),
    ({"ladder": [{"lower_lr": 0.1}]}, "ladder.0.lower_lr: no action is called 'lower_lr'; allowed: rollback"),
    ({"ladder": [{"shrink_clip": 2.0}]}, "ladder is [{'shrink_clip': 2.0}]: shrink_clip takes a factor of at most 1"),
    ({"ladder": [{"escalate": True}]}, "ladder is [{'escalate': True}]: a rung names what to do"),
    ({"veto": {"factor": 2}}, "veto.factor is 2: should be greater than or equal to 10"),
    ({"veto": {"factr": 20}}, "veto.factr: no field is called 'factr'; did you mean factor?"),
    ({"mode": "shado"}, "mode is 'shado': should be 'act', 'shadow' or 'approve'"),
    ({"zzz": 1}, "no option is called 'zzz'; allowed: on_divergence, targets, checkpoint_every,"),
])  # fmt: skip
def test_a_bad_option_says_its_name_what_was_given_and_what_is_allowed(options: dict[str, Any], said: str) -> None:
    for attempt in (lambda: DOCUMENTED.with_policy(options), lambda: gw.Watchdog(DOCUMENTED, **options)):
        call: Callable[[], object] = attempt
        with pytest.raises(gw.ConfigurationError) as raised:
            call()
        assert str(raised.value).startswith(said)


def test_all_bad_options_are_said_at_once() -> None:
    with pytest.raises(gw.ConfigurationError) as raised:
        DOCUMENTED.with_policy({"kep": 1, "keep": 0, "probation": None})
    assert all(word in str(raised.value) for word in ("kep", "keep is 0", "probation is None"))


@pytest.mark.parametrize(("action", "target", "base", "limit"), [
    ("lower_learning_rate", 1e-6, 3e-4, 3e-5), ("lower_learning_rate", 1e-7, 1e-5, 1e-7),
    ("raise_kl_coef", 0.5, 0.04, 0.2), ("raise_kl_coef", 2.0, 0.01, 0.2), ("shrink_clip", 0.1, 0.3, 0.15),
    ("halt", 1.0, 5.0, 1.0),
])  # fmt: skip
def test_a_scaled_limit_is_the_documents_step_from_where_the_run_began(
    action: str, target: float, base: float, limit: float
) -> None:
    assert DOCUMENTED.limit(action, target, base, scaled=True) == pytest.approx(limit)
    assert DOCUMENTED.limit(action, target, base, scaled=False) == target


# ── the JSON schema ───────────────────────────────────────────────────────────────────────────────────────────────
SCHEMA = gw.Rulebook.model_json_schema()


def test_the_schema_is_one_and_enumerates_what_may_be_written() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert {"schema", "name", "title", "source", "base", "rules"} == set(SCHEMA["required"])
    defined = SCHEMA["$defs"]
    assert "for" in defined["OutsideRule"]["properties"]
    assert {"from", "above"} <= defined["Band"]["properties"].keys()
    assert defined["OutsideRule"]["properties"]["metric"]["enum"] == list(gw.METRICS)
    assert defined["NonfiniteRule"]["properties"]["metrics"]["items"]["enum"] == list(gw.METRICS)
    assert {"lower_learning_rate", "rollback", "halt"} <= defined["Doses"]["properties"].keys()
    assert "for_" not in json.dumps(SCHEMA)


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_rulebook_is_valid_by_the_schema(name: str) -> None:
    page = Source(Path(__file__).parent.parent / "rules" / f"{name}.yaml").data
    if "extends" not in page:
        jsonschema.validate(page, SCHEMA)
    whole: dict[str, Any] = json.loads(gw.load(name).as_json())
    jsonschema.validate({k: v for k, v in whole.items() if v is not None}, SCHEMA)


@pytest.mark.parametrize("name", [
    "misspelt_field", "unknown_metric", "unknown_action", "string_number", "true_for_a_number", "for_is_a_word",
    "negative_target", "wrong_schema", "unknown_kind", "missing_field", "number_for_a_flag", "base_is_zero",
])  # fmt: skip
def test_an_editor_with_the_schema_finds_the_faults_that_a_schema_can_find(name: str) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(Source(BAD / f"{name}.yaml").data, SCHEMA)


def test_a_yaml_bomb_is_one_line(tmp_path: Path) -> None:
    lines = [
        "a: &a [x, x]",
        *(f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 9)}]" for n in range(9)),
    ]
    path = tmp_path / "bomb.yaml"
    path.write_text("\n".join(lines))
    with pytest.raises(gw.RulebookError) as raised:
        gw.load(str(path))
    assert (
        str(raised.value)
        == f"{path}:1:4: anchors and aliases are not allowed; write it out; there are more than 20 of them"
    )
