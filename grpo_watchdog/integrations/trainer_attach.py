"""attach, for a transformers Trainer: SFT, DPO and the rest of TRL, and GRPO with all that its loss shows."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from grpo_watchdog import drill, journal
from grpo_watchdog.errors import ConfigurationError
from grpo_watchdog.integrations.tensorboard import TensorBoardListener
from grpo_watchdog.integrations.trainer_controls import ShardedControls, TrainerControls, is_sharded
from grpo_watchdog.integrations.trainer_hook import TrainerHook
from grpo_watchdog.integrations.trainer_knobs import is_a
from grpo_watchdog.integrations.trainer_settings import blind_spots
from grpo_watchdog.integrations.trainer_taps import Taps
from grpo_watchdog.integrations.trainer_vault import TrainerVault
from grpo_watchdog.integrations.trl_grpo import GrpoTaps
from grpo_watchdog.rulebook import Rulebook, load
from grpo_watchdog.session import earlier_session
from grpo_watchdog.watchdog import Watchdog

_PARTS, _LEAST, _LONG = 20, 5, 1_000_000
_PAGES = {"documented": "llm", "guarded": "guarded_llm"}  # the same rules in the units of these trainers


def attach_trainer(
    trainer: Any,  # noqa: ANN401
    *,
    rules: str | Path | Rulebook,
    run_dir: str | Path | None,
    tensorboard: Any,  # noqa: ANN401
    resume: bool,
    approve: Callable[..., Any] | None,
    policy: Mapping[str, Any],
) -> Watchdog:
    """Attach a watchdog to a Trainer; the arguments are those of `grpo_watchdog.attach`.

    Raises:
        ConfigurationError: something cannot be used, or the trainer has a watchdog already.
    """
    for earlier in [c for c in trainer.callback_handler.callbacks if isinstance(c, TrainerHook)]:
        if not (resume and earlier.over):
            raise ConfigurationError("this trainer has a watchdog already")
        earlier.detach()
    if drill.rehearsal is not None:  # nothing of the real run is touched
        run_dir, resume = tempfile.mkdtemp(dir=drill.folder or None), False
    folder, process = Path(trainer.args.output_dir), trainer.args.process_index
    run_dir = _run_dir(folder, resume=resume) if run_dir is None else Path(run_dir)
    run = run_dir.name
    run_dir = run_dir if process == 0 else run_dir / f"process-{process}"
    page, said = _page(trainer, rules)
    book = page if isinstance(page, Rulebook) else load(page)
    interval = min(book.policy.checkpoint_every, _twentieth(trainer))
    book = book.with_policy({"checkpoint_every": interval, **policy})
    earlier_session(run_dir, resume=resume)  # refused before anything is hooked
    tensorboard = run_dir / "tensorboard" if tensorboard is True else tensorboard
    taps = GrpoTaps(trainer) if is_a(trainer, "GRPOTrainer") else Taps(trainer)
    controls: Any = None
    try:
        controls = _controls(trainer, taps, book)
        vault = TrainerVault(folder, run, controls.state, lambda: _best(trainer.state), writes=process == 0)
        if not resume:
            vault.disown()
        hook = TrainerHook(trainer, controls, taps, vault)
        dog = Watchdog(
            book,
            controls,
            run_dir,
            ratio_to="old",
            resume=resume,
            listeners=[TensorBoardListener(tensorboard)] if tensorboard else [],
            approve=approve,
            vault=vault,
            said=[*said, *blind_spots(trainer), *_restarts(controls)],
        )
    except BaseException:
        if controls is not None:
            controls.detach()
        taps.detach()
        raise
    hook.watch(dog, drill.rehearsal)
    return dog


def _controls(trainer: Any, taps: Taps, book: Rulebook) -> TrainerControls | ShardedControls:  # noqa: ANN401
    if is_sharded(trainer):
        return ShardedControls(trainer)
    return TrainerControls(trainer, taps, check_every=book.policy.check_every, tripwires=book.policy.tripwires)


def _restarts(controls: TrainerControls | ShardedControls) -> list[str]:
    if not controls.restart:
        return []
    return [f"no rollback while it trains ({controls.restart}): the run is stopped instead, and says how to go on"]


def _best(state: Any) -> set[str]:  # noqa: ANN401
    """Return the names of the checkpoints that the trainer calls its best: by step, and by folder."""
    by_step = {f"checkpoint-{state.best_global_step}"} if state.best_global_step else set()
    return by_step | ({Path(state.best_model_checkpoint).name} if state.best_model_checkpoint else set())


def _page(trainer: Any, rules: str | Path | Rulebook) -> tuple[str | Path | Rulebook, list[str]]:  # noqa: ANN401
    """Return the rulebook in the units of this trainer, and what is to be said about it."""
    if not isinstance(rules, str) or rules not in _PAGES or not is_a(trainer, "GRPOTrainer", "RLOOTrainer"):
        return rules, []
    page = _PAGES[rules]
    line = (
        f"rulebook {page} in place of {rules}: the same rules in the units of {type(trainer).__name__}, whose ratio is "
        "taken to the old policy, token by token"
    )
    return page, [line]


def _twentieth(trainer: Any) -> int:  # noqa: ANN401
    """Return a twentieth of the run [steps], so that a short one has somewhere to go back to; at least 5."""
    args = trainer.args
    steps = args.max_steps
    if steps <= 0:
        try:
            rows = len(trainer.train_dataset) * getattr(trainer, "num_generations", 1)
        except TypeError:  # a stream has no length
            return _LONG
        per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        steps = round(args.num_train_epochs * rows * getattr(trainer, "num_iterations", 1) / per_step)
    return max(_LEAST, int(steps) // _PARTS)


def _run_dir(folder: Path, *, resume: bool) -> Path:
    """Return where the journal goes by default: the newest that is there where it is resumed, else the next free."""
    number, newest = 1, folder / "grpo_watchdog"
    while True:
        place = folder / (f"grpo_watchdog-{number}" if number > 1 else "grpo_watchdog")
        if not journal.holds_a_run(place):
            return newest if resume else place
        newest, number = place, number + 1
