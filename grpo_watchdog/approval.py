"""Approval: in the mode `approve` an intervention waits for a yes, from a callback or from a file in run_dir.

The question lies in `run_dir/approve/0001.json`; an empty file `0001.yes` or `0001.no` beside it is the answer
(`grpo-watchdog approve RUN_DIR yes` writes it). After `approve_within` observations the policy's default is the answer.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from grpo_watchdog.actions import KNOB_ACTIONS, Order, Outcome
from grpo_watchdog.rulebook import Policy
from grpo_watchdog.watch import Finding

FOLDER = "approve"
ANSWERED, DECLINED = "answered", "declined"
_log = logging.getLogger("grpo_watchdog")
_ASKED = frozenset({*KNOB_ACTIONS, "rollback", "pause", "halt"})
Asker = Callable[[Mapping[str, Any]], bool | None]
"""Given a question (number, step, until, orders, reason); returns True, False, or None while it has no answer."""


class Question(NamedTuple):
    """What is waiting for a yes.

    Attributes:
        number: counts up over the run.
        step: the step at which it was asked.
        asked: the observation at which it was asked.
        orders: what would be done; brought up to date while it waits.
    """

    number: int
    step: int
    asked: int
    orders: tuple[Order, ...]

    def as_json(self, within: int) -> dict[str, Any]:
        """Return what a person is shown."""
        orders = [{"action": o.action, "target": o.target, "rule": o.rule, "reason": o.reason} for o in self.orders]
        return {"number": self.number, "step": self.step, "within": within, "orders": orders}


def needs_a_yes(order: Order) -> bool:
    """Return whether an order touches the run: letting go of a limit and taking a checkpoint do not wait."""
    return order.action in _ASKED and not (order.release or order.loosens)


class Side(Protocol):
    """Where questions go and answers come from; a replay plays the answers back."""

    def ask(self, question: Mapping[str, Any]) -> None:
        """Put a question to the user."""
        ...

    def answer(self, question: Mapping[str, Any]) -> bool | None:
        """Return the answer to a question, or None while there is none."""
        ...

    def settled(self, number: int) -> None:
        """Learn that a question needs no answer any more."""
        ...


class Sink(Protocol):
    """Where entries of the journal go."""

    def append(self, entry: Mapping[str, Any], *, flush: bool = True) -> None:
        """Append one entry."""
        ...


class Approvals:
    """Holds back what touches the run until its question has an answer; one question is open at a time.

    Args:
        policy: the rulebook's.
        side: where questions go.
        sink: where the questions and answers are written down.
    """

    def __init__(self, policy: Policy, side: Side, sink: Sink) -> None:
        """Start with nothing asked."""
        self._policy, self._side, self._sink = policy, side, sink
        self._open: Question | None = None
        self._count = 0  # questions so far, an earlier session's included
        self._now = 0  # observations

    def sift(self, orders: list[Order], findings: Sequence[Finding], step: int) -> tuple[list[Order], list[Order]]:
        """Return what may be done now, and what was declined.

        Args:
            orders: what the plan wants done.
            findings: what fires: where no rule that asked does any more, the question is withdrawn.
            step: the step's number.
        """
        if self._policy.mode != "approve":
            return orders, []
        self._now += 1
        asking, free = [o for o in orders if needs_a_yes(o)], [o for o in orders if not needs_a_yes(o)]
        question, within = self._open, self._policy.approve_within
        if question is None:
            if not asking:
                return free, []
            question = self._ask(asking, step, self._now)
        elif not {(o.action, o.rule) for o in asking} <= {(o.action, o.rule) for o in question.orders}:
            self._settle(question, step, "more is asked for", yes=None)  # a yes is to what was asked, and no more
            question = self._ask(asking, step, self._now)
        elif asking:
            question = question._replace(orders=tuple(asking))
        elif {f.rule for f in findings}.isdisjoint(o.rule for o in question.orders):
            self._settle(question, step, "the trouble is over", yes=None)
            return free, []
        self._open = question
        answer = self._side.answer(question.as_json(within))
        if answer is None and self._now - question.asked < within:
            return free, []
        how = ANSWERED
        if answer is None:
            how, answer = f"no answer within {within} observations", self._policy.approve_default == "yes"
        self._settle(question, step, how, yes=answer)
        return ([*free, *question.orders], []) if answer else (free, list(question.orders))

    def count_from(self, number: int) -> None:
        """Go on counting from an earlier session's last question."""
        self._count = number

    def state_dict(self) -> dict[str, Any]:
        """Return the open question as JSON-able values."""
        return {"open": self._open, "count": self._count, "now": self._now}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self._count, self._now, asked = state["count"], state["now"], state["open"]
        self._open = None if asked is None else _question(*asked)

    def _ask(self, orders: Sequence[Order], step: int, asked: int) -> Question:
        self._count += 1
        question = Question(self._count, step, asked, tuple(orders))
        shown = question.as_json(self._policy.approve_within)
        self._sink.append({"kind": "question", **shown})
        self._side.ask(shown)
        return question

    def _settle(self, question: Question, step: int, how: str, *, yes: bool | None) -> None:
        self._sink.append({"kind": "answer", "step": step, "number": question.number, "yes": yes, "how": how})
        self._side.settled(question.number)
        self._open = None


def refused(order: Order, step: int) -> Outcome:
    """Return what became of an order that was declined."""
    return Outcome(step, order.action, None, order.target, order.rule, order.reason, held_back=DECLINED)


class Desk:
    """Where questions are put and answers come in. Trouble here is logged and counts as no answer.

    Args:
        folder: of the run, or None where there is none.
        asker: a callback, or None.
    """

    def __init__(self, folder: Path | None, asker: Asker | None) -> None:
        """Touch nothing."""
        self._folder = None if folder is None else folder / FOLDER
        self._asker = asker
        self._swept = False

    def clear(self) -> int:
        """Mark what an earlier session asked as settled; return the number of its last question, 0 for none."""
        asked = [] if self._folder is None else sorted(self._folder.glob("[0-9]*.json"))
        for path in asked:
            self.settled(int(path.stem))
        return int(asked[-1].stem) if asked else 0

    def ask(self, question: Mapping[str, Any]) -> None:
        """Put a question down."""
        _log.warning("waits for a yes: %s", told(question))
        if self._folder is None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            earlier = f"{question['number']:04d}.*" if self._swept else "[0-9]*.*"  # of a session before this one
            for left in self._folder.glob(earlier):
                left.unlink(missing_ok=True)
            self._swept = True
            (self._folder / f"{question['number']:04d}.json").write_text(json.dumps(question, indent=1))
        except OSError as error:
            _log.warning("the question cannot be written: %s", error)

    def answer(self, question: Mapping[str, Any]) -> bool | None:
        """Return the answer, or None while there is none."""
        if self._asker is not None:
            try:
                given = self._asker(question)
            except Exception:  # noqa: BLE001 - a stranger's callback must not end the training
                _log.exception("the approve callback failed; the question stays open")
                given = None
            if given is not None:
                return bool(given)
        if self._folder is None:
            return None
        for answer, meaning in (("no", False), ("yes", True)):  # where both are there, nothing is done
            if (self._folder / f"{question['number']:04d}.{answer}").exists():
                return meaning
        return None

    def settled(self, number: int) -> None:
        """Mark a question as settled: an answer that comes later changes nothing."""
        if self._folder is not None and self._folder.is_dir():
            try:
                (self._folder / f"{number:04d}.over").touch()
            except OSError as error:
                _log.warning("the question cannot be marked as settled: %s", error)


def told(question: Mapping[str, Any]) -> str:
    """Return a question as one line."""
    orders: Sequence[Mapping[str, Any]] = question["orders"]
    what = ", ".join(o["action"] + ("" if o["target"] is None else f" {o['target']:g}") for o in orders)
    why = orders[0]["reason"] if orders else "?"
    return f"{what}? ({why}); asked at step {question['step']}, open for {question['within']} observations"


def open_question(run_dir: Path) -> dict[str, Any] | None:
    """Return the newest question in a run's folder that has no answer yet, or None."""
    for path in sorted((run_dir / FOLDER).glob("[0-9]*.json"), reverse=True):
        if not any(path.with_suffix(f".{answer}").exists() for answer in ("yes", "no", "over")):
            try:
                question: dict[str, Any] = json.loads(path.read_text())
            except (OSError, ValueError):
                continue
            return question
        return None
    return None


def write_answer(run_dir: Path, number: int, answer: Literal["yes", "no"]) -> None:
    """Answer a question of a run."""
    (run_dir / FOLDER / f"{number:04d}.{answer}").touch()


def _question(number: int, step: int, asked: int, orders: Sequence[Sequence[Any]]) -> Question:
    """Return a question that went through JSON."""
    restored = [Order(*row)._replace(checkpoints=tuple(row[Order._fields.index("checkpoints")])) for row in orders]
    return Question(number, step, asked, tuple(restored))
