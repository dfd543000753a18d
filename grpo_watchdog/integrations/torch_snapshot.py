"""What a drill is done on, and how all of it is copied, put aside, put back, and compared to the bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from grpo_watchdog.controls import DialKnob, Knob
from grpo_watchdog.integrations.torch_codec import decode
from grpo_watchdog.integrations.torch_state import Part, copied, read_part
from grpo_watchdog.integrations.torch_veto import GradientVeto


class Subject(NamedTuple):
    """A training that is drilled.

    Attributes:
        model: the policy.
        optimizer: the one that trains it.
        parts: everything that a checkpoint must bring back, each readable and writable.
        knobs: by metric name.
        veto: what skips optimizer steps.
        save: writes a checkpoint into an empty folder.
        restore: puts it back.
        memories: the watchdog's own objects that look on, and what each of them remembers, by attribute.
        scheduled: whether every scheduler of the optimizer was handed over.
    """

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    parts: Sequence[Part]
    knobs: Mapping[str, Knob]
    veto: GradientVeto
    save: Callable[[Path], object]
    restore: Callable[[Path], object]
    memories: Sequence[tuple[object, tuple[str, ...]]]
    scheduled: bool


def everything(parts: Sequence[Part]) -> dict[str, Any]:
    """Return copies of the states of all parts."""
    return {p.name: copied(read_part(p), None) for p in parts}


def put_back(parts: Sequence[Part], states: Mapping[str, Any]) -> None:
    """Put all states back."""
    for p in parts:
        p.put(decode(copied(states[p.name], None)))


@contextmanager
def aside(subject: Subject) -> Iterator[None]:
    """Put aside what a drill touches and no checkpoint holds: gradients, modes, knobs, hooks' memories."""
    optimizer = subject.optimizer
    held = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [(p, p.grad) for p in held]
    modes = [(module, module.training) for module in subject.model.modules()]
    inner = {name: value for name, value in vars(optimizer).items() if name not in ("state", "param_groups")}
    memories = [(owner, {n: copy.deepcopy(getattr(owner, n)) for n in names}) for owner, names in subject.memories]
    dials = [knob for knob in subject.knobs.values() if isinstance(knob, DialKnob)]
    turned = [(knob, knob.as_it_is()) for knob in dials]
    armed, paused = subject.veto.armed, subject.veto.paused
    let_go(subject)
    try:
        yield
    finally:
        for p, gradient in gradients:
            p.grad = gradient
        for module, mode in modes:
            module.training = mode
        subject.veto.pause(on=paused)
        subject.veto.arm(armed)
        for knob, state in turned:
            knob.put_as_it_was(state)
        for owner, remembered in memories:
            vars(owner).update(remembered)
        for name in vars(optimizer).keys() - inner.keys() - {"state", "param_groups"}:
            delattr(optimizer, name)
        vars(optimizer).update(inner)


def let_go(subject: Subject) -> None:
    """Release every knob, and veto nothing, by no standard that the run has set."""
    for knob in subject.knobs.values():
        knob.release()
    subject.veto.pause(on=False)
    subject.veto.arm(None)
    subject.veto.afresh()


def differs(a: Any, b: Any, place: str) -> str:  # noqa: ANN401
    """Return where two encoded states differ, or ""."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return "" if a.shape == b.shape and a.dtype == b.dtype and _bits(a).equal(_bits(b)) else place
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return f"{place}: {min(map(str, a.keys() ^ b.keys()))}"
        return next((found for key in a if (found := differs(a[key], b[key], f"{place}.{key}"))), "")
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return place
        return next((f for n, (x, y) in enumerate(zip(a, b, strict=True)) if (f := differs(x, y, f"{place}.{n}"))), "")
    same = a == b or (a != a and b != b)  # noqa: PLR0124 - NaN
    return "" if same else place


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8) if tensor.numel() else tensor.detach().cpu()
