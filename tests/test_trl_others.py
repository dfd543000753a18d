"""Trainers that are not GRPO, the callback, two processes, and what attach refuses."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

trl: Any = pytest.importorskip("trl")
datasets: Any = pytest.importorskip("datasets")

import torch  # noqa: E402
import transformers  # noqa: E402

import grpo_watchdog as gw  # noqa: E402
from grpo_watchdog.lab.trl_toy import WeightFault, repeat_reward, toy_trainer  # noqa: E402

STEPS, SICK_AT = 40, 30
SETTINGS: dict[str, Any] = {
    "max_steps": STEPS,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "per_device_train_batch_size": 8,
    "learning_rate": 5e-4,
    "dataloader_pin_memory": False,
    "logging_steps": 1,
    "activation_checkpointing": False,
}
KINDS = ["sft", "dpo", "rloo", "plain"]


def built(kind: str, folder: Path, *callbacks: Any) -> Any:  # noqa: ANN401
    """Return a trainer of a kind, on the toy's base model and tokenizer."""
    toy: Any = toy_trainer(folder / "toy")
    words, prompts = toy.processing_class, [row["prompt"] for row in toy.train_dataset][:64]
    base = str(folder / "toy" / "base")
    shared: dict[str, Any] = {"callbacks": list(callbacks)}
    trainer: Any
    args: Any
    if kind == "sft":
        data = datasets.Dataset.from_dict({"text": [f"{prompt} {prompt}" for prompt in prompts]})
        args = trl.SFTConfig(output_dir=str(folder), **SETTINGS)
        trainer = trl.SFTTrainer(model=base, args=args, train_dataset=data, processing_class=words, **shared)
    elif kind == "dpo":
        pairs = {"prompt": prompts, "chosen": [" a b"] * 64, "rejected": [" c c"] * 64}
        args = trl.DPOConfig(output_dir=str(folder), **SETTINGS)
        data = datasets.Dataset.from_dict(pairs)
        trainer = trl.DPOTrainer(model=base, args=args, train_dataset=data, processing_class=words, **shared)
    elif kind == "rloo":
        args = trl.RLOOConfig(output_dir=str(folder), num_generations=8, max_completion_length=8, **SETTINGS)
        trainer = trl.RLOOTrainer(
            model=base, reward_funcs=repeat_reward, args=args, train_dataset=toy.train_dataset, processing_class=words,
            **shared,
        )  # fmt: skip
    else:
        ids = [words(prompt)["input_ids"] for prompt in prompts]
        data = datasets.Dataset.from_dict({"input_ids": ids, "labels": ids})
        plain = {name: value for name, value in SETTINGS.items() if name != "activation_checkpointing"}
        args = transformers.TrainingArguments(output_dir=str(folder), **plain)
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        trainer = transformers.Trainer(model=model, args=args, train_dataset=data, **shared)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_any_trainer_is_watched_drilled_and_rolled_back(tmp_path: Path, kind: str) -> None:
    trainer = built(kind, tmp_path, WeightFault(SICK_AT, 3.0))
    dog = gw.attach(trainer, rules="guarded", checkpoint_every=5, probation=5)
    report = dog.drill()
    assert report.passed, str(report)
    seen: list[Any] = []
    dog._listeners.append(lambda step, verdict: seen.append((step, verdict)))  # noqa: SLF001
    trainer.train()
    before = [verdict for step, verdict in seen if step.number <= SICK_AT]
    assert {outcome.action for verdict in before for outcome in verdict.actions} == {"checkpoint_now"}
    assert {verdict.level for verdict in before} <= {"ok", "notice"}
    back = [(v.step, v.rolled_back_to) for _, v in seen if v.rolled_back_to is not None]
    assert [step for step, _ in back] == [SICK_AT + 1]
    assert trainer.state.global_step == STEPS
    values = seen[-1][0].values
    assert {"loss", "grad_norm", "learning_rate", "param_change"} <= set(values)
    if kind == "rloo":
        assert {"kl_coef", "clip_epsilon", "mean_reward", "kl_k1"} <= set(values)
    else:
        assert "kl_coef" not in values  # DPO's beta is something else
        assert any("no rewards, ratio and KL" in line for line in dog.briefing)


def test_a_callback_attaches_as_the_training_begins(tmp_path: Path) -> None:
    callback = gw.WatchdogCallback(rules="guarded", run_dir=tmp_path / "wd", checkpoint_every=5, probation=5)
    trainer: Any = toy_trainer(tmp_path, max_steps=30, callbacks=[callback, WeightFault(20, 3.0)])
    assert callback.dog is None
    trainer.train()
    assert callback.dog is not None
    run = gw.read_run(tmp_path / "wd")
    assert run.verdict == "critical"
    assert gw.report(tmp_path / "wd").count("rollback 21 -> ") == 1


def test_a_callback_that_no_trainer_calls_says_so() -> None:
    with pytest.raises(gw.ConfigurationError, match=r"gw\.attach\(trainer\)"):
        gw.WatchdogCallback().on_train_begin(object(), object(), object())
    with pytest.raises(AttributeError):
        _ = gw.WatchdogCallback().something


def test_attach_refuses_what_is_no_trainer_and_parts_beside_one(tmp_path: Path) -> None:
    with pytest.raises(gw.ConfigurationError, match=r"Linear is no transformers\.Trainer"):
        gw.attach(torch.nn.Linear(1, 1))
    trainer: Any = toy_trainer(tmp_path)
    with pytest.raises(gw.ConfigurationError, match="kl_coef is for a loop"):
        gw.attach(trainer, kl_coef=gw.attr(trainer, "beta"))
    with pytest.raises(gw.RulebookError):
        gw.attach(trainer, rules="nowhere")
    with pytest.raises(gw.ConfigurationError, match="probaton"):
        gw.attach(trainer, probaton=5)
    methods = {name for name in vars(trainer) if callable(vars(trainer)[name])}
    assert "_compute_loss" not in methods  # nothing of the refused attempts is left on it
    gw.attach(trainer)
    with pytest.raises(gw.ConfigurationError, match="has a watchdog already"):
        gw.attach(trainer)


def test_runs_in_one_folder_have_a_journal_each(tmp_path: Path) -> None:
    first, second = (gw.attach(toy_trainer(tmp_path)) for _ in range(2))
    assert [dog.run_dir for dog in (first, second)] == [tmp_path / "grpo_watchdog", tmp_path / "grpo_watchdog-2"]
    first.close()
    second.close()
    again = gw.attach(toy_trainer(tmp_path), resume=True)
    assert again.run_dir == tmp_path / "grpo_watchdog-2"


TWO_PROCESSES = """
    import json, os, sys
    import torch
    torch.set_num_threads(1)
    import grpo_watchdog as gw
    from grpo_watchdog.lab.trl_toy import LearningRateFault, toy_trainer
    folder, rank = sys.argv[1], int(os.environ["RANK"])
    for resume in (False, True):
        fault = LearningRateFault(24, 100)
        trainer = toy_trainer(folder, max_steps=40, callbacks=[fault], per_device_train_batch_size=16)
        policy = dict(checkpoint_every=5, probation=5)
        dog = gw.attach(trainer, rules="guarded", run_dir=f"{folder}/wd", resume=resume, **policy)
        seen = []
        dog._listeners.append(lambda s, v: seen.append([s.number, s.values, v.level, [o.action for o in v.actions]]))
        trainer.train()
        trainer.accelerator.wait_for_everyone()
        weights = [p.double().sum().item() for p in trainer.accelerator.unwrap_model(trainer.model).parameters()]
        with open(f"{folder}/{rank}-{int(resume)}.json", "w") as file:
            json.dump([seen, weights, trainer.state.global_step, dog.resumed_from, bool(dog.halted)], file)
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_see_the_same_decide_the_same_and_start_anew_from_what_is_proven(tmp_path: Path) -> None:
    import json  # noqa: PLC0415

    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(TWO_PROCESSES), encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*launch, str(script), str(tmp_path / "out")], check=True, capture_output=True, timeout=280)
    first, second = (
        [json.loads((tmp_path / "out" / f"{rank}-{turn}.json").read_text()) for rank in (0, 1)] for turn in (0, 1)
    )
    assert first[0] == first[1]
    assert second[0] == second[1]
    _, _, step, resumed, halted = first[0]
    assert (step, resumed, halted) == (25, None, True)
    seen, _, step, resumed, halted = second[0]
    assert (step, halted) == (40, False)
    assert 0 < resumed < 25
    assert seen[0][0] == resumed + 1


class Judged(trl.GRPOTrainer):  # type: ignore[misc, unused-ignore]
    """One with something to evaluate on."""

    def __init__(self, *given: Any, **named: Any) -> None:
        named["eval_dataset"] = named["train_dataset"].select(range(8))
        super().__init__(*given, **named)


@pytest.mark.parametrize("every", [1, 4])
def test_checkpoints_are_there_where_only_a_new_best_is_saved(tmp_path: Path, every: int) -> None:
    best: dict[str, Any] = {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": every}
    best |= {"metric_for_best_model": "eval_reward", "greater_is_better": False, "per_device_eval_batch_size": 32}
    trainer: Any = toy_trainer(tmp_path, max_steps=30, trainer_class=Judged, callbacks=[WeightFault(22, 3.0)], **best)
    dog = gw.attach(trainer, rules="guarded", checkpoint_every=4, probation=2)
    back: list[Any] = []
    dog._listeners.append(lambda _, v: back.append(v.rolled_back_to))  # noqa: SLF001
    trainer.train()
    assert [step for step in back if step is not None][0] > 12  # noqa: RUF015
    assert not dog.halted
    assert not (tmp_path / "checkpoint-23").exists()


def test_a_step_that_is_masked_whole_is_no_trouble(tmp_path: Path) -> None:
    trainer: Any = toy_trainer(tmp_path, max_steps=24, mask_truncated_completions=True, max_completion_length=3)
    dog = gw.attach(trainer, rules="guarded", checkpoint_every=4, probation=2)
    loud: set[str] = set()
    dog._listeners.append(  # noqa: SLF001
        lambda _, v: loud.update(f.rule for f in v.findings if f.severity != "notice")
    )
    trainer.train()
    assert loud <= {"truncated"}  # which is so: three tokens are no answer


def test_a_shadow_leaves_the_users_saves_alone(tmp_path: Path) -> None:
    saves: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}
    trainer: Any = toy_trainer(tmp_path, max_steps=14, callbacks=[WeightFault(9, 3.0)], **saves)
    gw.attach(trainer, rules="guarded", mode="shadow")
    trainer.train()
    assert len(list(tmp_path.glob("checkpoint-*"))) == 14


def test_the_line_that_is_said_after_a_halt_works_as_it_stands(tmp_path: Path) -> None:
    trainer: Any = toy_trainer(tmp_path, max_steps=24, callbacks=[WeightFault(12, 3.0)])
    policy: dict[str, Any] = {"checkpoint_every": 4, "probation": 2}
    dog = gw.attach(trainer, rules="guarded", on_divergence="halt", **policy)
    trainer.train()
    assert dog.halted
    again = gw.attach(trainer, rules="guarded", run_dir=dog.run_dir, resume=True, **policy)
    trainer.train()
    assert trainer.state.global_step == 24
    assert not again.halted


def test_a_callback_cannot_resume(tmp_path: Path) -> None:
    with pytest.raises(gw.ConfigurationError, match="before trainer"):
        gw.WatchdogCallback(run_dir=tmp_path, resume=True)
