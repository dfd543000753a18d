"""Other numbers: weights, settings and draws that are not what they were, for something to be seen in a drill.

What a checkpoint holds can only be seen to come back where it was something else meanwhile.
"""

from __future__ import annotations

import math
import random
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

from grpo_watchdog.integrations.torch_codec import decode, each, encode
from grpo_watchdog.integrations.torch_snapshot import differs
from grpo_watchdog.integrations.torch_state import Part, copied, read_part

SEED = 20_240_917
_NUDGE = 0.05  # of the root mean square of a tensor: weights at which KL is not 0 and ratios are not 1
_RAW = (torch.uint8, torch.bool, np.dtype("uint8"), np.dtype("bool"))  # flags, and bytes that mean something
_MERSENNE = 625  # numbers in the state of Python's random


class Stirred(NamedTuple):
    """What came of putting other numbers into the parts of a training.

    Attributes:
        dropped: places in a state that its load leaves alone, although it takes others.
        untold: a sentence for each part of which cannot be told whether it would come back.
    """

    dropped: list[str]
    untold: list[str]


def stir(parts: Sequence[Part]) -> Stirred:
    """Put other numbers into parts, and look what shows; a part that refuses them is left as it was."""
    dropped, untold = list[str](), list[str]()
    for p in parts:
        was = copied(read_part(p), None)
        wanted = encode(stirred(decode(copied(was, None))), p.name)
        try:
            p.put(decode(copied(wanted, None)))
        except Exception as error:  # noqa: BLE001 - it may well know that these are not its own
            p.put(decode(copied(was, None)))
            untold.append(f"{p.name} refuses other numbers ({type(error).__name__}), so nobody saw them come back")
            continue
        shown = list(_took(was, wanted, read_part(p), p.name))
        if shown and not any(changed for _, changed in shown):
            untold.append(f"{p.name} shows nothing of a state that is put into it: it takes it up later, or drops it")
        else:
            dropped += [place for place, changed in shown if not changed]
    return Stirred(dropped, untold)


def stirred(value: Any) -> Any:  # noqa: ANN401
    """Return a state with other numbers in it; flags, raw bytes and random number generators stay."""
    kind = type(value)
    if kind is int:
        return value + 1
    if kind is float:
        return 1.5 * value + 1 if math.isfinite(value) else value
    if isinstance(value, torch.Tensor | np.ndarray):
        return value if value.dtype in _RAW else value + 1
    if kind in (dict, OrderedDict):
        return value if "bit_generator" in value else each(value, lambda _, child: stirred(child))
    if kind is tuple and any(isinstance(v, tuple) and len(v) == _MERSENNE for v in value):
        return value
    return kind(map(stirred, value)) if kind in (list, tuple) else value


def draw() -> None:
    """Draw from every global random number generator."""
    random.random()
    np.random.random()  # noqa: NPY002 - the global one
    torch.rand(1)
    for device in range(torch.cuda.device_count()):
        torch.rand(1, device=f"cuda:{device}")


@torch.no_grad()
def nudge(weights: Iterable[torch.Tensor]) -> None:
    """Move weights a little, always the same way."""
    source = torch.Generator().manual_seed(SEED)
    for p in weights:
        size = float(p.float().square().mean().sqrt()) or 1.0
        p.add_((_NUDGE * size * torch.randn(p.shape, generator=source)).to(p))


@contextmanager
def same_numbers() -> Iterator[None]:
    """Draw the same random numbers each time, from Python, numpy and torch."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    pythons, numpys = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global one
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(SEED)
            random.seed(SEED)
            np.random.seed(SEED)  # noqa: NPY002
            yield
    finally:
        random.setstate(pythons)
        np.random.set_state(numpys)  # noqa: NPY002


def _took(was: Any, wanted: Any, now: Any, place: str) -> Iterator[tuple[str, bool]]:  # noqa: ANN401
    """Yield, for all in an encoded state that was to change, its place and whether it did."""
    if not differs(was, wanted, place):
        return
    if isinstance(was, dict) and isinstance(now, dict) and was.keys() == now.keys() and "__kind__" not in was:
        keys: Iterable[Any] = was
    elif isinstance(was, list | tuple) and isinstance(now, list | tuple) and len(was) == len(now):
        keys = range(len(was))
    else:
        yield place, bool(differs(was, now, place))
        return
    for key in keys:
        yield from _took(was[key], wanted[key], now[key], f"{place}.{key}")
