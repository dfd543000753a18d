"""Faults that befall a tiny real trl.GRPOTrainer, unwatched and watched: what of its reward is rescued.

`lr`: the learning rate is 100 times the schedule's from the fault's step to the end. `nan`: one gradient is NaN, once.
`weights`: noise as large as the weights is added to them, once. The trainer is that of `grpo_watchdog.lab.trl_toy`,
trained whole or by its adapters (LoRA); nothing of the watchdog but the name of the rulebook is set.

    python benchmarks/trl_rescue.py [--seeds 0 1 2] [--steps 200] [--at 60] [--fault lr nan weights] [--rules guarded]

Prints, a row a run, the mean reward of the last 10 batches: healthy, with the fault, with the fault and the watchdog,
the last as a share of the first, and what was done; `died at` is the step that an unwatched run never finished.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

import grpo_watchdog as gw
from grpo_watchdog import journal
from grpo_watchdog.lab.trl_faults import GradientFault, LearningRateFault, WeightFault
from grpo_watchdog.lab.trl_toy import reward_of, toy_trainer

STEPS, AT, LAST = 200, 60, 10
FAULTS: dict[str, Callable[[int], Any]] = {
    "lr": lambda at: LearningRateFault(at, 100.0),
    "nan": GradientFault,
    "weights": lambda at: WeightFault(at, scale=1.0),
}


class Run(NamedTuple):
    """What one run came to.

    Attributes:
        reward: mean of the last batches' mean rewards; 0 for a run that died.
        died: the step that was never finished, None for a run that came to its end.
        done: what the watchdog did, in order: a step, an action, and where a rollback went to.
    """

    reward: float
    died: int | None = None
    done: tuple[str, ...] = ()


def run(fault: str | None, *, seed: int, lora: bool, rules: str | None = None, steps: int = STEPS, at: int = AT) -> Run:
    """Train once, and return what came of it.

    Args:
        fault: one of `FAULTS`, or None.
        seed: of data, base model and sampling.
        lora: whether adapters are trained in place of all weights.
        rules: the watchdog's rulebook; None trains unwatched.
        steps: length of the run [steps].
        at: the fault's step [steps].
    """
    callbacks = [FAULTS[fault](at)] if fault else []
    with tempfile.TemporaryDirectory() as folder:
        trainer = toy_trainer(folder, seed=seed, max_steps=steps, lora=lora, callbacks=callbacks)
        dog = gw.attach(trainer, rules=rules) if rules else None
        try:
            trainer.train()
        except RuntimeError as error:  # the sampler's own words: the policy is NaN
            if "probability tensor" not in str(error):
                raise
            return Run(0.0, trainer.state.global_step, _done(dog))
        finally:
            if dog is not None:
                dog.close()
        return Run(statistics.fmean(reward_of(trainer)[-LAST:]), None, _done(dog))


def _done(dog: gw.Watchdog | None) -> tuple[str, ...]:
    """Return what the journal says was done; checkpoints are no news."""
    if dog is None or dog.run_dir is None:
        return ()
    said = []
    for entry in journal.read(Path(dog.run_dir)):
        if entry["kind"] not in ("outcome", "held") or entry["action"] == "checkpoint_now":
            continue
        where = f" to {entry['after']:.0f}" if entry["action"] == "rollback" and entry["ok"] else ""
        said.append(f"{entry['step']} {entry['action']}{where}{'' if entry['ok'] else ' (failed)'}")
    return tuple(said)


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--at", type=int, default=AT)
    parser.add_argument("--fault", choices=FAULTS, nargs="+", default=list(FAULTS))
    parser.add_argument("--rules", default="guarded")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("grpo_watchdog").setLevel(logging.CRITICAL)
    print("model  fault    seed  healthy  unwatched     rescued  share  done", flush=True)
    shares = []
    for lora in (False, True):
        for seed in options.seeds:
            healthy = run(None, seed=seed, lora=lora, steps=options.steps)
            watched = run(None, seed=seed, lora=lora, steps=options.steps, rules=options.rules)
            _row(lora=lora, fault="none", seed=seed, healthy=healthy, ruined=healthy, rescued=watched)
            for fault in options.fault:
                ruined = run(fault, seed=seed, lora=lora, steps=options.steps, at=options.at)
                rescued = run(
                    fault, seed=seed, lora=lora, steps=options.steps, at=options.at, rules=options.rules
                )  # fmt: skip
                shares.append(rescued.reward / healthy.reward)
                _row(lora=lora, fault=fault, seed=seed, healthy=healthy, ruined=ruined, rescued=rescued)
    mean, least = statistics.fmean(shares), min(shares)
    print(f"{len(shares)} faulty runs: rescued share of the healthy reward {mean:.3f}, least {least:.3f}")


def _row(*, lora: bool, fault: str, seed: int, healthy: Run, ruined: Run, rescued: Run) -> None:
    end = f"{ruined.reward:.3f}" if ruined.died is None else f"died at {ruined.died}"
    print(
        f"{'lora' if lora else 'full':5s}  {fault:7s}  {seed:4d}  {healthy.reward:7.3f}  {end:>10s}  "
        f"{rescued.reward:10.3f}  {rescued.reward / healthy.reward:5.2f}  {'; '.join(rescued.done) or '-'}",
        flush=True,
    )


if __name__ == "__main__":
    main()
