"""Reports: verdict first, incidents with evidence, causes and what was done, then what could not be seen."""

from __future__ import annotations

import gc
import json
import string
from pathlib import Path

import pytest

import grpo_watchdog as gw
from fakes import HEALTHY, FakeControls
from grpo_watchdog.reports.words import WORDS

INCIDENT = {
    "loss": 171551552.0,
    "policy_loss": 171531792.0,
    "kl_penalty": 197562.5312,
    "mean_ratio": 485165216.0,
    "mean_advantage": 0.0,
    "mean_log_prob_current": -833610.3125,
    "mean_log_prob_ref": -1031172.875,
    "mean_reward": 0.4971,
    "std_reward": 0.1766,
}


@pytest.fixture
def incident(tmp_path: Path) -> Path:
    with gw.Watchdog("documented", FakeControls(), tmp_path / "run", checkpoint_every=50) as dog:
        assert dog.observe(1200, INCIDENT).halt
    return tmp_path / "run"


def test_the_incident_reads_as_one_trouble_with_its_way_out(incident: Path) -> None:
    text = gw.report(incident)
    assert text.startswith("Run report: CRITICAL\n")
    assert text.count("Incident ") == 1
    for part in (
        "halted at step 1200: log_ratio 197563 against 20; no checkpoint is proven yet",
        "log_ratio = 197563 (limit 20)",
        "equals exp(20)",
        "Learning rate too high",
        "Settings for the next run: learning_rate 1e-07 (was 1e-05), kl_coef 2 (was 0.1)",
        "No checkpoint is proven: start again with the settings above.",
        "0.707",
    ):
        assert part in " ".join(text.split()), part
    assert "No reward differences" not in text


def test_chinese_reports_say_the_same(incident: Path) -> None:
    text = gw.report(incident, "markdown", "zh")
    assert text.startswith("# 运行报告: 严重")
    assert "降低学习率（最重要）" in text
    assert "learning\\_rate 1e-07（原为 1e-05）" in text


def test_both_languages_have_the_same_sentences_with_the_same_blanks() -> None:
    def blanks(sentence: str) -> set[str]:
        return {name for _, name, _, _ in string.Formatter().parse(sentence) if name}

    assert WORDS["en"].keys() == WORDS["zh"].keys()
    for key, sentence in WORDS["en"].items():
        assert blanks(sentence) == blanks(WORDS["zh"][key]), key


def test_the_json_carries_the_frozen_fields(incident: Path) -> None:
    report = json.loads(gw.report(incident, "json"))
    assert report["schema"] == 1
    assert report["verdict"] == "critical"
    assert [i["severity"] for i in report["incidents"]] == ["critical"]
    assert {"rule", "metric", "step", "value", "limit"} <= report["incidents"][0]["evidence"][0].keys()
    assert {a["action"] for a in report["actions"]} == {"lower_learning_rate", "raise_kl_coef", "halt"}
    for action in report["actions"]:
        assert {"step", "action", "before", "after", "rule", "reason"} <= action.keys()
    assert report["next_settings"] == {"learning_rate": 1e-7, "kl_coef": 2.0}


def test_a_rescued_run_tells_what_was_done_and_whether_it_helped(tmp_path: Path) -> None:
    with gw.Watchdog("documented", FakeControls(), tmp_path / "run", checkpoint_every=10, probation=5) as dog:
        for step in range(60):
            dog.observe(step, {**HEALTHY, "log_ratio": 30.0 if step == 40 else 0.1})
    text = gw.report(tmp_path / "run")
    assert "Rolled back 1 time(s): 40 -> 30." in text
    assert "since step 40; over at step 41" in text
    assert "it helped" not in text  # what the rollback did is not credited to the doses
    assert "In force at the end: learning_rate 1e-07, kl_coef 2." in text


def test_doses_are_told_with_whether_they_helped(tmp_path: Path) -> None:
    with gw.Watchdog("documented", FakeControls(), tmp_path / "run") as dog:
        for step in range(30):
            dog.observe(step, {**HEALTHY, "log_ratio": 6.0 if step == 10 else 0.1})
    assert "step 20: raise_kl_coef: |log_ratio| went from 6 to 0.1: it helped" in gw.report(tmp_path / "run")


def test_a_kl_dose_that_was_taken_back_is_not_recommended(tmp_path: Path) -> None:
    with gw.Watchdog("documented", FakeControls(), tmp_path / "run") as dog:
        for step in range(15):
            dog.observe(step, {**HEALTHY, "log_ratio": 6.0 + step / 10})
    settings = json.loads(gw.report(tmp_path / "run", "json"))["next_settings"]
    assert settings == {"learning_rate": 1e-6}


def test_a_run_resumed_under_another_rulebook_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "schema: 1\nname: mine\nextends: documented\nrules:\n  long:\n    kind: outside\n"
        "    title: {en: Too long, zh: 过长}\n"
        "    source: ours\n    metric: completion_length\n    high: 10\n    severity: warning\n"
    )
    with gw.Watchdog("documented", FakeControls(), tmp_path / "run") as dog:
        dog.observe(0, {**HEALTHY, "log_ratio": 6.0})
    with gw.Watchdog(tmp_path / "mine.yaml", FakeControls(), tmp_path / "run", resume=True) as dog:
        dog.observe(1, {**HEALTHY, "completion_length": 20.0})
    for style in ("text", "markdown", "json"):
        assert "Too long" in gw.report(tmp_path / "run", style) or style == "json"
    first, second = gw.read_run(tmp_path / "run").incidents
    assert (first.rule, first.closed, second.rule, second.closed) == ("log_ratio", 0, "long", None)


def test_a_killed_run_knows_its_proven_checkpoints(tmp_path: Path) -> None:
    dog = gw.Watchdog("documented", FakeControls(), tmp_path / "run", checkpoint_every=5, probation=3)
    for step in range(20):
        dog.observe(step, HEALTHY)
    path = tmp_path / "run/journal.jsonl"  # as a kill leaves it: the last state entry and the end are not there
    del dog
    gc.collect()
    path.write_text(
        "".join(line for line in path.read_text().splitlines(keepends=True) if '"kind":"state"' not in line)
    )
    assert gw.read_run(tmp_path / "run").proven == [0, 5, 10, 15][-3:]


def test_what_could_not_be_seen_is_said_with_what_to_switch_on(tmp_path: Path) -> None:
    with gw.Watchdog("documented", run_dir=tmp_path / "run") as dog:
        dog.observe(0, {"loss": 0.1})
    text = gw.report(tmp_path / "run")
    assert "Log-ratio difference: never given (missing: log_ratio)" in text
    assert "mean_log_prob_current and mean_log_prob_ref" in text


def test_a_halt_that_the_loop_ignored_is_called_so(tmp_path: Path) -> None:
    with gw.Watchdog("documented", run_dir=tmp_path / "run") as dog:
        dog.observe(0, {"log_ratio": 40.0})
        dog.observe(1, {"log_ratio": 0.0})
    assert "A halt was asked for at step 0 and the loop went on" in gw.report(tmp_path / "run")


def test_an_empty_run_has_a_report(tmp_path: Path) -> None:
    gw.Watchdog("documented", run_dir=tmp_path / "run").close()
    assert "nothing was observed" in gw.report(tmp_path / "run")


def test_a_run_as_a_data_frame(tmp_path: Path) -> None:
    with gw.Watchdog("documented", run_dir=tmp_path / "run") as dog:
        dog.observe(3, {"loss": 0.25, "mean_reward": float("nan")})
        dog.observe(5, {"loss": 0.5})
    frame = gw.read_run(tmp_path / "run").frame()
    assert frame["step"].tolist() == [3, 5]
    assert frame["loss"].tolist() == [0.25, 0.5]
    assert frame["mean_reward"].isna().all()


@pytest.mark.parametrize(("style", "lang"), [("pdf", "en"), ("text", "fr")])
def test_unknown_formats_and_languages_say_what_is_allowed(tmp_path: Path, style: str, lang: str) -> None:
    with pytest.raises(gw.ConfigurationError, match="allowed: "):
        gw.report(tmp_path, style, lang)


def test_a_trouble_that_grew_out_of_a_warning_says_when_both_began(tmp_path: Path) -> None:
    with gw.Watchdog("documented", run_dir=tmp_path / "run") as dog:
        for step in range(10):
            dog.observe(step, {"kl_penalty": 2.0, "log_ratio": 25.0 if step == 9 else 2.0})
    assert "- since step 9, first signs at step 0; still open at the end" in gw.report(tmp_path / "run")
