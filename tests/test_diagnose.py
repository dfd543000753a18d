"""Diagnose: the door and the command on logs of every kind of mess, decided from what was known then."""

from __future__ import annotations

import gzip
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grpo_watchdog.cli import main
from grpo_watchdog.diagnosed import as_json, as_markdown, as_text, diagnose
from grpo_watchdog.errors import LogError, RulebookError
from grpo_watchdog.recorded import Recorded
from log_streams import GUARDED, NAN, Rows, Task, at, changed, diagnosed, learning, write

# ── the JSON, as the issue has it ─────────────────────────────────────────────────────────────────────────────────
STEP, STEP_OR_NULL, TEXT = {"type": "integer"}, {"type": ["integer", "null"]}, {"type": "string", "minLength": 1}
NUMBER = {"anyOf": [{"type": "number"}, {"enum": ["NaN", "Infinity", "-Infinity"]}]}
NAMES = {"type": "array", "items": {"type": "string"}}


def record(**fields: Any) -> dict[str, Any]:
    """An object that has these fields at least."""
    return {"type": "object", "properties": fields, "required": sorted(fields)}


def several(what: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "array", "items": what, **more}


EVIDENCE = record(rule=TEXT, metric=TEXT, step=STEP, value=NUMBER, limit={"anyOf": [NUMBER, {"type": "null"}]})
INCIDENT = record(cause=TEXT, severity={"enum": ["notice", "warning", "critical"]}, first_step=STEP,
                  evidence=several(EVIDENCE, minItems=1), advice=NAMES)  # fmt: skip
RUN = record(
    path=TEXT, trainer=TEXT, rows={"type": "integer", "minimum": 1}, first_step=STEP, last_step=STEP,
    verdict={"enum": ["ok", "notice", "warning", "critical"]}, alarm_step=STEP_OR_NULL, critical_step=STEP_OR_NULL,
    incidents=several(INCIDENT), would_act=several(record(step=STEP, action=TEXT, reason=TEXT)),
    blind=several(record(rule=TEXT, missing=NAMES, switch_on={"type": ["string", "null"]})),
)  # fmt: skip
SCHEMA = record(schema={"const": 1}, runs=several(RUN))


def as_schema_1(text: str) -> dict[str, Any]:
    """Parse strictly (a bare NaN is no JSON) and check against the schema."""
    whole: dict[str, Any] = json.loads(text, parse_constant=pytest.fail)
    jsonschema.validate(whole, SCHEMA)
    return whole


def calm() -> Rows:
    return learning(0, Task(rows=40, groups=32, kind="shaped", start=0.5, end=0.5))


def runaway() -> Rows:
    """KL of 6 nats per token from step 21 on."""
    return changed(calm(), 20, kl=6.0)


def one_spike() -> Rows:
    return at(calm(), 20, kl=6.0)


def nan() -> Rows:
    return changed(calm(), 20, loss=NAN, grad_norm=NAN, kl=math.inf)


MADE = {"ok": (calm, 0), "warning": (one_spike, 10), "critical": (runaway, 20), "nan": (nan, 20)}


@pytest.mark.parametrize("name", MADE)
def test_the_json_is_schema_1_and_the_exit_code_the_verdict(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, code = MADE[name]
    path = write(tmp_path / "run.jsonl", make())
    assert main(["diagnose", str(path), "--format", "json"]) == code
    (run,) = as_schema_1(capsys.readouterr().out)["runs"]
    assert run["path"] == str(path)
    assert (run["trainer"], run["rows"], run["first_step"], run["last_step"]) == ("trl", 40, 1, 40)
    assert run["verdict"] == {0: "ok", 10: "warning", 20: "critical"}[code]
    assert (run["alarm_step"] is None) == (code == 0)
    assert (run["critical_step"] is None) == (code < 20)


def test_what_was_seen_what_would_have_been_done_and_what_was_not_seen(tmp_path: Path) -> None:
    whole = as_schema_1(as_json(diagnose(write(tmp_path / "run.jsonl", runaway()), GUARDED)))
    (run,) = whole["runs"]
    assert (run["alarm_step"], run["critical_step"]) == (21, 23)
    worst = max(run["incidents"], key=lambda incident: incident["severity"] == "critical")
    assert worst["first_step"] <= 23
    assert worst["cause"] in GUARDED.causes
    assert worst["advice"]
    root = worst["evidence"][0]
    assert (root["rule"], root["metric"], root["limit"]) == ("kl_runaway", "token_kl", 5.0)
    assert root["value"] == 6.0
    assert {act["action"] for act in run["would_act"]} & {"rollback", "lower_learning_rate", "halt"}
    assert min(act["step"] for act in run["would_act"]) == 23  # nothing is done before there is reason to
    (unseen,) = [blind for blind in run["blind"] if blind["rule"] == "sampler_mismatch"]
    assert unseen["missing"] == ["sampler_mismatch"]
    assert "log_p_trainer" in unseen["switch_on"].replace(" ", "_")


def test_a_setting_that_stays_where_it_is_was_held_and_not_lowered(tmp_path: Path) -> None:
    path = write(tmp_path / "run.jsonl", changed(runaway(), 0, learning_rate=3e-6))
    english, chinese = (as_text(diagnose(path, GUARDED), lang) for lang in ("en", "zh"))
    assert "lower_learning_rate held at 3e-06" in english
    assert "lower_learning_rate 保持在 3e-06" in chinese
    assert "3e-06 -> 3e-06" not in english + chinese


def test_the_setting_to_begin_with_next_time_is_in_numbers_of_this_run(tmp_path: Path) -> None:
    run = json.loads(as_json(diagnose(write(tmp_path / "run.jsonl", runaway()), GUARDED)))["runs"][0]
    begun = calm()[0]["learning_rate"]
    assert 0 < run["next_settings"]["learning_rate"] < begun


def test_not_a_number_is_a_string(tmp_path: Path) -> None:
    (run,) = as_schema_1(as_json(diagnose(write(tmp_path / "run.jsonl", nan()), GUARDED)))["runs"]
    values = {evidence["value"] for incident in run["incidents"] for evidence in incident["evidence"]}
    assert values & {"NaN", "Infinity"}


# ── several runs ──────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_worst_of_several_runs_decides_and_a_table_comes_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(write(tmp_path / f"{name}.jsonl", make())) for name, (make, _) in MADE.items()]
    assert main(["diagnose", *paths]) == 20
    table = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert [line.split()[0] for line in table[1:]] == paths
    assert [line.split()[3] for line in table[1:]] == ["OK", "WARNING", "CRITICAL", "CRITICAL"]
    assert main(["diagnose", *paths[:2], "--format", "markdown"]) == 10
    assert capsys.readouterr().out.startswith("| run | trainer | rows | verdict |")
    assert main(["diagnose", paths[0]]) == 0
    assert not capsys.readouterr().out.startswith("run ")  # one run needs no table


def test_a_folder_is_all_of_its_logs(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    write(tmp_path / "deep" / "er" / "a.jsonl", calm())
    write(tmp_path / "b.jsonl", runaway())
    write(tmp_path / ".hidden" / "c.jsonl", runaway())
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "notes.json").write_text('{"what": "no log"}')
    (tmp_path / "weights.bin").write_bytes(b"\0\1\2")
    found = diagnose(tmp_path, GUARDED)
    assert [run.path for run in found.runs] == [f"{tmp_path}/b.jsonl", f"{tmp_path}/deep/er/a.jsonl"]
    assert [path for path, _ in found.passed_over] == [f"{tmp_path}/notes.json"]
    assert not found.unread
    assert f"{tmp_path}/notes.json" in as_text(found)
    assert f"{tmp_path}/notes.json" in as_markdown(found)


def test_of_a_runs_checkpoints_the_newest_tells_it(tmp_path: Path) -> None:
    for number in (5, 10):
        folder = tmp_path / "out" / f"checkpoint-{number}"
        folder.mkdir(parents=True)
        history = [{"step": step, **row} for step, row in enumerate(calm()[:number], start=1)]
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": number, "log_history": history}))
    (run,) = diagnose(tmp_path, GUARDED).runs
    assert run.story.rows == 10
    assert run.formats == ["trainer_state"]


def test_a_column_of_runs_is_several_runs(tmp_path: Path) -> None:
    rows = [{"run": name, "step": step, **row} for name, make in (("one", calm), ("two", runaway))
            for step, row in enumerate(make(), start=1)]  # fmt: skip
    mixed = sorted(rows, key=lambda row: int(str(row["step"])))  # as two processes write them
    path = tmp_path / "both.jsonl"
    path.write_text("\n".join(map(json.dumps, mixed)))
    found = diagnose(path, GUARDED)
    assert [(run.path, run.story.rows, run.verdict) for run in found.runs] == [
        (f"{path}#one", 40, "ok"), (f"{path}#two", 40, "critical"),
    ]  # fmt: skip
    alone = diagnosed(tmp_path, runaway())
    assert (found.runs[1].alarm_step, found.runs[1].critical_step) == (alone.alarm_step, alone.critical_step)


# ── restarts ──────────────────────────────────────────────────────────────────────────────────────────────────────
def numbered(path: Path, parts: Sequence[tuple[int, Rows]]) -> Path:
    """Write parts of a log, each with the step at which it begins."""
    lines = [json.dumps({"step": step, **row}) for first, rows in parts for step, row in enumerate(rows, start=first)]
    path.write_text("\n".join(lines))
    return path


def test_steps_that_go_back_are_one_run_that_resumed(tmp_path: Path) -> None:
    path = numbered(tmp_path / "run.jsonl", [(1, calm()), (31, calm()[30:]), (41, runaway()[20:])])
    (run,) = diagnose(path, GUARDED).runs
    assert run.story.rows == 70
    assert (run.story.first_step, run.story.last_step) == (1, 60)
    assert (run.alarm_step, run.critical_step) == (41, 43)
    assert any("goes back from step 40 to 31: resumed" in notice for notice in run.notices)


def test_steps_that_are_back_at_the_start_are_another_run(tmp_path: Path) -> None:
    path = numbered(tmp_path / "run.jsonl", [(1, runaway()), (1, calm()), (1, calm()[:30])])
    runs = diagnose(path, GUARDED).runs
    assert [run.story.rows for run in runs] == [40, 40, 30]
    assert [run.verdict for run in runs] == ["critical", "ok", "ok"]
    assert len({run.path for run in runs}) == 3


def test_what_came_before_a_restart_is_no_baseline_of_the_next_run(tmp_path: Path) -> None:
    """The rewards of the second begin where the first had not been for long: no crash."""
    good = [{**row, "reward": 0.9 + row["reward"] / 100, "reward_std": 0.01} for row in calm()]
    bad = [{**row, "reward": row["reward"] / 100, "reward_std": 0.01} for row in calm()]
    first, second = diagnose(numbered(tmp_path / "run.jsonl", [(1, good), (1, bad[:20])]), GUARDED).runs
    assert (first.verdict, second.verdict) == ("ok", "ok")
    (whole,) = diagnose(numbered(tmp_path / "run.jsonl", [(1, good), (41, bad[:20])]), GUARDED).runs
    assert whole.verdict == "critical"


def test_a_step_given_twice_is_two_rows(tmp_path: Path) -> None:
    rows = learning(0, Task(rows=80, groups=32, kind="shaped"))
    lines = [json.dumps({"step": place // 2 + 1, **row}) for place, row in enumerate(rows)]
    (tmp_path / "run.jsonl").write_text("\n".join(lines))
    (run,) = diagnose(tmp_path / "run.jsonl", GUARDED).runs
    assert (run.story.rows, run.story.last_step) == (80, 40)


# ── the command's options ─────────────────────────────────────────────────────────────────────────────────────────
def test_rows_without_steps_are_counted_in_steps_per_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text("\n".join(map(json.dumps, runaway())))
    assert main(["diagnose", str(path), "--format", "json", "--steps-per-row", "5"]) == 20
    (run,) = as_schema_1(capsys.readouterr().out)["runs"]
    assert [run[name] for name in ("rows", "first_step", "last_step", "alarm_step", "critical_step")] == [
        40, 5, 200, 105, 115,
    ]  # fmt: skip
    for wrong in ("0", "-1", "many"):
        with pytest.raises(SystemExit) as caught:
            main(["diagnose", str(path), "--steps-per-row", wrong])
        assert caught.value.code == 2


def test_the_trainer_is_told_by_its_keys_or_by_the_user(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "run.jsonl", [{"actor/kl_loss": 0.01, "critic/score/mean": 0.5, "actor/pg_loss": 0.0}] * 5)
    assert diagnose(path, GUARDED).runs[0].trainer == "verl"
    (run,) = diagnose(path, GUARDED, trainer="openrlhf").runs
    assert run.trainer == "openrlhf"
    with pytest.raises(LogError, match=r"no trainer is called 'verll'; did you mean verl\?"):
        diagnose(path, GUARDED, trainer="verll")
    with pytest.raises(SystemExit) as caught:
        main(["diagnose", str(path), "--trainer", "verll"])
    assert caught.value.code == 2
    assert "verl" in capsys.readouterr().err


def test_unknown_keys_are_listed_and_looked_at_by_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = changed(calm(), 0, my__own__thing=NAN)
    path = write(tmp_path / "run.jsonl", rows)
    assert main(["diagnose", str(path)]) == 0
    assert "my/own/thing" in capsys.readouterr().out
    (run,) = diagnose(path, GUARDED).runs
    assert run.unknown == ["my/own/thing"]


@pytest.mark.parametrize("style", ["text", "markdown", "json"])
def test_a_report_is_told_in_chinese_too(style: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "run.jsonl", runaway())
    assert main(["diagnose", str(path), "--format", style, "--lang", "zh"]) == 20
    chinese = capsys.readouterr().out
    assert main(["diagnose", str(path), "--format", style]) == 20
    english = capsys.readouterr().out
    assert GUARDED.causes["learning_rate_too_high"].remedy.zh in chinese
    assert GUARDED.causes["learning_rate_too_high"].remedy.zh not in english
    if style == "json":
        as_schema_1(chinese)
        assert [run["verdict"] for run in json.loads(chinese)["runs"]] == ["critical"]
    else:
        assert "严重" in chinese


def test_the_report_goes_to_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, there = write(tmp_path / "run.jsonl", runaway()), tmp_path / "report.json"
    assert main(["diagnose", str(path), "--format", "json", "--output", str(there)]) == 20
    assert capsys.readouterr().out == ""
    as_schema_1(there.read_text(encoding="utf-8"))
    assert main(["diagnose", str(path), "--output", str(tmp_path / "no" / "such" / "folder")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_standard_input_and_gzip_are_read_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = write(tmp_path / "run.jsonl", runaway()).read_bytes()
    (tmp_path / "packed").write_bytes(gzip.compress(plain))  # by content: no ending says so
    told = []
    for given_ in ("packed", plain, gzip.compress(plain)):
        if isinstance(given_, bytes):
            monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given_)))
        source = "-" if isinstance(given_, bytes) else str(tmp_path / given_)
        assert main(["diagnose", source, "--format", "json"]) == 20
        (run,) = as_schema_1(capsys.readouterr().out)["runs"]
        told.append({name: run[name] for name in RUN["required"] if name != "path"})
    assert told[0] == told[1] == told[2]


# ── what cannot be read ───────────────────────────────────────────────────────────────────────────────────────────
UNREADABLE: dict[str, bytes] = {
    "empty": b"",
    "words": b"the quick brown fox\n" * 20,
    "noise": bytes(range(256)) * 40,
    "gzip_broken": gzip.compress(b"x" * 1000)[:12],
    "json_without_rows": b'{"a": {"b": "c"}}',
    "nested": b"[" * 100_000,
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_an_unreadable_file_is_one_line_and_exit_1(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    path.write_bytes(UNREADABLE[name])
    assert main(["diagnose", str(path)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith(f"grpo-watchdog: {path}")


def test_a_path_that_does_not_exist_and_a_folder_without_logs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, what in ((tmp_path / "nowhere", "no such file or folder"), (tmp_path, "no log in this folder")):
        assert main(["diagnose", str(path)]) == 1
        err = capsys.readouterr().err
        assert err.startswith(f"grpo-watchdog: {path}: {what}")
        assert err.count("\n") == 1


def test_what_can_be_read_is_told_beside_what_cannot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write(tmp_path / "run.jsonl", runaway())
    (tmp_path / "bad").write_bytes(b"\0\1\2\3")
    assert main(["diagnose", str(tmp_path / "bad"), str(good), "--format", "json"]) == 1
    out, err = capsys.readouterr()
    whole = as_schema_1(out)
    assert [run["verdict"] for run in whole["runs"]] == ["critical"]
    assert [unread["path"] for unread in whole["unread"]] == [str(tmp_path / "bad")]
    assert err.count("\n") == 1


def test_a_torn_last_line_costs_only_itself(tmp_path: Path) -> None:
    path = write(tmp_path / "run.jsonl", runaway())
    path.write_bytes(path.read_bytes()[:-20])
    (run,) = diagnose(path, GUARDED).runs
    assert run.story.rows == 39
    assert run.critical_step == 23
    assert run.notices


def test_a_rulebook_that_cannot_be_used_is_said_by_its_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "run.jsonl", calm())
    with pytest.raises(RulebookError):
        diagnose(path, "guardedd")
    rules = tmp_path / "mine.yaml"
    rules.write_text("schema: 1\nname: mine\nextends: guarded\nrules:\n  loss: {high: ten}\n")
    assert main(["diagnose", str(path), "--rules", str(rules)]) == 1
    assert f"{rules}:5:16: " in capsys.readouterr().err


def test_numbers_whose_sum_is_none_are_told_and_raise_nothing(tmp_path: Path) -> None:
    huge = changed(calm(), 20, loss=-1.7e308, reward=1.7e308, reward_std=1.7e308, kl=1.7e308, grad_norm=1.7e308,
                   entropy=1.7e308, completions__mean_length=1.7e308, frac_reward_zero_std=1.7e308)  # fmt: skip
    assert diagnosed(tmp_path, huge).verdict == "critical"


# ── decided only from the rows up to then ─────────────────────────────────────────────────────────────────────────
def law_of_prefixes(folder: Path, rows: Rows, cut: int) -> list[Recorded]:
    whole, part = diagnosed(folder, rows), diagnosed(folder, rows[:cut])
    for step, early in ((whole.alarm_step, part.alarm_step), (whole.critical_step, part.critical_step)):
        assert early == (step if step is not None and step <= cut else None)
    return [whole, part]


numbers = st.sampled_from([0.0, 0.1, 0.4, 0.9, 1.0, 2.0, 6.0, 50.0, -3.0, 1e-9, 1e6, NAN, math.inf])
keys = ("loss", "reward", "reward_std", "frac_reward_zero_std", "kl", "entropy", "grad_norm", "completions/mean_length",
        "completions/clipped_ratio", "learning_rate")  # fmt: skip
streams = st.lists(st.dictionaries(st.sampled_from(keys), numbers, min_size=1), min_size=1, max_size=40)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(streams, st.data())
def test_the_verdict_on_a_prefix_is_what_it_was_then(tmp_path: Path, rows: Rows, data: st.DataObject) -> None:
    law_of_prefixes(tmp_path, rows, data.draw(st.integers(1, len(rows))))


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10_000), st.integers(1, 90), st.dictionaries(st.sampled_from(keys), numbers), st.integers(1, 100))
def test_the_verdict_on_a_prefix_of_a_run_that_goes_wrong(
    tmp_path: Path, seed: int, wrong: int, values: dict[str, float], cut: int
) -> None:
    rows = learning(seed, Task(rows=100, groups=2))
    law_of_prefixes(tmp_path, [{**row, **values} if place >= wrong else row for place, row in enumerate(rows)], cut)


@pytest.mark.parametrize("name", ["warning", "critical", "nan"])
def test_every_prefix_of_a_sick_run(name: str, tmp_path: Path) -> None:
    rows = MADE[name][0]()
    for cut in range(15, 30):
        whole, part = law_of_prefixes(tmp_path, rows, cut)
        assert [act for act in whole.would_act if act.step <= cut] == part.would_act
