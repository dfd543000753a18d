"""Checkpoints of a trl.GRPOTrainer: transformers' own folders, proven, kept, held against their bytes, started from."""
# ruff: noqa: ANN401 - what a trainer hands over is its own affair

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")
pytest.importorskip("peft")

from transformers import TrainerCallback

from grpo_watchdog.integrations import trainer_controls
from grpo_watchdog.lab.trl_faults import WeightFault
from trl_runs import DOSES, QUICK, On, Watched, loaded, same, toy, watch, watched

SEEN = 12  # where the noise that comes before the step from 11 on is seen
HEAVY = (".safetensors", ".pt", ".pth", ".bin")


def there(folder: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


def proven(folder: Path) -> list[int]:
    return sorted(int(p.parent.parent.name.split("-")[1]) for p in folder.glob("checkpoint-*/grpo_watchdog/proven"))


def sick(folder: Path, **options: Any) -> Watched:
    return watched(folder, callbacks=(WeightFault(SEEN - 1),), **options)


def files(folder: Path) -> dict[str, int]:
    """Return the heavy files of a run by name, and their sizes [bytes]."""
    found = [path for path in folder.rglob("*") if path.suffix in HEAVY]
    return {str(path.relative_to(folder)): path.stat().st_size for path in found}


# --- whose, and how many ------------------------------------------------------------------------


@pytest.mark.parametrize("every", [7, 5])
def test_the_users_own_are_proven_and_never_deleted_and_ours_are_few(tmp_path: Path, every: int) -> None:
    """At every fifth step the user wants what the watchdog wants on the same step."""
    policy = {"keep": 1, "checkpoint_every": 4 if every == 7 else 5}
    run = watched(tmp_path, save_strategy="steps", save_steps=every, max_steps=30, policy=policy)
    run.trainer.train()
    users = {*range(every, 31, every), 30}
    ours = set(there(tmp_path)) - users
    assert users <= set(there(tmp_path))
    asked = {o.step for v in run.verdicts for o in v.actions if o.action == "checkpoint_now"}
    assert len(asked - users) > len(ours) or every == 5
    assert len(ours) <= 2  # the one kept, and one that waits
    assert (len(asked & users) > 2) is (every == 5)
    assert len(proven(tmp_path)) == 1


def test_what_is_proven_outlives_the_users_limit(tmp_path: Path) -> None:
    run = sick(tmp_path, save_strategy="steps", save_steps=1, save_total_limit=1, policy={"keep": 1})
    most = [0]
    run.trainer.add_callback(On("on_save", lambda _: most.append(len(there(tmp_path)))))
    run.trainer.train()
    assert list(run.back()) == [SEEN]
    assert run.trainer.args.save_total_limit == 1
    assert 24 in there(tmp_path)
    assert max(most) <= 5  # the newest, the proven one and those that wait; all 24 without a limit
    assert set(proven(tmp_path)) <= set(there(tmp_path))


def test_nothing_is_written_twice(tmp_path: Path) -> None:
    plain = toy(tmp_path / "plain", max_steps=12, save_strategy="steps", save_steps=6)
    plain.train()
    run = watched(
        tmp_path / "watched", max_steps=12, save_strategy="steps", save_steps=6, policy={"checkpoint_every": 0}
    )
    run.trainer.train()
    extra = {name: size for name, size in files(tmp_path / "watched").items() if "/grpo_watchdog/" in name}
    rest = {name: size for name, size in files(tmp_path / "watched").items() if name not in extra}
    assert rest.keys() == files(tmp_path / "plain").keys()
    assert sum(rest.values()) == pytest.approx(sum(files(tmp_path / "plain").values()), rel=1e-3)
    assert set(extra) == {f"checkpoint-{step}/grpo_watchdog/state.pt" for step in (6, 12)}
    assert sum(extra.values()) < 8000


# --- what is not trusted ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lora", "name"),
    [(False, "model.safetensors"), (False, "optimizer.pt"), (False, "grpo_watchdog/state.pt"), (True, "optimizer.pt"),
     (True, "adapter_model.safetensors")],
)  # fmt: skip
def test_a_flipped_byte_is_noticed_and_the_next_older_one_taken(tmp_path: Path, name: str, *, lora: bool) -> None:
    run = sick(tmp_path, lora=lora, max_steps=14)

    def flip(step: int) -> None:
        if step == SEEN - 1:
            path = tmp_path / "checkpoint-9" / name
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)

    run.trainer.add_callback(On("on_step_begin", flip))
    run.trainer.train()
    assert run.back() == {SEEN: 5}
    reason = next(o.reason for v in run.verdicts for o in v.actions if o.action == "rollback")
    assert f"checkpoint-9: {name} is not what was written" in reason.replace("checkpoint checkpoint", "checkpoint")


class NoSaving(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Keeps the trainer from saving after one step: a disk that is full, say."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        del args
        if state.global_step == self.step:
            control.should_save = False


@pytest.mark.parametrize("stale", [False, True])
def test_one_that_was_asked_for_and_never_written_is_not_gone_back_to(tmp_path: Path, *, stale: bool) -> None:
    """Nor is what an earlier session of the run left under that name."""
    run = sick(tmp_path, max_steps=14)
    run.trainer.add_callback(NoSaving(9))

    def leave(step: int) -> None:
        if stale and step == 9:
            shutil.copytree(tmp_path / "checkpoint-5", tmp_path / "checkpoint-9")

    run.trainer.add_callback(On("on_step_begin", leave))
    run.trainer.train()
    assert run.back() == {SEEN: 5}
    assert 9 not in there(tmp_path) or stale


@pytest.mark.parametrize("same_name", [False, True])
def test_marks_of_an_earlier_run_in_the_folder_count_for_nothing(tmp_path: Path, *, same_name: bool) -> None:
    names = [tmp_path / "1" / "run", tmp_path / "2" / "run"] if same_name else [None, None]
    first = watched(tmp_path, max_steps=12, run_dir=names[0])
    first.trainer.train()
    assert proven(tmp_path) == [1, 5, 9]
    second = watched(tmp_path, max_steps=6, run_dir=names[1], callbacks=(WeightFault(2),))
    second.trainer.train()
    assert second.back() == {}
    assert second.dog.halted
    assert second.trainer.state.global_step == 3
    second.dog.close()
    third = watched(tmp_path, max_steps=6, run_dir=names[1], resume=True)
    assert third.dog.resumed_from is None
    assert proven(tmp_path) == ([] if same_name else [5, 9])  # of the first, which can still be gone on with
    assert there(tmp_path) == [1, 5, 9]  # the second wrote 1 anew, and left it: it was there before


# --- a trainer that is started anew -------------------------------------------------------------


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no trainer put back while it runs, as with several processes."""
    monkeypatch.setattr(trainer_controls, "why_restart", lambda _: "2 processes")


def stopped(folder: Path, **options: Any) -> Watched:
    """Return a run that stopped: 9 is proven, and 11 is newer and not proven."""
    run = sick(folder, save_strategy="steps", save_steps=11, policy={"ladder": [DOSES]}, **options)
    run.trainer.train()  # returns
    assert run.back() == {}
    assert run.trainer.state.global_step == SEEN
    assert there(folder) == [1, 5, 9, 11]
    assert proven(folder) == [1, 5, 9]
    run.dog.close()
    return run


def again(run: Watched, **options: Any) -> tuple[Watched, list[int], list[float]]:
    """Return a new trainer that goes on with the run; the steps that it begins, and the rates inside them."""
    trainer = toy(Path(run.trainer.args.output_dir), max_steps=24, **options)
    resumed = watch(trainer, rules="guarded", run_dir=run.dog.run_dir, resume=True, **QUICK)
    begun, rates = list[int](), list[float]()
    trainer.add_callback(On("on_step_begin", begun.append))
    trainer.optimizer.register_step_pre_hook(lambda *_: rates.append(trainer.optimizer.param_groups[0]["lr"]))
    return resumed, begun, rates


@pytest.mark.usefixtures("anew")
@pytest.mark.parametrize(("lora", "asked"), [(False, {}), (True, {}), (False, {"resume_from_checkpoint": True})])
def test_what_cannot_be_put_back_stops_and_goes_on_from_what_is_proven(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, asked: dict[str, Any], *, lora: bool
) -> None:
    run = stopped(tmp_path, lora=lora)
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert f"from {tmp_path / 'checkpoint-9'}" in line
    assert f"gw.attach(trainer, run_dir={str(run.dog.run_dir)!r}, resume=True); trainer.train()" in line
    (limit,) = (o.after for v in run.verdicts for o in v.actions if o.action == "lower_learning_rate")
    assert limit is not None

    resumed, begun, rates = again(run, lora=lora)
    own: list[float] = []
    resumed.trainer.add_callback(
        On("on_step_begin", lambda _: own.append(resumed.trainer.optimizer.param_groups[0]["lr"]))
    )
    assert resumed.dog.resumed_from == 9
    resumed.trainer.train(**asked)
    assert begun == list(range(9, 24))
    assert max(rates) <= limit * (1 + 1e-6) < max(own)  # the schedule goes on above the ceiling
    assert (resumed.trainer.beta, resumed.trainer.epsilon_low) == pytest.approx((0.12, 0.1))
    assert resumed.back() == {}
    assert not resumed.dog.halted
    assert list(resumed.logged("loss")) == list(range(1, 25))


@pytest.mark.usefixtures("anew")
def test_a_checkpoint_that_the_user_names_is_taken_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    resumed, begun, _ = again(stopped(tmp_path))
    resumed.trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert begun[0] == 5
    assert f"the newest proven checkpoint is {tmp_path / 'checkpoint-9'}" in caplog.text


def test_with_weights_alone_it_is_started_anew_from_weights_alone(tmp_path: Path) -> None:
    run = stopped(tmp_path, save_only_model=True)
    assert not list(tmp_path.glob("checkpoint-*/optimizer.pt"))
    resumed, begun, _ = again(run, save_only_model=True)
    assert resumed.dog.resumed_from == 9
    kept = loaded(tmp_path / "checkpoint-9" / "model.safetensors")
    resumed.trainer.add_callback(
        On("on_step_begin", lambda _: begun.append(-same(dict(resumed.trainer.model.state_dict()), kept)))
    )
    resumed.trainer.train()
    assert begun[:2] == [9, -1]
    assert begun[-1] == 0


@pytest.mark.usefixtures("anew")
def test_a_line_names_no_checkpoint_that_is_damaged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = sick(tmp_path)

    def damage(step: int) -> None:
        if step == SEEN - 1:
            (tmp_path / "checkpoint-9" / "optimizer.pt").write_bytes(b"")

    run.trainer.add_callback(On("on_step_begin", damage))
    run.trainer.train()
    assert f"To go on from {tmp_path / 'checkpoint-5'}," in caplog.text
