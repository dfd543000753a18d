"""The fire drill on a transformers Trainer: its own batch, loss and checkpoint, and nothing left behind."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from grpo_watchdog.integrations.torch_proofs import FailedError
from grpo_watchdog.integrations.torch_stir import nudge, same_numbers
from grpo_watchdog.integrations.trainer_knobs import is_a
from grpo_watchdog.integrations.trainer_state import MARKS

_DEEP = ("_metrics", "_logs", "_pending_extra_logs", "_pending_metrics", "state", "control", "_stored_metrics")
_ARGS = ("output_dir", "push_to_hub", "save_total_limit")


def make_loss(trainer: Any, beta: Any) -> Any:  # noqa: ANN401
    """Return a function that computes the loss of one batch, the same each time.

    Args:
        trainer: a transformers.Trainer.
        beta: the knob of the KL coefficient, or None: where it is 0, the batch is drawn with it on, so that the
            reference's log-probs are there.
    """
    model = trainer.model
    model.train()
    if not is_a(trainer, "GRPOTrainer"):
        batch = trainer._prepare_inputs(_collated(trainer))  # noqa: SLF001
        return lambda: trainer.compute_loss(model, batch)
    raised = beta is not None and not beta.own()
    if raised:
        beta.hold(1.0)
    drawn = trainer._generate_and_score_completions(_prompts(trainer))  # noqa: SLF001
    if raised:
        beta.release()
    rows = min(trainer.args.per_device_train_batch_size, len(drawn["completion_ids"]))
    batch = {name: _first(value, rows, len(drawn["completion_ids"])) for name, value in drawn.items()}
    sign = torch.ones_like(batch["advantages"])
    sign[1::2] = -1.0  # rewards may all be equal on one batch
    batch["advantages"] = sign
    if "old_per_token_logps" not in batch:
        with torch.no_grad():
            batch["old_per_token_logps"] = _scored(trainer, batch).detach()
    return lambda: trainer._compute_loss(model, batch)  # noqa: SLF001


def save_elsewhere(trainer: Any, state: Any, folder: Path) -> None:  # noqa: ANN401
    """Have the trainer write its own checkpoint into another folder."""
    arguments = trainer.args
    kept = {name: getattr(arguments, name) for name in _ARGS}
    arguments.output_dir, arguments.push_to_hub, arguments.save_total_limit = str(folder), False, None
    try:
        type(trainer)._save_checkpoint(trainer, trainer.model, None)  # noqa: SLF001 - not our own wrapper around it
    finally:
        for name, value in kept.items():
            setattr(arguments, name, value)
    marks = written(folder) / MARKS
    marks.mkdir()
    state.write_extras(marks)


def written(folder: Path) -> Path:
    """Return the checkpoint that was written into a folder."""
    return next(folder.glob("checkpoint-*"))


@contextmanager
def as_it_was(trainer: Any) -> Iterator[None]:  # noqa: ANN401
    """Give the trainer back every attribute that it had, and take away those that it had not."""
    before = dict(vars(trainer))
    deep = {name: copy.deepcopy(before[name]) for name in _DEEP if name in before}
    if trainer.lr_scheduler is None:  # before the training: as the trainer itself makes it
        trainer.create_scheduler(num_training_steps=max(trainer.args.max_steps, 100))
    if not hasattr(trainer, "current_gradient_accumulation_steps"):
        trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    try:
        yield
    finally:
        vars(trainer).clear()
        vars(trainer).update(before)
        for name, value in deep.items():
            _refill(getattr(trainer, name), value)


def clipped(trainer: Any, knob: Any) -> str:  # noqa: ANN401
    """Prove that gradients are clipped to the limit that is held; return what was seen."""
    for p in trainer.model.parameters():
        if p.requires_grad:
            p.grad = torch.ones_like(p)
    limit = knob.own() / 10
    knob.hold(limit)
    trainer._clip_grad_norm(trainer.model)  # noqa: SLF001
    left = float(
        torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in trainer.model.parameters() if p.grad is not None]))
    )
    knob.release()
    if left > 1.01 * limit:
        raise FailedError(f"held at {limit:g}, the trainer left a gradient of norm {left:g}")
    return f"held at {limit:g}, the trainer left a gradient of norm {left:.4g}"


def in_rewards(trainer: Any, knob: Any) -> str:  # noqa: ANN401
    """Prove that the coefficient is in the rewards, for a trainer that charges KL there: RLOO; return what was seen."""
    weights = [p for p in trainer.model.parameters() if p.requires_grad]
    nudge(weights)  # at the reference's own weights there is no KL to charge
    own = knob.own()

    def advantages() -> torch.Tensor:
        with same_numbers():
            drawn: torch.Tensor = trainer._generate_and_score_completions(_prompts(trainer))["advantages"]  # noqa: SLF001
        return drawn

    trainer.model.train()
    first = advantages()
    knob.hold(max(10 * own, 1.0))
    held = advantages()
    knob.release()
    if torch.equal(first, held):
        raise FailedError(
            f"the advantages are the same to the bit with {own:g} and with more: nobody reads {knob.where}"
        )
    if not torch.equal(first, advantages()):
        raise FailedError("after the release the advantages are not what they were")
    return f"with more than {own:g} the advantages of the same samples change; lifted, the same to the bit"


def _refill(there: Any, was: Any) -> None:  # noqa: ANN401
    """Make a container, or a record of the trainer, what it was; others hold the same object."""
    if isinstance(there, dict):
        for key in there.keys() - was.keys():
            del there[key]
        for key, value in was.items():
            if isinstance(there.get(key), dict):
                _refill(there[key], value)
            else:
                there[key] = value
    else:
        vars(there).clear()
        vars(there).update(vars(was))


def _spare(rows: Any) -> Iterator[Any]:  # noqa: ANN401
    """Return the rows from the first on; raise where that would take them from the training."""
    if not hasattr(rows, "__getitem__") and not type(rows).__module__.startswith("datasets"):
        raise TypeError("a stream has no rows to spare: dog.drill(loss=...)")
    return iter(rows)


def _prompts(trainer: Any) -> list[Any]:  # noqa: ANN401
    """Return the rows of one generation batch: the first prompts, each as often as a group is large."""
    group, size = trainer.num_generations, trainer.args.generation_batch_size // trainer.args.world_size
    rows = list(islice(_spare(trainer.train_dataset), max(1, size // group)))
    return [dict(row) for row in rows for _ in range(group)]


def _collated(trainer: Any) -> Any:  # noqa: ANN401
    rows = list(islice(_spare(trainer.train_dataset), trainer.args.per_device_train_batch_size))
    collate = trainer._get_collator_with_removed_columns(trainer.data_collator)  # noqa: SLF001
    return collate(rows)


def _first(value: Any, rows: int, of: int) -> Any:  # noqa: ANN401
    """Return the first rows of what has a row for each completion."""
    return value[:rows] if isinstance(value, torch.Tensor) and value.dim() and len(value) == of else value


def _scored(trainer: Any, batch: Mapping[str, Any]) -> torch.Tensor:  # noqa: ANN401
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    kept = batch["completion_ids"].size(1)
    scored: torch.Tensor = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, kept)[0]  # noqa: SLF001
    return scored
