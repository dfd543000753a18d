"""A rollback inside a running trl.GRPOTrainer: all is the checkpoint's, and nothing of the sick steps is left."""
# ruff: noqa: ANN401 - what a trainer hands over is its own affair

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("peft")

from trl.trainer.grpo_trainer import GRPOTrainer

from grpo_watchdog.lab.trl_faults import WeightFault
from trl_runs import DOSES, On, loaded, one_prompt, same, toy, watched

SICK = 11  # the noise comes before this step of the optimizer; it is seen when the trainer counts one more
SEEN, GOOD = 12, 9  # then, and where the rollback goes: after an even number of updates samples are due


def weights_of(trainer: Any, *, lora: bool) -> dict[str, torch.Tensor]:
    if not lora:
        return {name: tensor.detach() for name, tensor in trainer.model.state_dict().items()}
    from peft import get_peft_model_state_dict  # noqa: PLC0415 - not where it is skipped

    found: dict[str, torch.Tensor] = get_peft_model_state_dict(trainer.model)
    return found


# --- the state ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("lora", "replay"), [(False, False), (False, True), (True, False)])
def test_right_after_it_everything_is_what_the_files_hold(tmp_path: Path, *, lora: bool, replay: bool) -> None:
    run = watched(tmp_path, lora=lora, max_steps=14, callbacks=(WeightFault(SICK),), policy={"replay_data": replay})
    folder, seen = tmp_path / f"checkpoint-{GOOD}", dict[str, bool]()

    def compare(step: int) -> None:
        if step not in (SEEN - 1, SEEN):
            return
        t = run.trainer
        named = loaded(folder / ("adapter_model.safetensors" if lora else "model.safetensors"))
        rng = loaded(folder / "rng_state.pth")
        seen[f"weights {step}"] = same(weights_of(t, lora=lora), named)
        seen[f"moments {step}"] = same(t.optimizer.state_dict(), loaded(folder / "optimizer.pt"))
        seen[f"schedule {step}"] = same(t.lr_scheduler.state_dict(), loaded(folder / "scheduler.pt"))
        seen[f"random {step}"] = torch.equal(torch.get_rng_state(), rng["cpu"])

    run.trainer.add_callback(On("on_step_end", compare))
    run.trainer.train()
    assert run.back() == {SEEN: GOOD}
    told = {f"{name} {SEEN}": True for name in ("weights", "moments", "schedule")}
    told |= {f"{name} {SEEN - 1}": False for name in ("weights", "moments", "schedule", "random")}
    assert seen == {**told, f"random {SEEN}": replay}


@pytest.mark.parametrize(
    ("lora", "doses"),
    [(False, False), (True, True), *(pytest.param(b, not b, marks=pytest.mark.slow) for b in (False, True))],
)
def test_what_follows_is_the_run_that_transformers_resumes_from_there(
    tmp_path: Path, *, lora: bool, doses: bool
) -> None:
    policy: dict[str, Any] = {"replay_data": True, "ladder": [DOSES] if doses else [{"rollback": True}]}
    run = watched(tmp_path / "a", lora=lora, callbacks=(WeightFault(SICK),), policy=policy)
    rates = rates_of(one_prompt(run.trainer))
    run.trainer.train()
    assert run.back() == {SEEN: GOOD}

    resumed = one_prompt(toy(tmp_path / "b", lora=lora, max_steps=24))
    if doses:
        resumed.beta, resumed.epsilon_low, resumed.epsilon_high = 3 * 0.04, 0.5 * 0.2, 0.5 * 0.2
        give_rates(resumed, rates[SEEN:])
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{GOOD}"))
    ours, theirs = (
        [row["loss"] for row in trainer.state.log_history if "loss" in row and row["step"] > last]
        for trainer, last in ((run.trainer, SEEN), (resumed, GOOD))
    )
    assert len(set(ours)) == 24 - SEEN
    assert ours == theirs[: len(ours)]


def rates_of(trainer: Any) -> list[float]:
    """Return the rates in force inside each step of the optimizer, filled while it trains."""
    rates: list[float] = []
    trainer.optimizer.register_step_pre_hook(lambda *_: rates.append(trainer.optimizer.param_groups[0]["lr"]))
    return rates


def give_rates(trainer: Any, rates: list[float]) -> None:
    """Have a trainer's optimizer use these rates, whatever its schedule says and goes on to say."""
    left, own = iter(rates), list[float]()

    def write(rate: float) -> None:
        for group in trainer.optimizer.param_groups:
            group["lr"] = rate

    def give(_: int) -> None:
        own.append(trainer.optimizer.param_groups[0]["lr"])
        write(next(left, own[-1]))

    trainer.add_callback(On("on_pre_optimizer_step", give))
    trainer.add_callback(On("on_optimizer_step", lambda _: write(own[-1])))


def test_doses_are_in_force_on_the_very_next_step(tmp_path: Path) -> None:
    run = watched(tmp_path, callbacks=(WeightFault(SICK),), policy={"ladder": [DOSES]})
    rates = rates_of(run.trainer)
    turned: dict[int, tuple[float, float]] = {}
    run.trainer.add_callback(
        On("on_step_begin", lambda step: turned.update({step: (run.trainer.beta, run.trainer.epsilon_low)}))
    )
    run.trainer.train()
    assert run.back() == {SEEN: GOOD}
    limit = next(o.after for v in run.verdicts for o in v.actions if o.action == "lower_learning_rate")
    assert limit is not None
    assert max(rates[SEEN:]) <= limit * (1 + 1e-6) < min(rates[4:SEEN])
    assert turned[SEEN - 1] == (0.04, 0.2)
    assert turned[SEEN] == pytest.approx((0.12, 0.1))


def test_doses_of_an_earlier_rollback_stay_in_force_through_a_later_one(tmp_path: Path) -> None:
    run = watched(
        tmp_path,
        callbacks=(WeightFault(SICK), WeightFault(19)),
        policy={"ladder": [DOSES, {"rollback": True}], "harm": []},
    )
    rates = rates_of(run.trainer)
    turned: dict[int, tuple[float, float]] = {}
    run.trainer.add_callback(
        On("on_step_begin", lambda step: turned.update({step: (run.trainer.beta, run.trainer.epsilon_low)}))
    )
    run.trainer.train()
    assert list(run.back()) == [SEEN, 20]
    limit = next(o.after for v in run.verdicts for o in v.actions if o.action == "lower_learning_rate")
    assert limit is not None
    assert max(rates[SEEN:]) <= limit * (1 + 1e-6)
    assert turned[20] == pytest.approx((0.12, 0.1))


# --- what is left of the sick steps -------------------------------------------------------------


def test_the_count_goes_on_and_so_does_the_log_and_nothing_is_written_twice(tmp_path: Path) -> None:
    written: dict[str, int] = {}
    begun: list[int] = []

    def look(step: int) -> None:
        begun.append(step)
        for path in tmp_path.glob("checkpoint-*/model.safetensors"):
            assert written.setdefault(path.parent.name, path.stat().st_mtime_ns) == path.stat().st_mtime_ns

    run = watched(tmp_path, callbacks=(WeightFault(SICK),), policy={"keep": 100})
    run.trainer.add_callback(On("on_step_begin", look))
    run.trainer.train()
    assert run.back() == {SEEN: GOOD}
    assert begun == list(range(24))
    assert list(run.logged("loss")) == list(range(1, 25))
    assert {f"checkpoint-{step}" for step in (1, 5, 9, 16, 20)} == set(written)


class LostLoss(GRPOTrainer):  # type: ignore[misc, unused-ignore]
    """Its loss is NaN on some steps, and so are its gradients."""

    lost: tuple[int, ...] = ()

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        loss = super()._compute_loss(model, inputs)  # type: ignore[no-untyped-call, unused-ignore]
        return loss * math.nan if self.state.global_step in self.lost else loss


@pytest.mark.parametrize(
    ("lost", "logging_steps", "back"), [((11,), 1, False), ((11,), 5, False), ((10, 11, 12, 13, 14), 5, True)]
)
def test_a_lost_loss_does_not_stay_in_the_log(
    tmp_path: Path, lost: tuple[int, ...], logging_steps: int, *, back: bool
) -> None:
    """One step is vetoed; five in a row are rolled back. The trainer adds losses up to their mean over the run."""
    run = watched(tmp_path, trainer_class=LostLoss, logging_steps=logging_steps, policy={"recur_within": 2})
    run.trainer.lost = lost
    told = run.trainer.train()
    assert bool(run.back()) is back
    assert any(o.action == "veto" for v in run.verdicts for o in v.actions)
    assert math.isfinite(told.training_loss)
    assert all(math.isfinite(loss) for step, loss in run.logged("loss").items() if step > 15)


@pytest.mark.parametrize("vetoed", [False, True])
def test_the_mean_in_the_log_is_of_the_steps_that_count(tmp_path: Path, *, vetoed: bool) -> None:
    """With logging every 10 steps: after a rollback, or a step whose loss was lost, the rest is averaged."""
    losses: dict[int, float] = {}

    class Noted(LostLoss):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)  # type: ignore[no-untyped-call, unused-ignore]
            losses[self.state.global_step + 1] = float(loss)
            return loss

    fault = () if vetoed else (WeightFault(SICK),)
    run = watched(tmp_path, trainer_class=Noted, logging_steps=10, max_steps=20, callbacks=fault)
    run.trainer.lost = (SICK,) if vetoed else ()
    run.trainer.train()
    assert bool(run.back()) is not vetoed
    rest = [losses[step] for step in range(13, 21)]
    rest += [losses[SEEN - 1]] if vetoed else []
    assert run.logged("loss")[20] == pytest.approx(sum(rest) / (10 if vetoed else 8))


def test_metrics_of_the_sick_steps_are_in_no_row(tmp_path: Path) -> None:
    rewards: dict[int, float] = {}

    class Noted(GRPOTrainer):  # type: ignore[misc, unused-ignore]
        def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
            found = super()._calculate_rewards(*args, **kwargs)
            rewards[self.state.global_step] = float(found.mean())
            return found

    run = watched(tmp_path, trainer_class=Noted, logging_steps=10, max_steps=20, callbacks=(WeightFault(SICK),))
    run.trainer.train()
    assert run.back() == {SEEN: GOOD}
    fresh = [rewards[step] for step in (12, 14, 16, 18)]  # each batch of samples serves two updates
    assert run.logged("reward")[20] == pytest.approx(sum(fresh) / 4)
    assert rewards[10] != pytest.approx(sum(fresh) / 4)


@pytest.mark.parametrize(
    ("config", "due"),
    [
        ({"num_iterations": 2, "steps_per_generation": 1}, {8, 10, 11, 12, 14, 16}),
        ({"num_iterations": 1, "steps_per_generation": 4}, {8, 11, 12, 16}),
        ({"num_iterations": 2, "steps_per_generation": 4}, {8, 11, 16}),
    ],
)
def test_samples_of_the_sick_policy_are_not_trained_on(tmp_path: Path, config: dict[str, Any], due: set[int]) -> None:
    drawn: list[int] = []

    class Noted(GRPOTrainer):  # type: ignore[misc, unused-ignore]
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            drawn.append(self.state.global_step)
            return super()._generate_and_score_completions(inputs)

    run = watched(tmp_path, trainer_class=Noted, max_steps=18, callbacks=(WeightFault(10),), **config)
    run.trainer.train()
    assert run.back() == {11: 5}  # the next is not proven yet
    assert {step for step in drawn if step >= 8} == due


def test_vllm_is_given_the_restored_weights(tmp_path: Path) -> None:
    run = watched(tmp_path, max_steps=14, callbacks=(WeightFault(SICK),))
    marks: dict[int, int] = {}
    own = vars(run.trainer)
    own["_last_loaded_step"] = SEEN  # the engine holds what the sick step left
    run.trainer.add_callback(
        On("on_step_end", lambda step: marks.update({step: vars(run.trainer)["_last_loaded_step"]}))
    )
    run.trainer.train()
    assert [marks[SEEN - 1], marks[SEEN]] == [SEEN, -1]


def test_a_sick_step_is_not_saved_although_it_is_due(tmp_path: Path) -> None:
    run = watched(tmp_path, callbacks=(WeightFault(SICK),), save_strategy="steps", save_steps=6)
    run.trainer.train()
    assert run.back() == {SEEN: 6}  # the user's own serves as well
    there = {int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*")}
    assert {6, 18, 24} <= there
    assert SEEN not in there


def test_a_reference_that_moves_goes_back_too(tmp_path: Path) -> None:
    run = watched(tmp_path, max_steps=14, callbacks=(WeightFault(SICK),), sync_ref_model=True, ref_model_sync_steps=3)
    seen: dict[int, dict[str, torch.Tensor]] = {}
    run.trainer.add_callback(
        On(
            "on_step_end",
            lambda step: seen.update(
                {step: {name: tensor.clone() for name, tensor in run.trainer.ref_model.state_dict().items()}}
            ),
        )
    )
    run.trainer.train()
    assert run.back() == {SEEN: GOOD}
    assert not same(seen[GOOD], seen[GOOD - 1])
    assert same(seen[SEEN], seen[GOOD])
    assert same(seen[SEEN - 1], seen[GOOD])
