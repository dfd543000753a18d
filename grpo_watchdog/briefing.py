"""Briefing: what is said at attach, before anything happens: what each level will do to this run, and what cannot be done."""

from __future__ import annotations

from collections.abc import Mapping

from grpo_watchdog.actions import KNOB_ACTIONS, Outcome
from grpo_watchdog.controls import Knob
from grpo_watchdog.rulebook import Rulebook

_FAR = 3.0  # a base this many times off the document's makes absolute targets worth a word
_MANY = 1_000_000  # dimensions from which bands in nats of a sum need a word
_INSTEAD = {
    "lower_learning_rate": "the other doses and the rollback are all there is",
    "raise_kl_coef": "the learning-rate ceiling and the rollback are given without it",
    "shrink_clip": "the learning-rate ceiling and the KL floor are given without it",
    "tighten_grad_norm": "the learning-rate ceiling bounds the update instead",
}


def at_attach(
    book: Rulebook, bases: Mapping[str, float], knobs: Mapping[str, Knob], *, restorable: bool, dims: int | None = None
) -> list[str]:
    """Return the sentences that are logged at attach and stand in the journal and the report."""
    policy = book.policy
    lines = [f"rulebook {book.name}, targets {policy.targets}, on divergence {policy.on_divergence}"]
    wanted: set[str] = set()
    for rule_id, rule in book.rules.items():
        for rank, level in enumerate(rule.ladder, start=1):
            wanted.update(level.do)
            doses = [_dose(book, name, float(value), bases) for name, value in level.do.items()]
            if doses:
                lines.append(f"{rule_id}, level {rank} ({level.severity}): {', '.join(doses)}")
    for name, action in KNOB_ACTIONS.items():
        if name in wanted and action.knob not in knobs:
            lines.append(f"no {action.knob} knob was handed over: {name} cannot be given; {_INSTEAD[name]}")
    if "rollback" in wanted and not restorable:
        lines.append("nothing to restore from (no model and run_dir): a rollback is a halt")
    elif "rollback" in wanted and not policy.checkpoint_every:
        lines.append(
            "checkpoint_every is 0: only checkpoints asked for with dog.checkpoint(step) can be rolled back to"
        )
    if dims is not None and dims >= _MANY:
        lines.append(
            f"a log-prob here is a sum over {dims:,} dimensions, and the bands are in nats of that sum: 5 nats are "
            f"{5 / dims:.1g} a dimension; consider normalising the log-prob, or bands of your own"
        )
    if policy.targets == "absolute":
        lines += [_far(name, base, getattr(book.base, name)) for name, base in bases.items()
                  if base > 0 and not 1 / _FAR <= base / getattr(book.base, name) <= _FAR and name != "grad_norm_limit"]  # fmt: skip
    return lines


def sentence(outcome: Outcome) -> str:
    """Return an outcome as one line of a log."""
    change = ""
    if outcome.before is not None or outcome.after is not None:
        change = f" {_number(outcome.before)} -> {_number(outcome.after)}"
    failed = "" if outcome.ok else f" FAILED ({outcome.detail})"
    return f"step {outcome.step}: {outcome.action}{change}{failed} [{outcome.rule}: {outcome.reason}]"


def _dose(book: Rulebook, name: str, target: float, bases: Mapping[str, float]) -> str:
    action = KNOB_ACTIONS.get(name)
    if action is None:
        return name
    if action.knob not in bases:
        return f"{name} (no knob)"
    base = bases[action.knob]
    limit = book.limit(name, target, base, scaled=book.policy.targets == "scaled")
    kept = action.merge(base, limit) == base
    return f"{action.knob} {base:g} {'stays' if kept else f'to {limit:g}'}"


def _far(name: str, base: float, documented: float) -> str:
    return (f"{name} is {base:g}, the document's {documented:g}: absolute targets were made for the latter; "
            "targets='scaled' takes the same steps as factors")  # fmt: skip


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:g}"
