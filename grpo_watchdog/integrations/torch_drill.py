"""The fire drill on a torch training: every dose taken and lifted for real, then everything put back to the bit.

Each proof begins from the state that the training is in, and that state is put back after it. What the watchdog itself
remembers of the training (baselines, counters) is put aside meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from grpo_watchdog.drill import Proof, Result
from grpo_watchdog.integrations.torch_proofs import FailedError, Loss, Range, UnprovenError, alike
from grpo_watchdog.integrations.torch_snapshot import HEAVY, Subject, aside, everything, let_go, put_back, strays


def drill(subject: Subject, loss: Loss | None, more: Sequence[tuple[str, Callable[[], str]]] = ()) -> list[Proof]:
    """Return the proofs; the training is left as it was, to the bit.

    Args:
        subject: the training.
        loss: computes one loss of one batch, with gradients; None where there is none to be had.
        more: further proofs: a name, and what returns what it saw or raises. One named as one of ours replaces it.
    """
    began = time.perf_counter()
    try:
        subject = subject._replace(parts=[*subject.parts, *strays(subject)])
        before = everything(subject.parts)
    except Exception as error:  # noqa: BLE001 - nothing was touched yet
        return [Proof("copy of everything", "fail", _told(error), time.perf_counter() - began)]
    with aside(subject) as in_place:

        def undo() -> None:
            let_go(subject)
            in_place()
            for p in subject.parts:
                if p.name not in HEAVY:
                    with suppress(Exception):  # a part that refuses its own state: the last proof tells
                        put_back([p], before)

        range_ = Range(subject, loss, before, in_place)
        tries: dict[str, Callable[[], str]] = {
            "learning_rate": range_.learning_rate,
            "kl_coef": lambda: range_.seen_by_loss("kl_coef"),
            "clip_epsilon": lambda: range_.seen_by_loss("clip_epsilon"),
            "veto": range_.veto,
            "pause": range_.pause,
            "checkpoint": range_.checkpoint,
            "scheduler": range_.scheduler,
            **({"grad_norm_limit": range_.grad_norm_limit} if "grad_norm_limit" in subject.knobs else {}),
            **dict(more),
        }
        proofs = [_proof(name, attempt, undo) for name, attempt in tries.items()]
        if range_.untold:
            proofs.append(Proof("what else is saved", "unproven", "; ".join(range_.untold), 0.0))
        proofs.append(_proof("left as it was", lambda: alike(before, everything(subject.parts)), lambda: None))
    return proofs


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
        detail = _told(error)
    finally:
        undo()
    return Proof(what, result, detail, time.perf_counter() - began)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
