"""How a state is written so that `torch.load(weights_only=True)` gives it back exactly, without running any code.

Tensors, numbers, text, lists, tuples and dicts stay as they are. Everything else that is allowed becomes a
tagged dict. What is not allowed (an object of a user's class, a subclass of dict or tuple) is refused by name:
coming back as something else would be worse than not coming back.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from grpo_watchdog.errors import ConfigurationError

_KIND = "__kind__"
_MAPPINGS: dict[str, Any] = {kind.__name__: kind for kind in (dict, OrderedDict, Counter, defaultdict)}
_SERIES: dict[str, Any] = {kind.__name__: kind for kind in (set, frozenset, deque)}
_FACTORIES: dict[Any, Any] = {kind.__name__: kind for kind in (int, float, str, bool, list, dict, set, tuple)}
_SMALL_INT = 1000  # bits; torch's reader stops at 2040
ALLOWED = (
    "allowed: None, numbers, text, bytes, tensors, numeric numpy arrays, and dicts (OrderedDict, Counter, defaultdict "
    "of a builtin), lists, tuples, sets and deques of these"
)


def encode(value: Any, where: str) -> Any:  # noqa: ANN401
    """Return a state in the form that is written. Tensors are not copied.

    Args:
        value: the state.
        where: what to call it in an error.

    Raises:
        ConfigurationError: something in it cannot be stored; says where it is.
    """
    kind = type(value)
    if isinstance(value, torch.Tensor):
        return value.detach()
    if kind in (list, tuple):
        return kind(encode(v, f"{where}[{i}]") for i, v in enumerate(value))
    if kind in (dict, OrderedDict) and _KIND not in value and all(map(_plain, value)):
        return each(value, lambda key, child: encode(child, f"{where}[{key!r}]"))
    if kind in _MAPPINGS.values():
        return _mapping(value, where)
    if kind in _SERIES.values():
        tag = {_KIND: kind.__name__, "items": [encode(v, f"{where}[{i}]") for i, v in enumerate(value)]}
        return {**tag, "maxlen": value.maxlen} if kind is deque else tag
    return _leaf(value, where)


def decode(value: Any) -> Any:  # noqa: ANN401
    """Return what `encode` was given."""
    if isinstance(value, list | tuple):
        return type(value)(map(decode, value))
    if not isinstance(value, dict):
        return value
    if _KIND not in value:
        return each(value, lambda _, child: decode(child))
    kind = value[_KIND]
    if kind in _MAPPINGS:
        return _unmapping(value)
    if kind in _SERIES:
        items = map(decode, value["items"])
        return deque(items, maxlen=value["maxlen"]) if kind == "deque" else _SERIES[kind](items)
    return _unleaf(value)


def each(value: dict[Any, Any], change: Callable[[Any, Any], Any]) -> dict[Any, Any]:
    """Return a dict, or an OrderedDict where it was one, with `change(key, child)` for every child.

    A module's state_dict is an OrderedDict that carries the versions of its modules as an attribute: they are kept.
    """
    if type(value) is dict:
        return {k: change(k, v) for k, v in value.items()}
    made = OrderedDict((k, change(k, v)) for k, v in value.items())
    if hasattr(value, "_metadata"):
        made._metadata = value._metadata  # type: ignore[attr-defined]  # noqa: SLF001
    return made


def _plain(value: Any) -> bool:  # noqa: ANN401
    kind = type(value)
    return value is None or kind in (bool, float, str) or (kind is int and value.bit_length() <= _SMALL_INT)


def _mapping(value: Any, where: str) -> dict[Any, Any]:  # noqa: ANN401
    kind = type(value)
    for key in value:
        if isinstance(key, torch.Tensor):
            raise ConfigurationError(f"{where} has a tensor as a key, which is found by identity only; {ALLOWED}")
    pairs = [(encode(k, f"{where}: the key {k!r}"), encode(v, f"{where}[{k!r}]")) for k, v in value.items()]
    tag: dict[Any, Any] = {_KIND: kind.__name__, "pairs": pairs}
    if kind is defaultdict and value.default_factory is not None:
        factory = getattr(value.default_factory, "__name__", "")
        if _FACTORIES.get(factory) is not value.default_factory:
            raise ConfigurationError(f"{where} is a defaultdict of {value.default_factory!r}, which is code; {ALLOWED}")
        tag["factory"] = factory
    return tag


def _unmapping(value: dict[str, Any]) -> Any:  # noqa: ANN401
    items: dict[Any, Any] = {decode(k): decode(v) for k, v in value["pairs"]}
    if value[_KIND] == "defaultdict":
        return defaultdict(_FACTORIES.get(value.get("factory")), items)
    return _MAPPINGS[value[_KIND]](items)


def _leaf(value: Any, where: str) -> Any:  # noqa: ANN401
    if _plain(value):
        return value
    kind = type(value)
    if kind is int:
        return {_KIND: "int", "hex": hex(value)}
    if kind is bytes:
        return {_KIND: "bytes", "data": _raw(value)}
    if kind is np.ndarray and value.dtype.kind in "biufc":
        shape = list(value.shape)
        return {_KIND: "ndarray", "dtype": value.dtype.str, "shape": shape, "data": _raw(value.tobytes())}
    if isinstance(value, np.generic) and value.dtype.kind in "biufc":
        return {_KIND: "scalar", "dtype": value.dtype.str, "shape": [], "data": _raw(value.tobytes())}
    shown = f"a numpy {kind.__name__} of {value.dtype}" if isinstance(value, np.ndarray) else f"a {kind.__qualname__}"
    raise ConfigurationError(f"{where} is {shown}, which a checkpoint cannot hold; {ALLOWED}")


def _unleaf(value: dict[str, Any]) -> Any:  # noqa: ANN401
    if value[_KIND] == "int":
        return int(value["hex"], 16)
    data = value["data"].numpy().tobytes()
    if value[_KIND] == "bytes":
        return data
    array = np.frombuffer(data, dtype=value["dtype"]).reshape(value["shape"]).copy()
    return array if value[_KIND] == "ndarray" else array[()]


def _raw(data: bytes) -> torch.Tensor:
    return torch.tensor(np.frombuffer(data, dtype=np.uint8))
