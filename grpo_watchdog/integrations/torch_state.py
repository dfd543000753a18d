"""The whole state of a torch training: written finite or not at all, restored whole or not at all."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from grpo_watchdog.controls import DialKnob
from grpo_watchdog.errors import CheckpointError, ConfigurationError
from grpo_watchdog.integrations.torch_codec import decode, each, encode
from grpo_watchdog.integrations.torch_finite import FiniteCheck

_REST, _CUDA, KNOBS = "training.pt", "rng.cuda", "knobs"


class Part(NamedTuple):
    """One thing that has state: how it is read and how it is put back."""

    name: str
    get: Callable[[], Any]
    put: Callable[[Any], object]


def part(name: str, owner: Any) -> Part:  # noqa: ANN401
    """Return the part for whatever a user hands over.

    Args:
        name: what to call it.
        owner: something with state_dict and load_state_dict, a random number generator of torch, numpy or Python, or
            a (get, put) pair of functions.

    Raises:
        ConfigurationError: it is none of these, or its state holds something that cannot be stored.
    """
    if isinstance(owner, torch.Generator):
        made = Part(name, owner.get_state, owner.set_state)
    elif isinstance(owner, np.random.Generator):
        bits = owner.bit_generator
        made = Part(name, lambda: bits.state, lambda state: setattr(bits, "state", state))
    elif isinstance(owner, np.random.RandomState):
        made = Part(name, lambda: owner.get_state(legacy=False), owner.set_state)
    elif isinstance(owner, random.Random):
        made = Part(name, owner.getstate, owner.setstate)
    elif callable(getattr(owner, "state_dict", None)) and callable(getattr(owner, "load_state_dict", None)):
        made = Part(name, owner.state_dict, owner.load_state_dict)
    elif isinstance(owner, tuple) and len(owner) == 2 and all(map(callable, owner)):  # noqa: PLR2004
        made = Part(name, owner[0], owner[1])
    else:
        raise ConfigurationError(
            f"{name} is a {type(owner).__name__}: it needs state_dict and load_state_dict, or to be a random number "
            "generator of torch, numpy or Python, or a (get, put) pair of functions"
        )
    try:
        encode(made.get(), name)
    except ConfigurationError:
        raise
    except Exception as error:
        raise ConfigurationError(f"the state of {name} cannot be read: {type(error).__name__}: {error}") from error
    return made


class TrainingState:
    """Saves and restores a model, its optimizer, a list of parts and all random number generators.

    `model.pt` and `optimizer.pt` hold what their `load_state_dict` takes, `training.pt` everything else by name,
    encoded by `torch_codec`.

    Gradients are no part of it: a restore drops them, before the parts are put back. A loop that takes checkpoints
    amid gradient accumulation hands its gradients over as a part of its own.

    Args:
        model: its parameters and buffers go into a file of their own.
        optimizer: so does its state.
        parts: scheduler, scaler and whatever else; restored in this order.
        finite: decides whether a state is worth keeping.
        data: what decides which data comes next, besides the global random number generators.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        parts: Iterable[Part],
        finite: FiniteCheck,
        data: Iterable[Part] = (),
    ) -> None:
        """Keep references; copy nothing."""
        self._model, self._optimizer, self._finite = model, optimizer, finite
        self._heavy = [
            Part("model", model.state_dict, lambda state: model.load_state_dict(state, strict=True)),
            Part("optimizer", optimizer.state_dict, optimizer.load_state_dict),
        ]
        lasting, passing = list(parts), [*data, *generators()]
        self._parts = [*lasting, *passing]
        self._passing = {p.name for p in passing}  # what a restore may leave where it is

    def save(self, folder: Path) -> None:
        """Write everything into a folder.

        Raises:
            CheckpointError: a parameter or an optimizer moment is not finite: such a state is not worth keeping.
        """
        sick = self._finite.weights() or self._finite.moments()
        if sick:
            raise CheckpointError(f"{sick} is not finite: this state is not kept")
        for p in self._heavy:
            _write(read_part(p), folder / f"{p.name}.pt")
        _write({p.name: read_part(p) for p in self._parts}, folder / _REST)

    def restore(self, folder: Path, *, replay_data: bool = True) -> None:
        """Put everything back, and drop the gradients that the sick model left.

        Args:
            folder: what `save` wrote.
            replay_data: False leaves the data and the global random number generators where they are now.

        Raises:
            CheckpointError: the files do not fit this training, or a part refused its state; everything is as it was.
        """
        try:
            # The large files by way of the host; what else there is comes back to the device that it was on.
            wanted = {p.name: _load(folder / f"{p.name}.pt", "cpu") for p in self._heavy}
            wanted |= _load(folder / _REST, None if torch.cuda.is_available() else "cpu")
            self._fits(wanted)
            wanted = {name: decode(state) for name, state in wanted.items()}
        except Exception as error:
            raise CheckpointError(f"{folder.name} cannot be used: {_told(error)}") from error
        parts = [p for p in self._parts if p.name in wanted and (replay_data or p.name not in self._passing)]
        try:
            put_all([*self._heavy, *parts], wanted, self._parameters(), by_host={p.name for p in self._heavy})
        except CheckpointError as error:
            raise CheckpointError(f"{folder.name} is not restored: {error}") from error

    def everything(self) -> list[Part]:
        """Return every part that a checkpoint holds."""
        return [*self._heavy, *self._parts]

    def _parameters(self) -> list[torch.Tensor]:
        held = [p for group in self._optimizer.param_groups for p in group["params"]]
        return list({id(p): p for p in (*self._model.parameters(), *held)}.values())

    def _fits(self, wanted: Mapping[str, Any]) -> None:
        """Raise unless the checkpoint is of this training: the same parts, weights, shapes and types."""
        one_sided = {p.name for p in (*self._heavy, *self._parts)} ^ set(wanted)
        one_sided -= {_CUDA} if _CUDA in wanted else set()  # taken on a machine with a GPU, resumed on one without
        one_sided -= {KNOBS}  # an earlier version kept none
        live, there = encode(self._model.state_dict(), "model"), wanted["model"]
        one_sided |= set(live) ^ set(there)
        if one_sided:
            names = ", ".join(sorted(map(str, one_sided))[:3])
            raise CheckpointError(f"{names} in only one of the checkpoint and this training")
        for key, mine in live.items():
            if isinstance(mine, torch.Tensor) and _form(mine) != _form(there[key]):
                raise CheckpointError(f"{key} is {_form(there[key])} in the checkpoint and {_form(mine)} here")


def put_all(
    parts: Sequence[Part],
    wanted: Mapping[str, Any],
    parameters: Iterable[torch.Tensor],
    *,
    by_host: Collection[str] = (),
) -> None:
    """Put every part's wanted state in place, or leave everything as it was; gradients are dropped.

    Args:
        parts: what to put, in this order.
        wanted: the state of each, by name.
        parameters: whose gradients are of a state that is gone.
        by_host: parts whose present state is kept on the host meanwhile: large ones.

    Raises:
        CheckpointError: a part refused its state; everything is as it was, or it says what is not.
    """
    before = {p.name: copied(read_part(p), "cpu" if p.name in by_host else None) for p in parts}
    gradients = [(p, p.grad) for p in parameters]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        for p in parts:
            _put(p, wanted[p.name])
    except BaseException as error:
        lost = _undo(parts, before)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        if not isinstance(error, Exception):
            raise
        told = f"and this is not as it was: {', '.join(lost)}" if lost else "everything is as it was"
        raise CheckpointError(f"{_told(error)}; {told}") from error


def _undo(parts: Iterable[Part], before: Mapping[str, Any]) -> list[str]:
    lost = []
    for p in parts:
        try:
            _put(p, decode(before[p.name]))
        except Exception as error:  # noqa: BLE001 - the others are put back all the same
            lost.append(_told(error))
    return lost


def knob_settings(knobs: Mapping[str, DialKnob]) -> Part:
    """Return the part for the user's own values of the knobs, never our doses."""

    def put(values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if name in knobs:  # one more or less than when the checkpoint was taken
                knobs[name].put_back(value)

    return Part(KNOBS, lambda: {name: knob.own() for name, knob in knobs.items()}, put)


def generators() -> list[Part]:
    """Return the global random number generators of Python, numpy and torch, each as a part."""
    parts = [
        Part("rng.python", random.getstate, random.setstate),
        Part("rng.numpy", lambda: np.random.get_state(legacy=False), np.random.set_state),  # noqa: NPY002 - the global one
        Part("rng.torch", torch.get_rng_state, torch.set_rng_state),
    ]
    if torch.cuda.is_available():
        parts.append(Part(_CUDA, torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all))
    return parts


def read_part(p: Part) -> Any:  # noqa: ANN401
    """Return the state of a part, as the codec stores it."""
    return encode(p.get(), p.name)


def _put(p: Part, state: Any) -> None:  # noqa: ANN401
    try:
        p.put(state)
    except Exception as error:
        raise CheckpointError(f"{p.name} refused its state: {type(error).__name__}: {error}") from error


def _write(state: object, path: Path) -> None:
    try:
        with path.open("wb") as file:
            torch.save(state, file)
    except RuntimeError as error:  # torch hides a full disk behind one of its own
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        raise cause or error from None


def _load(path: Path, device: str | None) -> Any:  # noqa: ANN401
    return torch.load(path, map_location=device, weights_only=True)


def _form(value: Any) -> str:  # noqa: ANN401
    kind = str(getattr(value, "dtype", type(value).__name__)).removeprefix("torch.")
    return f"{kind} of shape {tuple(getattr(value, 'shape', ()))}"


def _told(error: BaseException) -> str:
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"


def copied(value: Any, device: str | None) -> Any:  # noqa: ANN401
    """Return an encoded state of its own, on the host where `device` says so."""
    if isinstance(value, torch.Tensor):
        return value.detach().to(value.device if device is None else device, copy=True)
    if isinstance(value, dict):
        return each(value, lambda _, child: copied(child, device))
    if isinstance(value, list | tuple):
        return type(value)(copied(v, device) for v in value)
    return value
