"""Briefing: what is said at attach: what each level will do to this run, and what cannot be done."""

from __future__ import annotations

from collections.abc import Mapping

from grpo_watchdog.actions import KNOB_ACTIONS, Outcome
from grpo_watchdog.diagnosis import Incident
from grpo_watchdog.metrics import RatioTo
from grpo_watchdog.rulebook import Policy, Rulebook
from grpo_watchdog.watch import Finding

_FAR = 3.0  # a base this many times off the document's makes absolute targets worth a word
_MANY = 1_000_000  # dimensions from which bands in nats of a sum need a word
_INSTEAD = {
    "lower_learning_rate": "the other doses and the rollback are all there is",
    "raise_kl_coef": "the learning-rate ceiling and the rollback are given without it",
    "shrink_clip": "the learning-rate ceiling and the KL floor are given without it",
    "tighten_grad_norm": "the learning-rate ceiling bounds the update instead",
}


def settings(book: Rulebook, bases: Mapping[str, float]) -> list[str]:
    """Return what each level will do to this run.

    Args:
        book: the rulebook, its policy included.
        bases: what each knob is set to; a knob that is not there cannot be turned.
    """
    policy = book.policy
    return [
        f"rulebook {book.name}, targets {policy.targets}, on divergence {policy.on_divergence}",
        *_manner(policy),
        *_levels(book, bases),
        *_rungs(policy, bases),
    ]


def caveats(
    book: Rulebook,
    bases: Mapping[str, float],
    *,
    restorable: bool,
    ratio_to: RatioTo,
    dims: int | None,
    by_hand: bool = True,
    only_watches: bool = False,
) -> list[str]:
    """Return what cannot be done, and what should be known before the run begins.

    Args:
        book: the rulebook, its policy included.
        bases: what each knob is set to.
        restorable: whether checkpoints can be taken and restored.
        ratio_to: the policy that the surrogate ratio is taken to.
        dims: dimensions that a log-prob is summed over, where known.
        by_hand: whether the user hands over the knobs and the metrics; an integration that does so itself need not be
            told which are of use.
        only_watches: whether the trainer offers nothing to turn and nothing to restore.
    """
    if only_watches:
        line = "nothing was handed over that could be turned or restored: this watchdog only watches"
        return [line, *_units(dims), *_other_pair(ratio_to)]
    wanted = {action for rule in book.rules.values() for level in rule.ladder for action in level.do}
    if "escalate" in wanted:
        wanted |= {action for rung in book.policy.ladder for action in rung}
    return [
        *_missing(wanted, bases),
        *(_idle(wanted, bases, book) if by_hand else ()),
        *_no_way_back(wanted, restorable=restorable, checkpoint_every=book.policy.checkpoint_every),
        *_units(dims),
        *(_other_pair(ratio_to) if by_hand else ()),
        *(_far_off(book, bases) if book.policy.targets == "absolute" else _from_zero(bases)),
    ]


def headline(incident: Incident, book: Rulebook) -> str:
    """Return an incident as one line of a log."""
    cause = f"; likely: {book.causes[incident.causes[0].cause].title.en}" if incident.causes else ""
    return f"{incident.severity}: {finding(incident.evidence[0], book)}{cause}"


def finding(found: Finding, book: Rulebook) -> str:
    """Return a finding as one line of a log."""
    limit = "" if found.limit is None else f" (limit {found.limit:g})"
    note = f": {found.note}" if found.note else ""
    return f"{book.rules[found.rule].title.en}: {found.metric} {found.value:.6g}{limit}{note}"


def sentence(outcome: Outcome) -> str:
    """Return an outcome as one line of a log."""
    change = ""
    if outcome.before is not None or outcome.after is not None:
        before, after = _number(outcome.before), _number(outcome.after)
        change = f" held at {after}" if outcome.before == outcome.after else f" {before} -> {after}"
    failed = "" if outcome.ok else f" FAILED ({outcome.detail})"
    would = {"": "", "shadow": "would (shadow): "}.get(outcome.held_back, f"{outcome.held_back}: ")
    return f"step {outcome.step}: {would}{outcome.action}{change}{failed} [{outcome.rule}: {outcome.reason}]"


def _manner(policy: Policy) -> list[str]:
    lines = []
    if policy.mode == "shadow":
        lines.append("mode shadow: everything is decided and written down, and nothing is touched")
    if policy.mode == "approve":
        lines.append(
            f"mode approve: what touches the run waits for a yes, {policy.approve_within} observations at most; "
            f"then the answer is {policy.approve_default}"
        )
    if policy.shadow and policy.mode != "shadow":
        lines.append(f"in shadow, told and not done: {', '.join(policy.shadow)}")
    if policy.veto is not None:
        lines.append(
            "an optimizer step is skipped where its gradient is not finite, or "
            f"{policy.veto.factor:g} times the run's own"
        )
    return lines


def _rungs(policy: Policy, bases: Mapping[str, float]) -> list[str]:
    """Return what `escalate` does, rung by rung."""
    lines = []
    for number, rung in enumerate(policy.ladder, start=1):
        parts = []
        for name, factor in rung.items():
            action = KNOB_ACTIONS.get(name)
            if action is None:
                parts.append(name)
            elif action.knob in bases:
                parts.append(f"{action.knob} held where it was" if factor == 1 else f"{action.knob} times {factor:g}")
        lines.append(f"escalate, rung {number}: {', '.join(parts)}")
    return lines


def _levels(book: Rulebook, bases: Mapping[str, float]) -> list[str]:
    lines = []
    for rule_id, rule in book.rules.items():
        for rank, level in enumerate(rule.ladder, start=1):
            doses = [_dose(book, name, float(value), bases) for name, value in level.do.items()]
            if doses:
                lines.append(f"{rule_id}, level {rank} ({level.severity}): {', '.join(doses)}")
    return lines


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


def _missing(wanted: set[str], bases: Mapping[str, float]) -> list[str]:
    return [
        f"no {action.knob} knob was handed over: {name} cannot be given; {_INSTEAD[name]}"
        for name, action in KNOB_ACTIONS.items()
        if name in wanted and action.knob not in bases
    ]


def _no_way_back(wanted: set[str], *, restorable: bool, checkpoint_every: int) -> list[str]:
    if "rollback" not in wanted:
        return []
    if not restorable:
        return ["nothing to restore from (no run_dir, or no model and optimizer): a rollback is a halt"]
    if not checkpoint_every:
        return ["checkpoint_every is 0: only checkpoints that the loop asks for (dog.checkpoint) can be rolled back to"]
    return []


def _units(dims: int | None) -> list[str]:
    if dims is None or dims < _MANY:
        return []
    line = (
        f"a log-prob here is a sum over {dims:,} dimensions and the bands are in nats of that sum: 5 nats are "
        f"{5 / dims:.1g} a dimension; consider normalising the log-prob, or a rulebook with bands of its own"
    )
    return [line]


def _idle(wanted: set[str], bases: Mapping[str, float], book: Rulebook) -> list[str]:
    return [
        f"{action.knob} was handed over, but no rule of {book.name} turns it"
        for name, action in KNOB_ACTIONS.items()
        if action.knob in bases and name not in wanted and action.knob != "learning_rate"
    ]


def _other_pair(ratio_to: RatioTo) -> list[str]:
    if ratio_to == "reference":
        return []
    line = (
        "the ratio is taken to the old policy: give `log_ratio` for the bands, and KL to the reference as `kl`; "
        "the range of `kl_penalty`, -1 to 1, is the document's: a healthy run of this kind may leave it"
    )
    return [line]


def _from_zero(bases: Mapping[str, float]) -> list[str]:
    return [
        f"{name} is 0 at attach: nothing can be scaled from that, so the document's own numbers apply to it"
        for name, base in bases.items()
        if base == 0
    ]


def _far_off(book: Rulebook, bases: Mapping[str, float]) -> list[str]:
    lines = []
    for name in ("learning_rate", "kl_coef", "clip_epsilon"):
        documented, base = getattr(book.base, name), bases.get(name, 0.0)
        if base > 0 and not 1 / _FAR <= base / documented <= _FAR:
            lines.append(
                f"{name} is {base:g}, the document's {documented:g}: absolute targets were made for the latter; "
                "targets='scaled' takes the same steps as factors"
            )
    return lines


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:g}"
