"""The whole state of a torch training: written finite or not at all, restored whole or not at all."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from grpo_watchdog.errors import CheckpointError, ConfigurationError

_MODEL, _REST, _KIND = "model.pt", "training.pt", "__kind__"


class Part(NamedTuple):
    """One thing that has state: how it is read and how it is put back."""

    name: str
    get: Callable[[], Any]
    put: Callable[[Any], object]


def part(name: str, owner: Any) -> Part:  # noqa: ANN401
    """Return the part for whatever a user hands over.

    Args:
        name: what to call it.
        owner: something with state_dict and load_state_dict, a torch or numpy Generator, or a (get, put) pair of functions.

    Raises:
        ConfigurationError: it is none of these, or its state holds something that cannot be stored.
    """
    if isinstance(owner, torch.Generator):
        made = Part(name, owner.get_state, owner.set_state)
    elif isinstance(owner, np.random.Generator):
        bits = owner.bit_generator
        made = Part(name, lambda: bits.state, lambda state: setattr(bits, "state", state))
    elif hasattr(owner, "state_dict") and hasattr(owner, "load_state_dict"):
        made = Part(name, owner.state_dict, owner.load_state_dict)
    elif isinstance(owner, tuple) and len(owner) == 2 and all(map(callable, owner)):  # noqa: PLR2004
        made = Part(name, owner[0], owner[1])
    else:
        raise ConfigurationError(
            f"{name} is a {type(owner).__name__}: it needs state_dict and load_state_dict, or be a torch or numpy Generator, "
            "or a (get, put) pair of functions"
        )
    encode(made.get(), name)
    return made


class TrainingState:
    """Saves and restores a list of parts and all random number generators.

    Args:
        model: its parameters and buffers go into a file of their own.
        parts: optimizer, scheduler, scaler and whatever else; restored in this order.
    """

    def __init__(self, model: torch.nn.Module, parts: Iterable[Part]) -> None:
        """Keep references; copy nothing."""
        self._model = model
        self._parts = [*parts, *_generators()]

    def save(self, folder: Path) -> None:
        """Write everything into a folder.

        Raises:
            CheckpointError: a parameter or an optimizer moment is not finite: such a state is not worth keeping.
        """
        state = self._capture()
        sick = first_nonfinite(_tensors(state, ""))
        if sick:
            raise CheckpointError(f"{sick} is not finite: this state is not kept")
        torch.save(state.pop("model"), folder / _MODEL)
        torch.save(state, folder / _REST)

    def restore(self, folder: Path) -> None:
        """Put everything back, and drop the gradients that the sick model left.

        Raises:
            CheckpointError: the files do not fit this training, or a part refused its state; then everything is as it was.
        """
        try:
            wanted = torch.load(folder / _REST, map_location="cpu", weights_only=True)
            wanted["model"] = torch.load(folder / _MODEL, map_location="cpu", weights_only=True)
        except Exception as error:
            raise CheckpointError(f"{folder.name} cannot be loaded: {type(error).__name__}: {error}") from error
        self._fits(wanted, folder.name)
        before = _copied(self._capture())
        try:
            self._put(wanted)
        except Exception as error:
            self._put(before)
            raise CheckpointError(f"{folder.name} does not fit this training, nothing is changed: {error}") from error
        for parameter in self._model.parameters():
            parameter.grad = None

    def _capture(self) -> dict[str, Any]:
        state = {p.name: encode(p.get(), p.name) for p in self._parts}
        return {"model": dict(self._model.state_dict()), **state}

    def _put(self, state: Mapping[str, Any]) -> None:
        self._model.load_state_dict(state["model"], strict=True)
        for p in self._parts:
            p.put(decode(state[p.name]))

    def _fits(self, wanted: Mapping[str, Any], name: str) -> None:
        missing = [p.name for p in self._parts if p.name not in wanted]
        live = self._model.state_dict()
        if missing or set(live) != set(wanted["model"]):
            what = missing or sorted(set(live) ^ set(wanted["model"]))[:3]
            raise CheckpointError(f"{name} does not fit this training: {', '.join(map(str, what))} in only one of them")
        for key, tensor in live.items():
            if tensor.shape != wanted["model"][key].shape:
                shapes = f"{tuple(wanted['model'][key].shape)} there, {tuple(tensor.shape)} here"
                raise CheckpointError(f"{name} does not fit this training: {key} is {shapes}")


def first_nonfinite(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return the name of the first tensor that holds NaN or infinity, or "". One norm a tensor where all are finite."""
    floats = [(n, t) for n, t in named if t.is_floating_point() and t.numel()]
    by_kind: dict[tuple[torch.device, torch.dtype], list[tuple[str, torch.Tensor]]] = {}
    for name, tensor in floats:
        by_kind.setdefault((tensor.device, tensor.dtype), []).append((name, tensor.detach()))
    for group in by_kind.values():
        norms = torch._foreach_norm([t for _, t in group])  # noqa: SLF001 - two orders faster than isfinite a tensor
        if bool(torch.isfinite(torch.stack(list(norms)).sum())):
            continue
        for name, tensor in group:  # a norm may overflow where every element is finite
            if not bool(torch.isfinite(tensor).all()):
                return name
    return ""


def encode(value: Any, where: str) -> Any:  # noqa: ANN401
    """Return a state as what `torch.load(weights_only=True)` takes back: numpy arrays and odd containers are tagged.

    Raises:
        ConfigurationError: something in it cannot be stored; says where it is.
    """
    if value is None or isinstance(value, bool | int | float | str | bytes | torch.Tensor):
        return value if not isinstance(value, np.generic) else value.item()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return {_KIND: "ndarray", "dtype": str(value.dtype), "shape": list(value.shape), "data": value.tobytes()}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Counter | OrderedDict | dict):
        items = {k: encode(v, f"{where}[{k!r}]") for k, v in value.items()}
        return items if type(value) is dict else {_KIND: type(value).__name__, "items": items}
    if isinstance(value, list | tuple | deque | set):
        items_list = [encode(v, f"{where}[{i}]") for i, v in enumerate(value)]
        if type(value) in (list, tuple):
            return items_list if type(value) is list else tuple(items_list)
        tail = {"maxlen": value.maxlen} if isinstance(value, deque) else {}
        return {_KIND: type(value).__name__, "items": items_list, **tail}
    raise ConfigurationError(
        f"{where} is a {type(value).__name__}, which a checkpoint cannot hold; allowed: numbers, text, bytes, None, tensors, numeric "
        "numpy arrays, and dicts, lists, tuples, sets and deques of these"
    )


def decode(value: Any) -> Any:  # noqa: ANN401
    """Return what `encode` was given."""
    if isinstance(value, dict):
        match value.get(_KIND):
            case None:
                return {k: decode(v) for k, v in value.items()}
            case "ndarray":
                return np.frombuffer(value["data"], dtype=value["dtype"]).reshape(value["shape"]).copy()
            case "deque":
                return deque(map(decode, value["items"]), maxlen=value["maxlen"])
            case "set":
                return set(map(decode, value["items"]))
            case "Counter":
                return Counter({k: decode(v) for k, v in value["items"].items()})
            case _:
                return OrderedDict((k, decode(v)) for k, v in value["items"].items())
    if isinstance(value, list | tuple):
        return type(value)(map(decode, value))
    return value


def _generators() -> list[Part]:
    parts = [
        Part("rng.python", random.getstate, random.setstate),
        Part("rng.numpy", lambda: np.random.get_state(legacy=False), np.random.set_state),  # noqa: NPY002 - the global one
        Part("rng.torch", torch.get_rng_state, torch.set_rng_state),
    ]
    if torch.cuda.is_available():
        parts.append(Part("rng.cuda", torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all))
    return parts


def _tensors(value: Any, where: str) -> Iterable[tuple[str, torch.Tensor]]:  # noqa: ANN401
    if isinstance(value, torch.Tensor):
        yield where, value
    elif isinstance(value, Mapping):
        for key, child in value.items():
            yield from _tensors(child, f"{where}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        for index, child in enumerate(value):
            yield from _tensors(child, f"{where}[{index}]")


def _copied(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {k: _copied(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_copied, value))
    return value
