"""The fire drill on a torch training: every dose taken and lifted for real, then everything put back to the bit.

Each proof begins from the state that the training is in, and that state is put back after it. What the watchdog itself
remembers of the training (baselines, counters) is put aside meanwhile.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from grpo_watchdog.controls import Knob, Veto
from grpo_watchdog.drill import Proof, Result
from grpo_watchdog.integrations.torch_snapshot import Subject, aside, differs, everything, let_go, put_back

Loss = Callable[[], torch.Tensor]
_TENTH, _SHRUNK = 0.1, 0.25  # a ceiling at a tenth must leave less than a quarter of the update
_NUDGE = 0.05  # of the root mean square of a tensor: weights at which KL is not 0 and ratios are not 1
_SEED = 20_240_917


class FailedError(Exception):
    """What should have been so and is not."""


class UnprovenError(Exception):
    """Why something cannot be tried."""


def drill(subject: Subject, loss: Loss | None, more: Sequence[tuple[str, Callable[[], str]]] = ()) -> list[Proof]:
    """Return the proofs; the training is left as it was, to the bit.

    Args:
        subject: the training.
        loss: computes one loss of one batch, with gradients; None where there is none to be had.
        more: further proofs: a name, and what returns what it saw or raises.
    """
    range_ = _Range(subject, loss)
    tries = [
        ("learning_rate", range_.learning_rate),
        ("kl_coef", lambda: range_.seen_by_loss("kl_coef")),
        ("clip_epsilon", lambda: range_.seen_by_loss("clip_epsilon")),
        ("veto", range_.veto),
        ("pause", range_.pause),
        ("checkpoint", range_.checkpoint),
        ("scheduler", range_.scheduler),
        *more,
    ]
    before = everything(subject.parts)

    def undo() -> None:
        put_back(subject.parts, before)
        let_go(subject)

    proofs = []
    with aside(subject):
        for name, attempt in tries:
            proofs.append(_proof(name, attempt, undo))
    proofs.append(_proof("left as it was", lambda: _alike(before, everything(subject.parts)), lambda: None))
    return proofs


class _Range:
    """Where the proofs are tried."""

    def __init__(self, subject: Subject, loss: Loss | None) -> None:
        self.subject, self._loss = subject, loss
        self._held = [p for group in subject.optimizer.param_groups for p in group["params"] if p.requires_grad]
        self._gradients: list[torch.Tensor] | None = None

    def learning_rate(self) -> str:
        """Prove that a ceiling at a tenth leaves a tenth of the update, and that it lifts."""
        knob = self.subject.knobs.get("learning_rate")
        if knob is None:
            raise UnprovenError("there is no learning-rate knob: this optimizer finds its own rate")
        self._need_a_rate(knob)
        before = everything(self.subject.parts)
        free = self._update(before)
        knob.hold(_TENTH * knob.own())
        held = self._update(before)
        knob.release()
        again = self._update(before)
        size, small = _norm(free), _norm(held)
        if not size:
            raise FailedError("an optimizer step changes no weight at all")
        if small > _SHRUNK * size:
            raise FailedError(
                f"under a ceiling of a tenth the update is {small / size:.2f} of what it was: something raises it"
            )
        if not all(map(torch.equal, free, again)):
            raise FailedError("after the release the update is not what it was")
        return (
            f"under a ceiling of a tenth the update is {small / size:.3f} of what it was; lifted, the same to the bit"
        )

    def seen_by_loss(self, name: str) -> str:
        """Prove that the loss moves with a setting, and is what it was once that is released."""
        knob = self.subject.knobs.get(name)
        if knob is None:
            raise UnprovenError(f"there is no {name} knob: this dose cannot be given")
        if self._loss is None:
            raise UnprovenError("no loss to look at: dog.drill(loss=...) takes a function that computes one")
        self._nudge()
        own = knob.own()
        limit = max(10 * own, 1.0) if name == "kl_coef" else 1e-3 * own
        first, again = self._value(), self._value()
        if first != again:
            raise UnprovenError(
                "the loss is not the same twice, with the random numbers put back: nothing can be compared"
            )
        knob.hold(limit)
        held, read = self._value(), knob.read()
        knob.release()
        lifted = self._value()
        if not math.isclose(read, limit, rel_tol=1e-5):
            raise FailedError(f"held at {limit:g}, {knob.where} reads {read:g}")
        if held == first:
            more = ", or every ratio is 1 by construction (a loss of samples drawn a few updates ago has others)"
            raise FailedError(
                f"the loss is {first:.6g} with {own:g} and with {limit:g}, to the bit: nobody reads {knob.where}"
                f"{more if name == 'clip_epsilon' else ''}"
            )
        if lifted != first:
            raise FailedError(f"after the release the loss is {lifted:.6g}, and was {first:.6g}")
        return (
            f"with {own:g} held at {limit:g} the loss goes from {first:.6g} to {held:.6g}; lifted, the same to the bit"
        )

    def veto(self) -> str:
        """Prove that a gradient with a NaN in it changes nothing, and that a good one still does."""
        veto = self.subject.veto
        veto.arm(Veto())
        before = everything(self.subject.parts)
        gradients = [g.clone() for g in self._gradient()]
        gradients[-1].view(-1)[0] = math.nan
        self._step(gradients)
        _alike(before, everything(self.subject.parts), "a step with a NaN gradient changed")
        veto.vetoed()
        self._step(self._gradient())
        self._must_move(before)
        return "a NaN gradient left weights and moments as they were; the next step went through"

    def pause(self) -> str:
        """Prove that a paused optimizer changes nothing."""
        before = everything(self.subject.parts)
        self.subject.veto.pause(on=True)
        self._step(self._gradient())
        _alike(before, everything(self.subject.parts), "a paused step changed")
        self.subject.veto.pause(on=False)
        self._step(self._gradient())
        self._must_move(before)
        return "a paused step left weights and moments as they were; lifted, the next one went through"

    def checkpoint(self) -> str:
        """Prove that a checkpoint brings everything back, to the bit."""
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            self._step(self._gradient())  # so that there are moments to bring back
            before = everything(self.subject.parts)
            began = time.perf_counter()
            self.subject.save(folder)
            saved = time.perf_counter()
            for _ in range(2):
                self._step(self._gradient())
            self._nudge()
            torch.rand(1)
            changed = time.perf_counter()
            self.subject.restore(folder)
            restored = time.perf_counter()
            _alike(before, everything(self.subject.parts), "restored, it differs:")
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        return (
            f"{size / 1e6:.1f} MB, saved in {saved - began:.2f} s, restored in {restored - changed:.2f} s, "
            "the same to the bit"
        )

    def scheduler(self) -> str:
        """Prove that no scheduler turns this optimizer that a rollback would not bring back."""
        scheduled = any("initial_lr" in group for group in self.subject.optimizer.param_groups)
        if scheduled and not self.subject.scheduled:
            raise FailedError(
                "the optimizer has a scheduler that was not handed over: attach(..., scheduler=scheduler)"
            )
        return (
            "handed over: saved, restored and never disturbed" if scheduled else "there is none on this optimizer yet"
        )

    def _need_a_rate(self, knob: Knob) -> None:
        """Give the optimizer its base rate where a warm-up has it at 0 just now: the state is put back after."""
        if not knob.own():
            for group in self.subject.optimizer.param_groups:
                group["lr"] = group.get("initial_lr") or knob.base() or 1e-3

    def _update(self, before: Mapping[str, Any]) -> list[torch.Tensor]:
        """Return what one step changes, from a state that is put back first."""
        rates = [group["lr"] for group in self.subject.optimizer.param_groups]
        put_back(self.subject.parts, before)
        for group, rate in zip(self.subject.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        then = [p.detach().clone() for p in self._held]
        self._step(self._gradient())
        return [p.detach() - old for p, old in zip(self._held, then, strict=True)]

    def _step(self, gradients: Sequence[torch.Tensor]) -> None:
        for p, gradient in zip(self._held, gradients, strict=True):
            p.grad = gradient.clone()
        self.subject.optimizer.step()
        for p in self._held:
            p.grad = None

    def _gradient(self) -> list[torch.Tensor]:
        """Return a gradient: the loss's own where there is one, always the same."""
        if self._gradients is None:
            found: list[torch.Tensor | None] = [None] * len(self._held)
            if self._loss is not None:
                for p in self._held:
                    p.grad = None
                with _same_numbers():
                    self._loss().backward()
                found = [p.grad for p in self._held]
            source = torch.Generator().manual_seed(_SEED)
            self._gradients = []
            for p, own in zip(self._held, found, strict=True):
                made = 1e-3 * torch.randn(p.shape, generator=source)
                alive = own is not None and bool(own.isfinite().all()) and bool(own.any())
                self._gradients.append(own if alive and own is not None else made.to(p))
                p.grad = None
        return self._gradients

    def _value(self) -> float:
        assert self._loss is not None
        with _same_numbers():
            return float(self._loss().detach())

    @torch.no_grad()
    def _nudge(self) -> None:
        source = torch.Generator().manual_seed(_SEED)
        for p in self._held:
            size = float(p.float().square().mean().sqrt()) or 1.0
            p.add_((_NUDGE * size * torch.randn(p.shape, generator=source)).to(p))

    def _must_move(self, before: Mapping[str, Any]) -> None:
        try:
            _alike(before, everything(self.subject.parts))
        except FailedError:
            return
        raise FailedError("the next step changed nothing: it does not lift")


@contextmanager
def _same_numbers() -> Iterator[None]:
    """Draw the same random numbers each time."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(_SEED)
        yield


def _proof(what: str, attempt: Callable[[], str], undo: Callable[[], object]) -> Proof:
    began = time.perf_counter()
    result: Result = "fail"
    try:
        detail = attempt()
        result = "pass"
    except UnprovenError as error:
        detail, result = str(error), "unproven"
    except FailedError as error:
        detail = str(error)
    except Exception as error:  # noqa: BLE001 - a broken training is what a drill is for
        detail = f"{type(error).__name__}: {error}"
    finally:
        undo()
    return Proof(what, result, detail, time.perf_counter() - began)


def _alike(before: Mapping[str, Any], now: Mapping[str, Any], told: str = "not as it was:") -> str:
    """Return a word where two states are the same to the bit; raise where not, with what differs first."""
    for name, state in before.items():
        place = differs(state, now[name], name)
        if place:
            raise FailedError(f"{told} {place}")
    return "weights, moments, settings and random numbers are the same to the bit"


def _norm(tensors: Sequence[torch.Tensor]) -> float:
    return math.sqrt(sum(float(t.float().square().sum()) for t in tensors))
