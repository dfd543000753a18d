"""The state of a transformers Trainer: its own `checkpoint-N` folders, put back in place, whole or not at all.

A checkpoint is what the trainer writes itself: weights (adapters only, under PEFT), optimizer, scheduler, scaler,
random number generators. What it leaves out and a rollback needs lies beside it in `grpo_watchdog/`: the user's own
settings of the knobs, and the reference where the trainer moves it (`sync_ref_model`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from grpo_watchdog.controls import DialKnob
from grpo_watchdog.errors import CheckpointError
from grpo_watchdog.integrations.torch_state import Part, generators, knob_settings, put_all

MARKS, _EXTRAS = "grpo_watchdog", "state.pt"
_WEIGHTS = ("model*.safetensors", "adapter_model.safetensors", "*/adapter_model.safetensors")
_OTHERS = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth", "entropy_ctrl_state.json")
_INDEX = "model.safetensors.index.json"
_ENTROPY = {"entropy_coef": "entropy_coef", "last_world_entropy": "_last_world_entropy"}  # in the file, on the trainer


class TrainerState:
    """Reads `checkpoint-N` folders back into the trainer that wrote them, while it trains.

    Args:
        trainer: a transformers.Trainer.
        knobs: settings whose own values belong to a checkpoint.
        reference: the reference, where the trainer moves it.
    """

    def __init__(
        self,
        trainer: Any,  # noqa: ANN401
        knobs: Mapping[str, DialKnob],
        reference: torch.nn.Module | None,
    ) -> None:
        """Keep references; copy nothing."""
        self._trainer, self._knobs, self._reference = trainer, knobs, reference

    def files(self, folder: Path) -> dict[str, Path]:
        """Return the files of a checkpoint that a rollback reads, by name."""
        found = [path for pattern in (*_WEIGHTS, _INDEX, *_OTHERS) for path in folder.glob(pattern)]
        return {str(path.relative_to(folder)): path for path in found}

    def write_extras(self, marks: Path) -> Path:
        """Write what the trainer itself leaves out."""
        path = marks / _EXTRAS
        torch.save({p.name: p.get() for p in self._extras()}, path)
        return path

    def check(self, folder: Path) -> None:
        """Raise a CheckpointError where a folder could not be restored into this training; reads no tensor.

        With `save_only_model` there is nothing but weights, as the user chose; a run that is started anew takes those.
        """
        needed = () if self._trainer.args.save_only_model else ("optimizer.pt", "scheduler.pt")
        missing = [name for name in needed if not (folder / name).exists()]
        if missing:
            raise CheckpointError(f"{folder.name} holds no {' and no '.join(missing)}")
        there: dict[str, tuple[int, ...]] = {}
        for path in self._weight_files(folder):
            with safe_open(path, framework="pt") as file:
                there |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        self._fits(there)

    def restore(self, folder: Path, *, replay_data: bool = True) -> None:
        """Put everything back, and drop the gradients that the sick model left.

        Raises:
            CheckpointError: the files do not fit this training, or a part refused its state; everything is as it was.
        """
        try:
            parts, wanted = self._wanted(folder, replay_data=replay_data)
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(f"{folder.name} cannot be used: {type(error).__name__}: {error}") from error
        try:
            put_all(parts, wanted, self._model().parameters(), by_host=("model", "optimizer", "reference"))
        except CheckpointError as error:
            raise CheckpointError(f"{folder.name} is not restored: {error}") from error

    def everything(self) -> list[Part]:
        """Return every part that a checkpoint covers: weights, optimizer, scheduler, scaler, settings, generators."""
        return [*self._heavy(sorted(self._covered())), *self._light(), *self._extras(), *generators()]

    def _wanted(self, folder: Path, *, replay_data: bool) -> tuple[list[Part], dict[str, Any]]:
        """Return what to put and where; every file is read before anything is touched."""
        tensors: dict[str, torch.Tensor] = {}
        for path in self._weight_files(folder):
            tensors |= load_file(path, device="cpu")
        self._fits({key: tuple(tensor.shape) for key, tensor in tensors.items()})
        wanted: dict[str, Any] = {"model": tensors, "optimizer": _load(folder / "optimizer.pt")}
        parts = self._heavy(sorted(tensors))
        for part in self._light():
            if part.name == "entropy":
                wanted[part.name] = json.loads((folder / "entropy_ctrl_state.json").read_text())
            else:
                wanted[part.name] = _load(folder / f"{part.name}.pt")
            parts.append(part)
        extras = _load(folder / MARKS / _EXTRAS)
        parts += [part for part in self._extras() if part.name in extras]
        wanted |= extras
        if replay_data:
            rng = _load(folder / "rng_state.pth")
            for part in generators():
                if part.name in (named := _rng(rng)):
                    parts.append(part)
                    wanted[part.name] = named[part.name]
        return parts, wanted

    def _heavy(self, keys: Iterable[str]) -> list[Part]:
        keys = list(keys)
        optimizer = self._trainer.optimizer
        return [
            Part("model", lambda: {k: v for k, v in self._covered().items() if k in keys}, self._put_weights),
            Part("optimizer", optimizer.state_dict, optimizer.load_state_dict),
        ]

    def _light(self) -> list[Part]:
        trainer = self._trainer
        parts = []
        if trainer.lr_scheduler is not None:
            parts.append(Part("scheduler", trainer.lr_scheduler.state_dict, trainer.lr_scheduler.load_state_dict))
        scaler = getattr(trainer.accelerator, "scaler", None)
        if scaler is not None:
            parts.append(Part("scaler", scaler.state_dict, scaler.load_state_dict))
        if getattr(trainer, "use_adaptive_entropy", False):
            parts.append(
                Part(
                    "entropy",
                    lambda: {name: getattr(trainer, attribute) for name, attribute in _ENTROPY.items()},
                    lambda state: vars(trainer).update({_ENTROPY[name]: value for name, value in state.items()}),
                )
            )
        return parts

    def _extras(self) -> list[Part]:
        parts = [knob_settings(self._knobs)] if self._knobs else []
        if self._reference is not None:
            parts.append(Part("reference", self._reference.state_dict, self._reference.load_state_dict))
        return parts

    def _model(self) -> torch.nn.Module:
        model: torch.nn.Module = self._trainer.accelerator.unwrap_model(self._trainer.model)
        return model

    def _adapter(self) -> str | None:
        """Return the name of the adapter that is trained, None where there is none."""
        model: Any = self._model()
        return model.active_adapters[0] if hasattr(model, "peft_config") else None

    def _covered(self) -> dict[str, torch.Tensor]:
        """Return the live tensors by the names that a checkpoint gives them."""
        model, adapter = self._model(), self._adapter()
        if adapter is None:
            return model.state_dict()
        from peft import get_peft_model_state_dict  # noqa: PLC0415 - only where the model is one of its own

        found: dict[str, torch.Tensor] = get_peft_model_state_dict(model, adapter_name=adapter)
        return found

    def _put_weights(self, tensors: Mapping[str, torch.Tensor]) -> None:
        model, adapter = self._model(), self._adapter()
        if adapter is None:
            model.load_state_dict(tensors, strict=False)  # _fits saw to it that only tied weights are missing
            return
        from peft import set_peft_model_state_dict  # noqa: PLC0415

        set_peft_model_state_dict(model, dict(tensors), adapter_name=adapter)

    def _weight_files(self, folder: Path) -> list[Path]:
        adapter = self._adapter()
        if adapter is not None:
            inside = folder / adapter / "adapter_model.safetensors"  # all but "default" lie in folders of their own
            found = [inside if inside.exists() else folder / "adapter_model.safetensors"]
        elif (folder / _INDEX).exists():
            names = json.loads((folder / _INDEX).read_text())["weight_map"].values()
            found = [folder / name for name in sorted(set(names))]
        else:
            found = [folder / "model.safetensors"]
        absent = [path.name for path in found if not path.exists()]
        if absent:
            raise CheckpointError(f"{folder.name} holds no {absent[0]}")
        return found

    def _fits(self, there: Mapping[str, tuple[int, ...]]) -> None:
        live = self._covered()
        strange = sorted(there.keys() - live.keys())
        held = {live[key].data_ptr() for key in there if key in live}
        left = sorted(k for k in live.keys() - there.keys() if live[k].data_ptr() not in held and live[k].numel())
        wrong = sorted(k for k in there if k in live and tuple(live[k].shape) != there[k])
        if strange or left or wrong:
            which = (strange or left or wrong)[0]
            why = "of another shape" if not (strange or left) else "in only one of the checkpoint and this training"
            raise CheckpointError(f"{which} is {why}")


def _rng(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return transformers' rng_state.pth by our names."""
    found = {"rng.python": saved["python"], "rng.numpy": saved["numpy"], "rng.torch": saved["cpu"]}
    if "cuda" in saved:  # of the current device, or of all of them
        found["rng.cuda"] = saved["cuda"] if isinstance(saved["cuda"], list) else [saved["cuda"]]
    return found


def _load(path: Path) -> Any:  # noqa: ANN401
    """Load one of the trainer's files without running anything in it."""
    from transformers.trainer_pt_utils import safe_globals  # noqa: PLC0415 - numpy's generator state is let through

    with safe_globals():  # type: ignore[no-untyped-call]
        return torch.load(path, map_location="cpu", weights_only=True)
