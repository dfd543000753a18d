"""What a drill is done on, and how all of it is copied, put aside, put back, and compared to the bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from grpo_watchdog.controls import DialKnob, Knob
from grpo_watchdog.integrations.torch_codec import decode, each
from grpo_watchdog.integrations.torch_state import Part, copied, read_part
from grpo_watchdog.integrations.torch_veto import GradientVeto

HEAVY = ("model", "optimizer")


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
    """Return copies of the states of all parts; those of the large ones are kept on the host."""
    return {p.name: _kept(read_part(p)) if p.name in HEAVY else copied(read_part(p), None) for p in parts}


def put_back(parts: Sequence[Part], states: Mapping[str, Any]) -> None:
    """Put all states back."""
    for p in parts:
        p.put(decode(copied(states[p.name], None)))


def strays(subject: Subject) -> list[Part]:
    """Return the trained weights that no part holds, as a part: a checkpoint will not bring them back, a drill must."""
    there = {t.data_ptr() for p in subject.parts for t in _tensors(read_part(p))}
    lost = [p for p in trained(subject.optimizer) if p.data_ptr() not in there]

    @torch.no_grad()
    def put(states: Sequence[torch.Tensor]) -> None:
        for p, state in zip(lost, states, strict=True):
            p.copy_(state)

    return (
        [Part("trained weights in nothing that was handed over (state=...)", lambda: list(lost), put)] if lost else []
    )


def trained(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Return what the optimizer trains."""
    return [p for group in optimizer.param_groups for p in group["params"]]


@contextmanager
def aside(subject: Subject) -> Iterator[Callable[[], None]]:
    """Put aside what a drill touches: weights, moments, gradients, modes, knobs, hooks' memories.

    Yields what puts weights, moments and gradients back meanwhile: the very objects, with the very bits. Going by way
    of `load_state_dict` would make others, and some types of moments come back from it rounded.
    """
    optimizer = subject.optimizer
    undo = _in_place(subject)
    modes = [(module, module.training) for module in subject.model.modules()]
    inner = {name: value for name, value in vars(optimizer).items() if name not in ("state", "param_groups")}
    memories = [(owner, {n: copy.deepcopy(getattr(owner, n)) for n in names}) for owner, names in subject.memories]
    dials = [knob for knob in subject.knobs.values() if isinstance(knob, DialKnob)]
    turned = [(knob, knob.as_it_is()) for knob in dials]
    armed, paused = subject.veto.armed, subject.veto.paused
    try:
        let_go(subject)
        yield undo
    finally:
        undo()
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


def _in_place(subject: Subject) -> Callable[[], None]:
    """Return what puts weights, buffers, moments and gradients back into the objects that hold them now."""
    optimizer, held = subject.optimizer, trained(subject.optimizer)
    learning = [p for p in subject.model.parameters() if p.requires_grad]
    weights = {id(t): (t, _kept(t)) for t in (*learning, *subject.model.buffers(), *held)}
    gradients = [(p, p.grad) for p in held]
    groups, states = optimizer.param_groups, optimizer.state
    in_groups = [(group, _contents(group)) for group in groups]
    in_states = [(p, state, _contents(state)) for p, state in states.items()]

    @torch.no_grad()
    def undo() -> None:
        for tensor, kept in weights.values():
            tensor.copy_(kept)
        for p, gradient in gradients:
            p.grad = gradient
        optimizer.param_groups, optimizer.state = groups, states
        groups[:] = [group for group, _ in in_groups]
        for group, contents in in_groups:
            _refill(group, contents)
        states.clear()
        for p, state, contents in in_states:
            _refill(state, contents)
            states[p] = state

    return undo


def _contents(there: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return what a record of an optimizer holds: name, object, copy; the weights in it are not copied."""

    def copy_of(name: str, value: Any) -> Any:  # noqa: ANN401
        if isinstance(value, torch.Tensor):
            return _kept(value)
        return value if name == "params" else copied(value, None)

    return [(name, value, copy_of(name, value)) for name, value in there.items()]


def _refill(there: dict[str, Any], contents: Sequence[tuple[str, Any, Any]]) -> None:
    there.clear()
    for name, value, kept in contents:
        if isinstance(value, torch.Tensor):
            value.copy_(kept)
            there[name] = value
        else:
            there[name] = kept if name == "params" else copied(kept, None)


def _kept(value: Any) -> Any:  # noqa: ANN401
    """Return a copy; of what is large, on the host: a second training beside the first may not fit on a device."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu" if value.numel() > 1 else value.device, copy=True)
    if isinstance(value, dict):
        return each(value, lambda _, child: _kept(child))
    return type(value)(map(_kept, value)) if type(value) in (list, tuple) else value


def _tensors(value: Any) -> Iterator[torch.Tensor]:  # noqa: ANN401
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for child in value.values() if isinstance(value, dict) else value:
            yield from _tensors(child)


def let_go(subject: Subject) -> None:
    """Release every knob, and veto nothing, by no standard that the run has set."""
    for knob in subject.knobs.values():
        knob.release()
    subject.veto.pause(on=False)
    subject.veto.arm(None)
    subject.veto.afresh()


def differs(a: Any, b: Any, place: str) -> str:  # noqa: ANN401
    """Return where two encoded states differ, or ""."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return "" if _same(a, b) else place
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


def _same(a: Any, b: Any) -> bool:  # noqa: ANN401
    both = isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
    return both and a.shape == b.shape and a.dtype == b.dtype and _bits(a).equal(_bits(b))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8) if tensor.numel() else tensor.detach().cpu()
