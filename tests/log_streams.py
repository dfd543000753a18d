"""Logs of runs that never were, made by chance: healthy ones that look sick, and sick ones, as trainers write them.

Rewards are of groups: how hard a prompt is decides how often its group is right, how long its answers get and how
unsure the policy is. A row is the mean over the groups of one step, or of several.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from grpo_watchdog.diagnosed import diagnose
from grpo_watchdog.recorded import Recorded
from grpo_watchdog.rulebook import Rulebook, load

Rows = list[dict[str, float]]
NAN = float("nan")
GUARDED = load("guarded")  # read once


class Task(NamedTuple):
    """What is trained, and how it is logged.

    Attributes:
        rows: of the log.
        groups: in a row.
        size: of a group.
        start: the share of right answers at first.
        end: the same at last.
        hard: how much prompts differ: small is all or nothing.
        kind: "binary" (0 or 1), "signed" (-1 or 1), "shaped" (anything from 0 to 1).
        length: of an answer at first [tokens].
        longer: what it is at last, as a factor.
        limit: of an answer, as a factor of `length`.
        unsure: the entropy at first [nats].
        surer: what it is at last, as a factor.
        kl: the KL to the reference at last [nats a token].
        digits: decimals that are printed; None prints all.
    """

    rows: int = 300
    groups: int = 8
    size: int = 8
    start: float = 0.3
    end: float = 0.6
    hard: float = 1.5
    kind: str = "binary"
    length: float = 200.0
    longer: float = 1.0
    limit: float = 3.0
    unsure: float = 0.6
    surer: float = 0.6
    kl: float = 0.05
    digits: int | None = None


def learning(seed: int, task: Task) -> Rows:
    """Return the log of a healthy run, with TRL's keys."""
    rng = np.random.default_rng(seed)
    n, shape = task.rows, (task.rows, task.groups)
    way = (1 - np.exp(-3 * np.arange(n) / n)) / (1 - np.exp(-3))
    right = task.start + (task.end - task.start) * way
    sure, unsure = (np.maximum(task.hard * share, 0.02)[:, None] for share in (right, 1 - right))
    ease = rng.beta(sure, unsure, shape)
    given = _rewards(rng, task, ease)
    harder = rng.standard_normal(shape)  # longer, and less sure
    usual = task.length * task.longer ** way[:, None, None]
    length = usual * np.exp(0.3 * harder[:, :, None] + 0.3 * rng.standard_normal((*shape, task.size)))
    cut = length >= task.limit * task.length
    entropy = task.unsure * task.surer**way * np.exp(0.2 * harder.mean(1))
    silent = given.std(2) < 1e-9
    kl = task.kl * way * np.exp(0.3 * rng.standard_normal(n))
    columns = {
        "loss": 0.02 * rng.standard_normal(n),
        "grad_norm": np.where(silent.all(1), 0.0, 0.3 * np.exp(0.3 * rng.standard_normal(n))),
        "learning_rate": 1e-6 * (1 - np.arange(n) / n) + 1e-12,
        "reward": given.mean((1, 2)),
        "reward_std": given.reshape(n, -1).std(1, ddof=1),
        "frac_reward_zero_std": silent.mean(1),
        "completions/mean_length": np.minimum(length, task.limit * task.length).mean((1, 2)),
        "completions/clipped_ratio": cut.mean((1, 2)),
        "kl": kl,
        "entropy": entropy,
        "step_time": np.full(n, 12.5),  # with it, reward_std is of the batch
    }
    if task.digits is not None:
        printed = {name: column.round(task.digits) for name, column in columns.items()}
        columns = {**printed, "learning_rate": columns["learning_rate"]}
    return [dict(zip(columns, map(float, row), strict=True)) for row in zip(*columns.values(), strict=True)]


def _rewards(rng: np.random.Generator, task: Task, ease: Any) -> Any:  # noqa: ANN401 - numpy's arrays
    shape = (*ease.shape, task.size)
    if task.kind == "shaped":
        return np.clip(ease[:, :, None] + 0.15 * rng.standard_normal(shape), 0, 1)
    right = (rng.random(shape) < ease[:, :, None]).astype(float)
    return 2 * right - 1 if task.kind == "signed" else right


def changed(rows: Rows, start: int, **values: float) -> Rows:
    """Return rows of which those from `start` on have other values ("__" in a name stands for "/")."""
    other = {name.replace("__", "/"): value for name, value in values.items()}
    return [row if place < start else {**row, **other} for place, row in enumerate(rows)]


def at(rows: Rows, *places: int, **values: float) -> Rows:
    """Return rows of which single ones have other values."""
    return [{**row, **values} if place in places else row for place, row in enumerate(rows)]


def write(path: Path, rows: Sequence[dict[str, float]], first: int = 1) -> Path:
    """Write a JSONL log; steps count from `first`."""
    lines = [json.dumps({"step": step, **row}) for step, row in enumerate(rows, start=first)]
    path.write_text("\n".join(lines) + "\n")
    return path


def diagnosed(folder: Path, rows: Sequence[dict[str, float]], rules: Rulebook = GUARDED) -> Recorded:
    """Return what the door says of one log."""
    found = diagnose(write(folder / "run.jsonl", rows), rules)
    assert not found.unread
    (run,) = found.runs
    return run


def book(folder: Path, **rules: Any) -> Rulebook:
    """Return `guarded` with some fields of some rules changed; the examples of these no longer hold."""
    changes = {name: {"examples": [], **fields} for name, fields in rules.items()}
    page = {"schema": 1, "name": "changed", "extends": "guarded", "rules": changes}
    path = folder / "changed.yaml"
    path.write_text(json.dumps(page))
    return load(path)
