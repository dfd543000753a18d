# ruff: noqa: E402 - huggingface_hub reads the environment when it is imported
"""A real trl.GRPOTrainer small enough for one CPU core, and faults that happen to it while it trains.

The prompt is a few letters; the right completion repeats them and stops. The base model knows a little of that from a
short supervised start, as a real one would, and GRPO has to bring it out. Nothing is downloaded and nothing is logged
to anywhere but `trainer.state.log_history`.

Shapes by suffix: B sequences, L tokens, V vocabulary.
"""

from __future__ import annotations

import os

for _name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ.setdefault(_name, "1")

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]
import peft
import tokenizers
import torch
import transformers
from torch import Tensor
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from grpo_watchdog.lab.trl_faults import GradientFault, LearningRateFault, WeightFault

__all__ = ["GradientFault", "LearningRateFault", "WeightFault", "repeat_reward", "reward_of", "toy_trainer"]

LETTERS = "abcdefghijkl"
END_OF_PROMPT, PAD, EOS = "=", "<pad>", "<eos>"
PROMPT = 5  # letters of a prompt
LONGEST = 8  # tokens that a completion has at most
_VOCABULARY = {token: index for index, token in enumerate((PAD, EOS, END_OF_PROMPT, *LETTERS))}
_ANSWERS = [_VOCABULARY[token] for token in (EOS, *LETTERS)]  # what a pretrained model may say
_ROWS = 512  # prompts of the data set
_PRETRAINING_STEPS, _PRETRAINING_BATCH, _PRETRAINING_RATE = 80, 64, 5e-3
_HEAD = 5.0  # what the head's first weights are multiplied by
_KNOWN = 0.15  # probability of the right token that pretraining aims at
_RATE, _LORA_RATE = 5e-4, 1e-3


def toy_trainer(
    output_dir: str | Path,
    *,
    seed: int = 0,
    max_steps: int = 200,
    learning_rate: float | None = None,
    lora: bool = False,
    trainer_class: type[GRPOTrainer] | None = None,
    callbacks: Sequence[transformers.TrainerCallback] = (),
    **config: Any,
) -> GRPOTrainer:
    """Build a trainer that is ready to train; two of one seed come to the same weights, to the last bit.

    By default each batch of samples is used for two updates, so that the ratio lives, and the KL term is on.

    Args:
        output_dir: where the base model is written, from which TRL reads the reference.
        seed: of everything: data, base model, sampling.
        max_steps: steps of the optimizer [steps].
        learning_rate: the highest of the schedule; None is one that suits.
        lora: whether adapters are trained in place of all weights.
        trainer_class: what is built; None is trl.GRPOTrainer.
        callbacks: faults and others, called in this order.
        **config: fields of trl.GRPOConfig, which win over the ones here.
    """
    base = Path(output_dir) / "base"
    settings: dict[str, Any] = {
        "output_dir": str(output_dir),
        "seed": seed,
        "max_steps": max_steps,
        "learning_rate": (_LORA_RATE if lora else _RATE) if learning_rate is None else learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 10,
        "per_device_train_batch_size": 32,
        "num_generations": 8,
        "num_iterations": 2,
        "max_completion_length": LONGEST,
        "beta": 0.04,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # a NaN loss is logged as one
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "dataloader_pin_memory": False,
    } | config
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    _keep_quiet()
    _write_base(base, seed)
    trainer = (trainer_class or GRPOTrainer)(
        model=str(base),
        reward_funcs=repeat_reward,
        args=GRPOConfig(**settings),
        train_dataset=_prompts(seed),
        processing_class=_tokenizer(),
        callbacks=[_Begin(), *callbacks],
        peft_config=_adapters() if lora else None,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def repeat_reward(prompts: list[str], completions: list[str], **_: Any) -> list[float | None]:
    """Return the share of letters that are right and in place, among those asked for or given, whichever is more."""
    return [
        _share(prompt.removesuffix(END_OF_PROMPT).split(), completion.split())
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def reward_of(trainer: transformers.Trainer) -> list[float]:
    """Return the mean reward of each batch of samples, in order; one that was None or NaN is NaN.

    With `num_iterations=2` TRL draws samples, and logs a reward, on every other step.
    """
    rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    return [math.nan if reward is None else float(reward) for reward in rewards]


# --- model, data, tokens ------------------------------------------------------------------------


class _Begin(transformers.TrainerCallback):
    """What holds while the trainer trains: its own seed, and quiet about what TRL does with transformers."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Seed, so that the samples do not depend on what ran since the trainer was built."""
        del control, kwargs
        _keep_quiet()
        if state.global_step == 0:  # where training is resumed, the checkpoint's generator states are loaded
            transformers.set_seed(args.seed)


def _keep_quiet() -> None:
    """Hide one warning: TRL 1.16 and PEFT 0.21 read a property that transformers 5.24 deprecates, whatever is set."""
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


def _share(asked: list[str], given: list[str]) -> float:
    right = sum(a == g for a, g in zip(asked, given, strict=False))
    return right / max(len(asked), len(given))


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(_VOCABULARY, unk_token=PAD))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=words, pad_token=PAD, eos_token=EOS, padding_side="left", model_max_length=64
    )


def _prompts(seed: int) -> datasets.Dataset:
    picks = torch.randint(len(LETTERS), (_ROWS, PROMPT), generator=torch.Generator().manual_seed(seed)).tolist()
    return datasets.Dataset.from_dict(
        {"prompt": [" ".join([*(LETTERS[i] for i in row), END_OF_PROMPT]) for row in picks]}
    )


def _adapters() -> peft.LoraConfig:
    return peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def _write_base(folder: Path, seed: int) -> None:
    """Write a model that gives the right token a little more often than the others."""
    with torch.random.fork_rng(devices=[]):  # leaves the caller's global stream alone
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=len(_VOCABULARY),
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=64,
                tie_word_embeddings=False,
                bos_token_id=None,
                pad_token_id=_VOCABULARY[PAD],
                eos_token_id=_VOCABULARY[EOS],
            )
        )
        _pretrain(model)
    model.save_pretrained(folder)


def _pretrain(model: transformers.LlamaForCausalLM) -> None:
    with torch.no_grad():
        model.lm_head.weight.mul_(_HEAD)  # adapters leave the head as it is: it must be able to be sure of a token
    optimizer = torch.optim.AdamW(model.parameters(), lr=_PRETRAINING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _PRETRAINING_RATE, total_steps=_PRETRAINING_STEPS)
    for _ in range(_PRETRAINING_STEPS):
        token_BL, target_BLV = _lesson()
        logits_BLV = model(input_ids=token_BL).logits[:, PROMPT:-1]
        loss = torch.nn.functional.cross_entropy(logits_BLV.flatten(0, 1), target_BLV.flatten(0, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def _lesson() -> tuple[Tensor, Tensor]:
    """Return prompts with completions that are wrong as often as the model shall be, and what it shall say."""
    size = (_PRETRAINING_BATCH, PROMPT)
    letter_BL = torch.randint(len(LETTERS), size) + _VOCABULARY[LETTERS[0]]
    equals = torch.full((_PRETRAINING_BATCH, 1), _VOCABULARY[END_OF_PROMPT])
    right_BL = torch.cat([letter_BL, torch.full((_PRETRAINING_BATCH, LONGEST - PROMPT), _VOCABULARY[EOS])], dim=1)
    any_V = torch.zeros(len(_VOCABULARY))
    any_V[_ANSWERS] = 1.0 / len(_ANSWERS)
    known_BLV = torch.nn.functional.one_hot(right_BL, len(_VOCABULARY))
    target_BLV = _KNOWN * known_BLV + (1.0 - _KNOWN) * any_V
    said_BL = torch.multinomial(target_BLV.flatten(0, 1), 1).view(right_BL.shape)
    return torch.cat([letter_BL, equals, said_BL], dim=1), target_BLV
