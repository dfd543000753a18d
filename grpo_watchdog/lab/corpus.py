"""The corpus: small real trainings of this lab, recorded as trainers record theirs, with what is right for each.

    python -m grpo_watchdog.lab.corpus OUT [NAME ...]

Nothing is scripted and nobody watches. A label is written from what was injected and when, and from the true reward,
which the recorder asks for beside the run and which no log holds: never from what a rule says.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch

from grpo_watchdog.lab.corpus_files import SINKS, suffix
from grpo_watchdog.lab.faults import FAULTS, LOOKALIKES, Injection
from grpo_watchdog.lab.training import TASKS, GrpoTraining

COLUMNS = (
    "name", "file", "severity", "severity_1", "severity_2", "label", "trouble_step", "must_by", "steps_per_row",
    "family", "reason", "trainer",
)  # fmt: skip
_GRACE = 10  # rows that any alarm may take
_LATEST = 3  # evaluations over which the true reward is averaged, for a run to have lost half of it
_SAMPLES = 512  # of an evaluation of the true reward


class Plan(NamedTuple):
    """One run to record.

    Attributes:
        file: where it goes; its beginning is the run's name, its end the format.
        severity: what is right for it: ok, warn or crit; two of them where two readings are.
        label: what is wrong with it, in a word.
        task: a name in TASKS, or "trl".
        seed: of everything.
        event: the fault or look-alike; "" for nothing.
        size: how hard that strikes.
        onset: the first step that it befalls, counted as the log counts.
        every: a row is logged every so many steps [steps].
        steps: of the whole run [steps].
    """

    file: str
    severity: str
    label: str
    task: str
    seed: int
    event: str = ""
    size: float = 1.0
    onset: int = 0
    every: int = 2
    steps: int = 200

    @property
    def name(self) -> str:
        """Return what it is called."""
        return self.file.split(".", 1)[0]


class Taken(NamedTuple):
    """What came of a recording.

    Attributes:
        truth: (step, true reward), in order, about one a row.
        last: the last step that was logged.
        crashed: whether the training ended in an error.
    """

    truth: list[tuple[int, float]]
    last: int
    crashed: bool = False


PLANS: tuple[Plan, ...] = (
    Plan("tokens_healthy.csv", "ok", "healthy", "tokens", 1),
    Plan("chain_healthy.tfevents", "ok", "healthy", "chain", 2, every=4),
    Plan("reference_healthy.jsonl", "ok", "healthy", "reference", 3),
    Plan("tokens_solved.jsonl.gz", "ok", "healthy_solved", "tokens", 4, "solved"),
    Plan("tokens_entropy_falls.csv", "ok", "healthy_lookalike", "tokens", 5, "entropy_falls_with_reward"),
    Plan("chain_kl_rises.log", "ok", "healthy_lookalike", "chain", 6, "kl_rises_with_reward"),
    Plan("chain_spike.jsonl.gz", "ok", "healthy_lookalike", "chain", 7, "spike", onset=90),
    Plan("tokens_kl_coef_zero.jsonl.gz", "warn", "kl_coef_lost", "tokens", 8, "kl_coef_zero", onset=80),
    Plan("tokens_lr_x100.jsonl", "crit", "reward_collapse", "tokens", 9, "lr_up", 100, 80),
    Plan("reference_lr_x60.csv", "crit", "diverged", "reference", 10, "lr_up", 60, 90),
    Plan("chain_reward_hacked.tfevents", "crit", "reward_hacked", "chain", 11, "reward_hack", 0.9, 80, every=4),
    Plan("tokens_nan_batch.csv", "crit", "nan", "tokens", 12, "nan_batch", onset=100),
    Plan("tokens_weights_corrupted.log.gz", "crit", "reward_collapse", "tokens", 13, "weights_corrupted", 2, 80),
    Plan(
        "tokens_entropy_bonus.tfevents", "crit", "entropy_explosion", "tokens", 14, "entropy_bonus", onset=70, every=4,
    ),
    Plan("tokens_kl_coef_x100.csv", "crit", "pulled_back", "tokens", 15, "kl_coef_up", 100, 70),
    Plan("chain_reward_constant.jsonl.gz", "crit", "zero_variance", "chain", 16, "reward_constant", 0.5, 80),
    Plan("tokens_identical_samples.csv.gz", "crit", "zero_variance", "tokens", 17, "identical_samples", onset=90),
    Plan("tokens_outage.jsonl.gz", "warn|crit", "reward_service_lost", "tokens", 18, "reward_constant_outage", 0, 90),
    Plan("tokens_length_hacked.csv", "warn", "length_runaway", "tokens", 19, "length_hack", 2, 80),
    Plan("trl_healthy.json", "ok", "healthy", "trl", 20, every=5),
    Plan("trl_healthy_other.tfevents", "ok", "healthy", "trl", 21, every=8),
    Plan("trl_lora_healthy.log", "ok", "healthy", "trl", 22, "lora", every=5),
    Plan("trl_beta_zero.json.gz", "ok", "healthy_lookalike", "trl", 23, "beta_zero", every=4),
    Plan("trl_on_policy.log", "ok", "healthy_lookalike", "trl", 24, "on_policy", every=4),
    Plan("trl_lr_x100.json", "crit", "reward_collapse", "trl", 25, "lr_up", 100, 101, every=5),
    Plan("trl_nan_gradient.log", "crit", "nan", "trl", 26, "nan_gradient", onset=41, every=1, steps=60),
    Plan("trl_weights_corrupted.tfevents", "crit", "reward_collapse", "trl", 27, "weights_corrupted", 3, 101, every=8),
    Plan("trl_reward_inverted.json.gz", "crit", "reward_inverted", "trl", 28, "reward_inverted", onset=101, every=5),
    Plan("trl_reward_hacked.log", "crit", "reward_hacked", "trl", 29, "reward_hacked", 3, 101, every=5),
    Plan("trl_one_answer.json.gz", "crit", "mode_collapse", "trl", 30, "one_answer", 30, 101, every=4),
    Plan("trl_frozen.json", "crit", "dead_update", "trl", 31, "frozen", onset=1, every=4, steps=120),
    Plan("trl_reward_lost.json.gz", "crit", "reward_service_lost", "trl", 32, "reward_lost", onset=101, every=5),
    Plan("trl_never_ends.log", "warn", "length_truncation", "trl", 33, "never_ends", onset=101, every=5),
)  # fmt: skip


def record(plan: Plan, folder: Path) -> dict[str, str]:
    """Record one run into a folder; return its line of labels.csv."""
    torch.set_num_threads(1)  # a step is small: two threads would only wait for each other
    if plan.task == "trl":
        from grpo_watchdog.lab.corpus_trl import record_trl  # noqa: PLC0415 - TRL is an extra, and slow to import

        with tempfile.TemporaryDirectory() as scratch:
            taken = record_trl(plan, folder / plan.file, Path(scratch))
    else:
        taken = _record_lab(plan, folder / plan.file)
    return _label(plan, taken)


def _record_lab(plan: Plan, path: Path) -> Taken:
    training = TASKS[plan.task](plan.seed)
    befall: Callable[[GrpoTraining, int], object] = lambda training, step: None  # noqa: ARG005, E731
    if plan.event:
        event = FAULTS.get(plan.event) or LOOKALIKES[plan.event]
        befall = Injection(event, plan.size, plan.onset).before_step
    truth, rows = list[tuple[int, float]](), list[tuple[int, dict[str, float]]]()
    for step in range(plan.steps):
        befall(training, step)
        metrics = training.train_one_step()
        if step % plan.every == 0:
            rows.append((step, {name: float(f"{float(value):.6g}") for name, value in metrics.items()}))
            truth.append((step, _true_reward(training)))
    SINKS[suffix(path)](path, rows)
    return Taken(truth, rows[-1][0])


def _true_reward(training: GrpoTraining) -> float:
    try:
        return training.true_reward(_SAMPLES)
    except Exception:  # noqa: BLE001 - a policy of NaN may raise where it is sampled from
        return 0.0


def _label(plan: Plan, taken: Taken) -> dict[str, str]:
    before = fmean([reward for step, reward in taken.truth if step < plan.onset][-5:] or [taken.truth[0][1]])
    end = (
        "and then it crashed"
        if taken.crashed
        else f"{fmean([reward for _, reward in taken.truth][-5:]):.2f} at the end"
    )
    first, *others = plan.severity.split("|")
    severity, second = ("disputed", others[0]) if others else (first, first)
    trouble = "" if plan.severity == "ok" else str(plan.onset)
    event = f"{plan.event.replace('_', ' ')} ({plan.size:g})" if plan.event else "nothing befalls it"
    since = f" from {plan.onset} on" if plan.onset > 1 else ""
    reason = f"{event}{since}; true reward {before:.2f} {'before' if since else 'at first'}, {end}"
    per_row = str(plan.every) if plan.task == "trl" and plan.file.endswith(".log") else ""  # TRL prints no step
    return dict(zip(COLUMNS, (
        plan.name, plan.file, severity, first, second, plan.label, trouble,
        str(_must_by(plan, taken)) if trouble else "", per_row, f"lab {plan.task}", reason,
        "TRL GRPO" if plan.task == "trl" else "this project's lab",
    ), strict=True))  # fmt: skip


def _must_by(plan: Plan, taken: Taken) -> int:
    """Return the latest step at which an alarm is of use.

    For a run to be halted that is when half of the true reward is lost, or half of what was left of the run where it
    never is; for one to be warned of it is the latter. Ten rows are granted in any case, up to the run's last.
    """
    middle = (plan.onset + plan.steps) // 2
    before = [reward for step, reward in taken.truth if step < plan.onset][-5:]
    after = [(step, reward) for step, reward in taken.truth if step >= plan.onset]
    by = middle
    if plan.severity == "crit" and before:
        for index in range(_LATEST - 1, len(after)):
            if fmean(reward for _, reward in after[index - _LATEST + 1 : index + 1]) < fmean(before) / 2:
                by = after[index][0]
                break
    return min(taken.last, max(by, plan.onset + _GRACE * plan.every))


def main(arguments: Sequence[str] | None = None) -> None:
    """Record the corpus, or some of its runs, and write or mend labels.csv."""
    parser = argparse.ArgumentParser(description="record the lab's corpus of labelled runs")
    parser.add_argument("out", type=Path, help="the folder; made where it is not there")
    parser.add_argument("names", nargs="*", help="runs to record (default: all)")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    unknown = set(options.names) - {plan.name for plan in PLANS}
    if unknown:
        parser.error(f"no such run: {', '.join(sorted(unknown))}; there are {', '.join(plan.name for plan in PLANS)}")
    labels = options.out / "labels.csv"
    lines: dict[str, Mapping[str, str]] = {}
    if labels.exists():
        lines = {line["name"]: line for line in csv.DictReader(io.StringIO(labels.read_text(encoding="utf-8")))}
    for plan in PLANS:
        if not options.names or plan.name in options.names:
            lines[plan.name] = record(plan, options.out)
            print(json.dumps(lines[plan.name]), flush=True)
    with labels.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines[plan.name] for plan in PLANS if plan.name in lines)


if __name__ == "__main__":
    main()
