"""The same runs, logged otherwise: what a rulebook that was written with these logs in sight makes of others like them.

Labels stay as they are, so that a log of every second row has half the rows until `must_by`: what needs so many rows is
then late. What comes out is no figure for new runs, but it moves where a rule fits a log instead of a trouble.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from grpo_watchdog.metrics import Step

Steps = Sequence[Step]
_REWARDS = ("std_reward", "group_std_reward")
_KL = ("kl", "kl_penalty", "token_kl")
_LENGTHS = ("completion_length", "min_completion_length", "max_completion_length", "truncated_fraction")


def _without(names: Collection[str]) -> Callable[[Steps], list[Step]]:
    return lambda steps: [
        Step(step.number, {name: value for name, value in step.values.items() if name not in names}) for step in steps
    ]


def _rewards(factor: float, more: float) -> Callable[[Steps], list[Step]]:
    """Return what pays every reward times `factor`, and `more` beside that."""

    def paid(name: str, value: float) -> float:
        return factor * value + more if name == "mean_reward" else factor * value if name in _REWARDS else value

    return lambda steps: [Step(step.number, {n: paid(n, v) for n, v in step.values.items()}) for step in steps]


OTHERWISE: dict[str, Callable[[Steps], list[Step]]] = {
    "every second row": lambda steps: list(steps[::2]),
    "every third row": lambda steps: list(steps[::3]),
    "without the first three rows": lambda steps: list(steps[3:]),
    "rewards times 10": _rewards(10, 0),
    "rewards over 10": _rewards(0.1, 0),
    "rewards less 1": _rewards(1, -1),
    "rewards and 1": _rewards(1, 1),
    "no spread of rewards": _without(_REWARDS),
    "no share of equal groups": _without(("zero_std_fraction",)),
    "no KL": _without(_KL),
    "no entropy": _without(("entropy",)),
    "no gradient norm": _without(("grad_norm",)),
    "no lengths": _without(_LENGTHS),
    "no loss": _without(("loss", "policy_loss")),
}
