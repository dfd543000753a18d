"""The table of canonical metrics, and the intake that turns what a trainer emits into a Step.

A metric is a quantity, a pair and a reduction: KL to the *reference*, to the *old* (behaviour) policy and
to the *sampler* are three different things, and a sum over a trajectory, a mean per token and a maximum
are three different units. The table carries all of it, a rule names the one that it means.
"""

from __future__ import annotations

import difflib
import operator
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from grpo_watchdog.scalars import Say, read_all, shown

RatioTo = Literal["reference", "old"]
_MOST_SAID = 100  # names that change on every step must not fill the journal


class Metric(NamedTuple):
    """What one name means.

    Attributes:
        name: the canonical name, as rules and trainers use it.
        unit: "nats", "fraction", "reward" ...; "1" for a pure number.
        pair: the two policies that it compares, or "" where it compares none.
        reduction: over what it was reduced, and how.
        formula: how it is computed.
        normal: the documented normal range, or None where none is documented.
        source: "document" (the user's notes on the incident), "field" (its usual definition), or "watchdog": taken by
            the watchdog itself on a trainer that it is attached to.
    """

    name: str
    unit: str
    pair: str
    reduction: str
    formula: str
    normal: tuple[float, float] | None = None
    source: str = "field"


_DOCUMENT, _OWN = "document", "watchdog"
_REF, _OLD = "current/reference", "current/old"
_SEQ, _BATCH, _STEP = "mean over batch of trajectory sums", "mean over batch", "one per step"

METRICS: dict[str, Metric] = {
    m.name: m
    for m in (
        Metric("loss", "1", "", _STEP, "-(policy_loss - kl_coef * kl_penalty)", (-10, 10), _DOCUMENT),
        Metric("policy_loss", "1", "", _BATCH, "mean(min(ratio * A, clipped_ratio * A))",
               (-1, 1), _DOCUMENT),
        Metric("kl_penalty", "nats", _REF, _SEQ, "k1: log_prob_current - log_prob_ref",
               (-1, 1), _DOCUMENT),
        Metric("value_loss", "1", "", _BATCH, "loss of the critic, where there is one"),
        Metric("mean_ratio", "1", "current/as in the surrogate", _BATCH, "mean(exp(log_ratio))",
               (0.5, 2), _DOCUMENT),
        Metric("mean_advantage", "1", "", _BATCH, "mean((r - mean(r_group)) / (std(r_group) + eps))",
               (-1, 1), _DOCUMENT),
        Metric("mean_log_prob_current", "nats", "", _SEQ, "log p_current(trajectory)",
               (-1e6, 1e6), _DOCUMENT),
        Metric("mean_log_prob_ref", "nats", "", _SEQ, "log p_reference(trajectory)",
               (-1e6, 1e6), _DOCUMENT),
        Metric("mean_reward", "reward", "", _BATCH, "mean(r)", (0, 1), _DOCUMENT),
        Metric("std_reward", "reward", "", _BATCH, "std(r)", (0, 0.5), _DOCUMENT),
        Metric("log_ratio", "nats", "current/as in the surrogate", "mean, as exponentiated",
               "log-prob difference that the trainer exponentiates into its ratio", None, _DOCUMENT),
        Metric("log_prob_per_dim", "nats", "", "mean per dimension or token", "mean_log_prob_current / dims"),
        Metric("max_abs_log_ratio", "nats", "current/as in the surrogate", "max", "max |log_ratio|"),
        Metric("max_ratio", "1", "current/as in the surrogate", "max", "max exp(log_ratio)"),
        Metric("min_ratio", "1", "current/as in the surrogate", "min", "min exp(log_ratio)"),
        Metric("ess", "fraction", _OLD, "over batch", "(sum w)^2 / (n sum w^2), w = exp(log_ratio)"),
        Metric("step_kl", "nats", _OLD, "mean", "k3: exp(d) - 1 - d, d = log_ratio to old, on samples of old"),
        Metric("kl", "nats", _REF, "as the source states", "estimator as the source states"),
        Metric("token_kl", "nats", _REF, "mean per token", "k3, k2 or |k1|, as the source states: never below 0"),
        Metric("kl_k1", "nats", _REF, "mean per token", "k1: log p_current - log p_reference"),
        Metric("kl_k2", "nats", _REF, "mean per token", "k2: (log p_current - log p_reference)^2 / 2"),
        Metric("sequence_kl", "nats", _REF, _SEQ, "k3: exp(d) - 1 - d, d = log p_reference - log p_current"),
        Metric("sequence_kl_k2", "nats", _REF, _SEQ, "k2: (log p_current - log p_reference)^2 / 2"),
        Metric("kl_coef", "1", "", _STEP, "beta, the weight of the KL term in the loss"),
        Metric("clip_epsilon", "1", "", _STEP, "half-width of the surrogate's clip range"),
        Metric("clip_fraction", "fraction", "", _BATCH, "share of ratios outside the clip range"),
        Metric("std_advantage", "1", "", _BATCH, "std(A)"),
        Metric("mean_abs_advantage", "1", "", _BATCH, "mean |A|"),
        Metric("group_std_reward", "reward", "", "mean over groups", "mean(std(r_group))"),
        Metric("zero_std_fraction", "fraction", "", "over groups", "share of groups of equal rewards"),
        Metric("entropy", "nats", "", "mean per token", "-E[log p]"),
        Metric("grad_norm", "1", "", _STEP, "global L2 norm of the gradient, before clipping"),
        Metric("grad_norm_limit", "1", "", _STEP, "the norm that gradients are clipped to"),
        Metric("learning_rate", "1", "", _STEP, "largest over the parameter groups, as applied"),
        Metric("completion_length", "tokens", "", _BATCH, "mean number of generated tokens"),
        Metric("min_completion_length", "tokens", "", "min over batch", "fewest generated tokens"),
        Metric("max_completion_length", "tokens", "", "max over batch", "most generated tokens"),
        Metric("truncated_fraction", "fraction", "", _BATCH, "share of completions cut at the limit"),
        Metric("sampler_mismatch", "nats", "trainer/sampler", "mean", "|log p_train - log p_sampler|"),
        Metric("param_change", "fraction", "", "over trainable parameters", "|dw| / |w| in one step"),
        Metric("param_drift", "fraction", "", "over trainable parameters", "|w - w_ref| / |w_ref|"),
        Metric("weights_touched", "fraction", "", "over trainable parameters",
               "|dw| / |w| between two optimizer steps", None, _OWN),
        Metric("moments_touched", "fraction", "", "over optimizer moments, the worst kind",
               "|dm| / |m| between two optimizer steps", None, _OWN),
        Metric("reference_touched", "fraction", "", "over the reference", "|dw| / |w| since attach", None, _OWN),
        Metric("vetoes", "steps", "", "since the last observation", "optimizer steps that were vetoed", None, _OWN),
        Metric("learning_rate_set", "1", "", _STEP, "as the schedule has it, our ceiling left out", None, _OWN),
        Metric("kl_coef_set", "1", "", _STEP, "as the user has it, our floor left out", None, _OWN),
        Metric("clip_epsilon_set", "1", "", _STEP, "as the user has it, our ceiling left out", None, _OWN),
    )
}  # fmt: skip


class Step(NamedTuple):
    """One observation: a step number and the canonical metrics that were given, as finite or non-finite floats."""

    number: int
    values: dict[str, float]


class Intake:
    """Turns whatever a trainer emits into a Step, and says once what it could not use.

    Accepts floats, ints, numpy scalars, 0-d tensors of any device and dtype (one host transfer for all of
    a device), None and absent values. Never raises.

    Args:
        ratio_to: which policy the trainer's surrogate ratio is taken to. With "reference" (the document's
            trainer) a missing `log_ratio` is derived as mean_log_prob_current - mean_log_prob_ref.
        dims: dimensions or tokens that a trajectory's log-prob is summed over, where known; the
            log-prob is then also given per dimension.
    """

    def __init__(self, ratio_to: RatioTo = "reference", dims: int | None = None) -> None:
        """Start with nothing said."""
        self.ratio_to, self.dims = ratio_to, dims
        self._said: set[str] = set()
        self._last: int | None = None

    def read(self, step: object, metrics: object) -> tuple[Step, list[str]]:
        """Return the Step and what has to be said about it for the first time."""
        notices: list[str] = []

        def say(key: str, text: str) -> None:
            if key in self._said or len(self._said) > _MOST_SAID:
                return
            self._said.add(key)
            notices.append(text if len(self._said) <= _MOST_SAID else "too much to say about the metrics: no more is")

        number = self._number(step, say)
        if type(metrics) is dict and metrics.keys() <= _NAMES and set(map(type, metrics.values())) == _PLAIN:
            values = dict(metrics)
            self._derive(values)
            return Step(number, values), notices
        values = {}
        others: dict[str, Any] = {}
        for name, value in _items(metrics, say):
            if not isinstance(name, str) or name not in METRICS:
                _unknown(name, say)
            elif type(value) is float:
                values[name] = value
            elif value is not None:
                others[name] = value
        if others:
            read_all(others, values, say)
        self._derive(values)
        return Step(number, values), notices

    def _derive(self, values: dict[str, float]) -> None:
        current = values.get("mean_log_prob_current")
        if current is None:
            return
        if self.ratio_to == "reference" and "log_ratio" not in values and "mean_log_prob_ref" in values:
            values["log_ratio"] = current - values["mean_log_prob_ref"]
        if self.dims is not None:
            values["log_prob_per_dim"] = current / self.dims

    @property
    def last(self) -> int:
        """Return the last step's number; -1 before the first."""
        return -1 if self._last is None else self._last

    def rewind(self, step: int) -> None:
        """Allow the next step number to be as early as `step` + 1, as after a rollback."""
        self._last = step

    def state_dict(self) -> dict[str, Any]:
        """Return what was said and the last step, as JSON-able values."""
        return {"said": sorted(self._said), "last": self._last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self._said, self._last = set(state["said"]), state["last"]

    def _number(self, step: object, say: Say) -> int:
        last = self._last
        if type(step) is int:
            number = step
        else:
            try:
                number = _whole(step)
            except Exception:  # noqa: BLE001 - whatever a stranger's object raises, the run goes on
                number = 0 if last is None else last + 1
                say("step:type", f"step {shown(step)} is not a whole number: counted on as {number}")
        if last is not None and number <= last:
            if number == last:
                say("step:twice", f"step {number} was given twice: each row counts as one observation")
            else:
                say("step:back", f"step went back from {last} to {number} without a rollback")
        self._last = number
        return number


_NAMES, _PLAIN = METRICS.keys(), {float}  # of a step that is as it should be, most are: it is taken as it is


def _whole(step: Any) -> int:  # noqa: ANN401
    """Return a step number of any type that holds a whole number; raise where it does not."""
    try:
        return operator.index(step)
    except Exception:
        value = step.item() if hasattr(step, "item") else step
        if isinstance(value, int | float) and value == int(value):
            return int(value)
        raise


def _items(metrics: object, say: Say) -> Iterable[tuple[object, object]]:
    if type(metrics) is dict:
        return metrics.items()
    try:
        return [(name, value) for name, value in metrics.items()]  # type: ignore[attr-defined]
    except Exception as error:  # noqa: BLE001
        what = type(metrics).__name__
        text = f"that cannot be read: {type(error).__name__}" if hasattr(type(metrics), "items") else "no mapping"
        say("metrics:type", f"metrics must be a dict of numbers, and this {what} is {text}: nothing seen")
        return []


def _unknown(name: object, say: Say) -> None:
    text = shown(name)
    near = difflib.get_close_matches(text.strip("'"), METRICS, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    say(f"name:{text}", f"metric {text} is not in the table of canonical metrics and is not watched{hint}")
