"""The modes: a shadow touches nothing and says everything; approval waits for a yes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import grpo_watchdog as gw
from fakes import HEALTHY, FakeControls
from grpo_watchdog import journal
from grpo_watchdog.cli import main
from grpo_watchdog.errors import ConfigurationError, RulebookError
from grpo_watchdog.lab.faults import FAULTS, Injection
from grpo_watchdog.lab.training import TASKS, GrpoTraining

SICK = {**HEALTHY, "log_ratio": 25.0}
BANDS = [{**HEALTHY, "log_ratio": size} for size in (6.0, 12.0)]
BASE = {"learning_rate": 1e-5, "kl_coef": 0.1, "clip_epsilon": 0.2}
DOSED = {"learning_rate": 1e-6, "kl_coef": 0.5, "clip_epsilon": 0.2}


class Stage:
    """A fake trainer under the documented rulebook; weights are the number of the last step."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.controls, self.step, self.run_dir = FakeControls(), 0, folder / "run"
        options = {"checkpoint_every": 5, "probation": 3, "check_every": 0, **options}
        self.dog = gw.Watchdog("documented", self.controls, self.run_dir, **options)

    def feed(self, row: Mapping[str, float], times: int = 1) -> list[gw.Verdict]:
        verdicts = []
        for _ in range(times):
            self.controls.weights = float(self.step)
            verdicts.append(self.dog.observe(self.step, row))
            self.step += 1
        return verdicts

    def answer(self, name: str) -> None:
        (self.run_dir / "approve" / name).touch()

    def replays(self) -> bool:
        self.dog.close()
        return gw.replay(self.run_dir).differences == ()

    def entries(self, kind: str) -> list[dict[str, Any]]:
        self.dog.close()
        return [entry for entry in journal.read(self.run_dir) if entry["kind"] == kind]


def acts(verdicts: Iterable[gw.Verdict], held_back: str = "") -> list[str]:
    """What was done, or held back; scheduled checkpoints left out."""
    return [o.action for v in verdicts for o in v.actions if o.held_back == held_back and o.rule != "schedule"]


# --- shadow -------------------------------------------------------------------------------------


def same(first: Any, second: Any) -> bool:  # noqa: ANN401 - any state
    if isinstance(first, torch.Tensor):
        return torch.equal(first.isnan(), second.isnan()) and torch.equal(first.nan_to_num(), second.nan_to_num())
    if isinstance(first, Mapping):
        return first.keys() == second.keys() and all(same(first[name], second[name]) for name in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


STEPS, ONSET = 45, 20


def trained(fault: str, severity: float, run_dir: Path | None, **options: Any) -> tuple[GrpoTraining, Any, list[Any]]:
    """A real training that breaks, and the state of the global random numbers after it."""
    torch.manual_seed(7)
    training = TASKS["tokens"](0)
    befall, verdicts = Injection(FAULTS[fault], severity, ONSET), []
    guard = {"rules": "guarded", "checkpoint_every": 5, "probation": 5, **options}
    dog = None if run_dir is None else training.attach(run_dir, **guard)
    for step in range(STEPS):
        befall.before_step(training, step)
        metrics = training.train_one_step()
        if dog is not None:
            verdicts.append(dog.observe(step, metrics))
    if dog is not None:
        dog.close()
    return training, torch.get_rng_state(), verdicts


@pytest.mark.parametrize(("fault", "severity"), [("lr_up", 60.0), ("weights_corrupted", 1.0), ("nan_gradient", 1.0)])
def test_a_shadow_leaves_a_real_training_as_it_would_be_and_says_what_it_would_have_done(
    tmp_path: Path, fault: str, severity: float
) -> None:
    alone, dice, _ = trained(fault, severity, None)
    watched, same_dice, verdicts = trained(fault, severity, tmp_path / "run", mode="shadow")
    assert same(alone.state_dict(), watched.state_dict())
    assert torch.equal(dice, same_dice)
    assert (alone.config.kl_coef, alone.config.clip_epsilon) == (watched.config.kl_coef, watched.config.clip_epsilon)
    assert not (tmp_path / "run/checkpoints").exists()
    assert not any(v.halt or v.rolled_back_to is not None for v in verdicts)
    would = acts(verdicts, "shadow")
    assert ("veto" if fault == "nan_gradient" else "rollback") in would
    assert all(o.held_back or o.action == "checkpoint_now" for v in verdicts for o in v.actions)
    told = [e["action"] for e in journal.read(tmp_path / "run") if e.get("held_back") == "shadow"]
    assert told == would
    assert "Nothing was touched by" in gw.report(tmp_path / "run", "text", "en")
    assert gw.replay(tmp_path / "run").differences == ()


def test_the_same_training_without_the_shadow_is_touched(tmp_path: Path) -> None:
    alone, _, _ = trained("lr_up", 60.0, None)
    watched, _, verdicts = trained("lr_up", 60.0, tmp_path / "run")
    assert not same(alone.state_dict(), watched.state_dict())
    assert "rollback" in acts(verdicts)


def test_a_shadow_never_halts_and_says_each_thing_once(tmp_path: Path) -> None:
    stage = Stage(tmp_path, mode="shadow", rollback_budget=0)
    stage.feed(HEALTHY, 20)
    verdicts = stage.feed(SICK, 20)
    assert not any(v.halt for v in verdicts)
    assert not stage.dog.halted
    assert sorted(acts(verdicts, "shadow")) == ["halt", "lower_learning_rate", "raise_kl_coef", "rollback"]
    assert stage.controls.settings == BASE
    stage.feed(HEALTHY, 10)
    assert "rollback" in acts(stage.feed(SICK), "shadow")  # it came back: said again
    assert stage.replays()


def test_shadow_of_one_action_leaves_the_others(tmp_path: Path) -> None:
    stage = Stage(tmp_path, shadow=["rollback"])
    stage.feed(HEALTHY, 20)
    verdicts = stage.feed(SICK, 5)
    assert acts(verdicts, "shadow") == ["rollback"]
    assert acts(verdicts) == ["lower_learning_rate", "raise_kl_coef"]
    assert stage.controls.weights == 24.0
    assert not stage.dog.halted
    assert stage.replays()


def test_a_trouble_that_is_half_answered_is_still_a_trouble(tmp_path: Path) -> None:
    stage = Stage(tmp_path, shadow=["lower_learning_rate"], recover_after=6, effect_within=100)
    stage.feed(HEALTHY, 12)
    verdicts = stage.feed(BANDS[0], 20)
    assert acts(verdicts, "shadow") == ["lower_learning_rate"]  # said once
    assert acts(verdicts) == ["raise_kl_coef"]  # given once and not let go while it lasts
    assert stage.controls.settings == {**BASE, "kl_coef": 0.5}
    assert [v.rolled_back_to for v in stage.feed(SICK)] == [5]  # nothing was proven in the trouble
    assert stage.replays()


def test_shadow_of_one_rule_leaves_the_others(tmp_path: Path) -> None:
    stage = Stage(tmp_path, shadow=["log_ratio"])
    stage.feed(HEALTHY, 20)
    verdicts = stage.feed(SICK, 5)
    assert sorted(acts(verdicts, "shadow")) == ["lower_learning_rate", "raise_kl_coef", "rollback"]
    assert acts(verdicts) == []
    poisoned = stage.feed({**SICK, "loss": float("nan")})  # a symptom of the other, which may not answer it
    assert acts(poisoned) == ["rollback", "lower_learning_rate", "raise_kl_coef"]
    assert stage.replays()


def test_a_checkpoint_that_was_only_thought_of_is_nothing_to_roll_back_to(tmp_path: Path) -> None:
    stage = Stage(tmp_path, shadow=["checkpoint_now"])
    verdicts = stage.feed(HEALTHY, 20)
    assert sum(o.action == "checkpoint_now" for v in verdicts for o in v.actions) == 4
    assert not (stage.run_dir / "checkpoints").exists()
    assert stage.feed(SICK)[0].halt
    assert "no checkpoint is proven yet" in stage.dog.halted
    assert stage.replays()


@pytest.mark.parametrize("name", ["rolback", "log_ratoi", ""])
def test_an_unknown_name_in_shadow_is_refused_with_what_is_allowed(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigurationError, match=r"no rule or action.*allowed: .*rollback.*veto.*log_ratio"):
        Stage(tmp_path, shadow=[name])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("given", ["rollback", [1], None])
def test_shadow_is_a_list_of_names(tmp_path: Path, given: Any) -> None:  # noqa: ANN401
    with pytest.raises(ConfigurationError, match="shadow"):
        Stage(tmp_path, shadow=given)


@pytest.mark.parametrize("policy", [{"shadow": ["nobody"]}, {"harm": ["nobody"]}])
def test_an_unknown_name_in_a_rulebooks_policy_is_a_problem_of_the_rulebook(tmp_path: Path, policy: Any) -> None:  # noqa: ANN401
    path = tmp_path / "rules.yaml"
    path.write_text(json.dumps({"extends": "documented", "name": "mine", "policy": policy}))
    with pytest.raises(RulebookError, match=r"no rule .*is called 'nobody'; allowed: .*log_ratio"):
        gw.load(path)


def test_an_unknown_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"mode.*act.*shadow.*approve"):
        Stage(tmp_path, mode="watch")


def test_a_shadow_cannot_resume(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.feed(HEALTHY, 10)
    stage.dog.close()
    with pytest.raises(ConfigurationError, match="shadow"):
        Stage(tmp_path, mode="shadow", resume=True)
    assert Stage(tmp_path, resume=True).dog.resumed_from == 5


# --- approval -----------------------------------------------------------------------------------


class Asked:
    """A callback that answers what it is told to, and keeps what it was asked."""

    def __init__(self, *answers: str) -> None:
        self.answers, self.questions = list(answers), list[dict[str, Any]]()

    def __call__(self, question: Mapping[str, Any]) -> bool | None:
        self.questions.append(json.loads(json.dumps(question)))
        return {"yes": True, "no": False}.get(self.answers.pop(0)) if self.answers else None


def test_a_yes_by_callback_and_the_question_that_it_sees(tmp_path: Path) -> None:
    asked = Asked("yes")
    stage = Stage(tmp_path, mode="approve", approve=asked)
    verdicts = stage.feed(BANDS[0], 3)
    assert acts(verdicts[:1]) == ["lower_learning_rate", "raise_kl_coef"]
    assert stage.controls.settings == DOSED
    question = asked.questions[0]
    assert len(asked.questions) == 1
    assert (question["number"], question["step"], question["within"]) == (1, 0, 20)
    assert [(o["action"], o["target"], o["rule"]) for o in question["orders"]] == [
        ("lower_learning_rate", 1e-6, "log_ratio"),
        ("raise_kl_coef", 0.5, "log_ratio"),
    ]
    assert "log_ratio 6" in question["orders"][0]["reason"]
    assert stage.replays()


def test_no_by_callback_is_final_while_the_rule_fires(tmp_path: Path) -> None:
    asked = Asked("no", "yes")
    stage = Stage(tmp_path, mode="approve", approve=asked)
    verdicts = stage.feed(BANDS[0], 30)
    assert acts(verdicts, "declined") == ["lower_learning_rate", "raise_kl_coef"]
    assert not acts(verdicts)
    assert stage.controls.settings == BASE
    assert len(asked.questions) == 1
    worse = stage.feed(BANDS[1])  # a higher level is another question
    assert acts(worse) == ["lower_learning_rate", "raise_kl_coef", "shrink_clip"]
    assert stage.replays()


def test_what_was_declined_is_asked_again_when_it_comes_back(tmp_path: Path) -> None:
    asked = Asked("no", "yes")
    stage = Stage(tmp_path, mode="approve", approve=asked)
    stage.feed(BANDS[0], 3)
    stage.feed(HEALTHY, 10)
    assert acts(stage.feed(BANDS[0])) == ["lower_learning_rate", "raise_kl_coef"]
    assert stage.replays()


def test_without_an_answer_it_waits_and_asks_the_callback_each_time(tmp_path: Path) -> None:
    asked = Asked("", "", "yes")
    stage = Stage(tmp_path, mode="approve", approve=asked)
    verdicts = stage.feed(BANDS[0], 3)
    assert [len(acts([v])) for v in verdicts] == [0, 0, 2]
    assert [q["number"] for q in asked.questions] == [1, 1, 1]
    assert stage.replays()


def test_an_exception_in_the_callback_is_no_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def broken(question: Mapping[str, Any]) -> bool:
        raise RuntimeError(f"no network for {question['number']}")

    stage = Stage(tmp_path, mode="approve", approve=broken, approve_within=4)
    verdicts = stage.feed(BANDS[0], 8)
    assert "the approve callback failed" in caplog.text
    assert not any("the watchdog failed" in text for v in verdicts for text in v.notices)
    assert acts(verdicts, "declined")
    assert stage.controls.settings == BASE
    assert stage.replays()


@pytest.mark.parametrize(
    ("names", "yes"), [(["0001.yes"], True), (["0001.no"], False), (["0001.yes", "0001.no"], False)], ids=str
)
def test_a_file_is_an_answer_and_two_of_them_are_a_no(tmp_path: Path, names: list[str], *, yes: bool) -> None:
    stage = Stage(tmp_path, mode="approve")
    assert not acts(stage.feed(BANDS[0], 2))
    question = json.loads((stage.run_dir / "approve/0001.json").read_text())
    assert [o["action"] for o in question["orders"]] == ["lower_learning_rate", "raise_kl_coef"]
    for name in names:
        stage.answer(name)
    verdict = stage.feed(BANDS[0])
    assert acts(verdict, "" if yes else "declined") == ["lower_learning_rate", "raise_kl_coef"]
    assert stage.controls.settings == (DOSED if yes else BASE)
    assert stage.replays()


def test_an_answer_that_lies_there_before_the_question_is_none(tmp_path: Path) -> None:
    stage = Stage(tmp_path, mode="approve")
    (stage.run_dir / "approve").mkdir(parents=True)
    stage.answer("0001.yes")
    assert not acts(stage.feed(BANDS[0], 3))


@pytest.mark.parametrize("default", ["yes", "no"])
def test_after_the_deadline_the_default_is_the_answer(tmp_path: Path, default: str) -> None:
    stage = Stage(tmp_path, mode="approve", approve_within=5, approve_default=default)
    verdicts = stage.feed(BANDS[0], 10)
    taken = acts(verdicts, "" if default == "yes" else "declined")
    assert taken == ["lower_learning_rate", "raise_kl_coef"]
    assert [v.step for v in verdicts if v.actions and acts([v], "" if default == "yes" else "declined")] == [5]
    assert stage.controls.settings == (DOSED if default == "yes" else BASE)
    answer = stage.entries("answer")[0]
    assert (answer["yes"], answer["how"]) == (default == "yes", "no answer within 5 observations")
    assert stage.replays()


def test_a_question_is_withdrawn_when_the_trouble_is_over(tmp_path: Path) -> None:
    stage = Stage(tmp_path, mode="approve")
    stage.feed(BANDS[0], 2)
    verdicts = stage.feed(HEALTHY, 8)
    stage.answer("0001.yes")  # too late
    verdicts += stage.feed(HEALTHY, 30)
    assert not acts(verdicts)
    assert not acts(verdicts, "declined")
    assert [(e["yes"], e["how"]) for e in stage.entries("answer")] == [(None, "the trouble is over")]
    assert stage.replays()


def test_a_yes_is_to_what_was_asked_and_not_to_what_came_after(tmp_path: Path) -> None:
    stage = Stage(tmp_path, mode="approve", approve_within=6)
    stage.feed(HEALTHY, 10)
    stage.feed(BANDS[0])
    stage.answer("0001.yes")
    verdict = stage.feed(SICK)  # by now a rollback is wanted: nobody has said yes to that
    assert not acts(verdict)
    assert stage.controls.weights == 11.0
    stage.answer("0002.yes")
    assert stage.feed(SICK)[0].rolled_back_to == 5
    assert [e["how"] for e in stage.entries("answer")] == ["more is asked for", "answered"]
    assert stage.replays()


def test_each_question_has_its_own_deadline(tmp_path: Path) -> None:
    stage = Stage(tmp_path, mode="approve", approve_within=4)
    stage.feed(HEALTHY, 10)
    verdicts = stage.feed(BANDS[0], 3) + stage.feed(SICK, 6)  # asked at 10, and for more at 13
    assert [v.step for v in verdicts if acts([v], "declined")] == [17]


def test_a_rollback_and_a_halt_wait_too_and_a_checkpoint_does_not(tmp_path: Path) -> None:
    stage = Stage(tmp_path, mode="approve", rollback_budget=0)
    assert any(o.action == "checkpoint_now" and o.ok for v in stage.feed(HEALTHY, 12) for o in v.actions)
    assert not stage.feed(SICK, 2)[-1].halt
    stage.answer("0001.yes")
    verdict = stage.feed(SICK)[0]
    assert verdict.halt
    assert verdict.rolled_back_to == 5
    assert stage.replays()


def test_what_a_rule_asks_besides_is_not_lost_while_it_waits(tmp_path: Path) -> None:
    text = {"en": "t", "zh": "t"}
    bands = [{"from": 1.0, "severity": "critical", "do": {"lower_learning_rate": 1e-6, "halt": True}}]
    mine = {"kind": "band", "title": text, "source": "a test", "metric": "step_kl", "bands": bands}
    path = tmp_path / "rules.yaml"
    path.write_text(json.dumps({"extends": "documented", "name": "mine", "rules": {"mine": mine}}))
    dog = gw.Watchdog(path, FakeControls(), tmp_path / "run", mode="approve", approve=Asked("", "", "yes"))
    verdicts = [dog.observe(step, {**HEALTHY, "step_kl": 5.0}) for step in range(3)]
    assert acts(verdicts) == ["lower_learning_rate", "halt"]
    assert verdicts[-1].halt


def test_a_limit_is_let_go_without_asking(tmp_path: Path) -> None:
    stage = Stage(tmp_path, mode="approve", approve=Asked("yes"), recover_after=8)
    stage.feed(BANDS[0])
    assert acts(stage.feed(HEALTHY, 20)) == ["restore_learning_rate", "restore_kl_coef"]
    assert stage.controls.settings == BASE


def test_an_open_question_is_remembered(tmp_path: Path) -> None:
    stage = Stage(tmp_path, mode="approve", approve_within=6)
    stage.feed(HEALTHY, 3)
    stage.feed(BANDS[0], 3)
    state = json.loads(json.dumps(stage.dog.state_dict()))
    asked = Asked("", "yes")
    second = Stage(tmp_path / "second", mode="approve", approve_within=6, approve=asked)
    second.dog.load_state_dict(state)
    assert json.loads(json.dumps(second.dog.state_dict())) == state
    second.step = stage.step
    assert [len(acts([v])) for v in second.feed(BANDS[0], 2)] == [0, 2]
    assert {(q["number"], q["step"]) for q in asked.questions} == {(1, 3)}
    assert second.replays()


# --- the command --------------------------------------------------------------------------------


def test_the_command_shows_the_question_and_answers_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = Stage(tmp_path, mode="approve")
    command = ["approve", str(stage.run_dir)]
    assert main(command) == 0
    assert "nothing waits" in capsys.readouterr().out
    assert main([*command, "yes"]) == 1
    stage.feed(BANDS[0])
    capsys.readouterr()
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "lower_learning_rate 1e-06, raise_kl_coef 0.5?" in shown
    assert "asked at step 0" in shown
    assert not acts(stage.feed(BANDS[0]))
    assert main([*command, "yes"]) == 0
    assert acts(stage.feed(BANDS[0])) == ["lower_learning_rate", "raise_kl_coef"]
    capsys.readouterr()
    assert main([*command, "no"]) == 1
    assert "nothing waits" in capsys.readouterr().out
    assert stage.controls.settings == DOSED
    assert stage.replays()


def test_the_command_says_no(tmp_path: Path) -> None:
    stage = Stage(tmp_path, mode="approve")
    stage.feed(BANDS[0])
    assert main(["approve", str(stage.run_dir), "no"]) == 0
    assert acts(stage.feed(BANDS[0]), "declined")
    assert stage.replays()


def test_a_resumed_run_asks_anew_and_can_be_answered(tmp_path: Path) -> None:
    first = Stage(tmp_path, mode="approve")
    first.feed(HEALTHY, 10)
    for _ in range(2):  # two questions, the second one left open
        first.feed(BANDS[0], 1)
        first.feed(HEALTHY, 8)
    first.feed(BANDS[0])
    first.dog.close()
    second = Stage(tmp_path, mode="approve", resume=True)
    second.step = 40
    assert not acts(second.feed(BANDS[0]))
    assert main(["approve", str(second.run_dir), "yes"]) == 0
    assert acts(second.feed(BANDS[0])) == ["lower_learning_rate", "raise_kl_coef"]
    assert second.replays()


def test_doses_and_declined_orders_of_one_step_replay(tmp_path: Path) -> None:
    stage = Stage(tmp_path, mode="approve", approve=Asked("yes", "no"), recover_after=5, effect_within=3)
    stage.feed(HEALTHY, 6)
    for row in [*BANDS, SICK, *[HEALTHY] * 8, SICK, SICK, *[HEALTHY] * 12, *BANDS]:
        stage.feed(row)
    assert stage.replays()


@pytest.mark.parametrize("lines", [1, 2, 3])
def test_a_run_that_is_killed_while_it_closes_replays(tmp_path: Path, lines: int) -> None:
    stage = Stage(tmp_path)
    for row in (HEALTHY, {"loss": 0.1}):  # what it cannot see changes at the end
        stage.feed(row, 12)
    stage.dog.close()
    path = stage.run_dir / journal.FILE
    whole = path.read_bytes().splitlines(keepends=True)
    assert b'"kind":"blind","step":null' in whole[-3]
    path.write_bytes(b"".join(whole[:-lines]) + whole[-lines][:9])
    assert gw.replay(stage.run_dir).differences == ()
