"""The demo: one real training three times with one seed: healthy, sick and unwatched, sick and watched.

The sickness is two things that happen to real runs: a learning rate that is switched up in the middle and stays up, and
later one batch in which a reward comes back as NaN. The unwatched runs are observed without controls, so that their
reports can be read too; nothing is turned there.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

import grpo_watchdog as gw
from grpo_watchdog import briefing
from grpo_watchdog.lab.denoise import DenoiseTraining

SICK_AT, LR_FACTOR = 0.6, 60.0  # the share of the run after which the learning rate goes up, and how far
NAN_AT = 0.8  # the share after which one reward is NaN


class Played(NamedTuple):
    """One of the three runs."""

    reward: float
    actions: list[gw.Outcome]
    halted: str


def main(*, seed: int, run_dir: Path | None, as_json: bool, steps: int, rules: str = "guarded") -> dict[str, Any]:
    """Run the demo and print it; return what `--json` prints.

    Args:
        seed: of everything.
        run_dir: the parent of the three run folders; None takes the first free runs/demo, runs/demo-2 ...
        as_json: print one JSON object and nothing else.
        steps: training steps of each run [steps].
        rules: the rulebook that watches all three runs, and acts in the last.

    Raises:
        ConfigurationError: run_dir already holds a demo.
    """
    torch.set_num_threads(1)  # a step is small: two threads would only wait for each other
    folder = _free() if run_dir is None else run_dir
    show = _Screen(3 * steps, quiet=as_json)
    started = time.perf_counter()
    healthy = _play(folder / "healthy", seed, steps, show, rules, sick=False, act=False)
    unwatched = _play(folder / "unwatched", seed, steps, show, rules, sick=True, act=False)
    watched = _play(folder / "watched", seed, steps, show, rules, sick=True, act=True)
    show.done()
    for name in ("healthy", "unwatched", "watched"):
        (folder / name / "report.md").write_text(gw.report(folder / name, "markdown"), encoding="utf-8")
    result = {
        "final_reward": {"healthy": healthy.reward, "unwatched": unwatched.reward, "watched": watched.reward},
        "interventions": [o.as_json() for o in watched.actions if o.action != "checkpoint_now"],
        "run_dir": str(folder),
        "seed": seed,
        "seconds": round(time.perf_counter() - started, 1),
    }
    if as_json:
        print(json.dumps(result))
    else:
        _table(result, watched.halted)
    return result


def _play(folder: Path, seed: int, steps: int, show: _Screen, rules: str, *, sick: bool, act: bool) -> Played:
    training = DenoiseTraining(seed=seed)
    actions: list[gw.Outcome] = []
    with _quiet(), _attached(training, folder, rules, act=act) as dog:
        for step in range(steps):
            if sick and step == int(SICK_AT * steps):
                training.make_sick(LR_FACTOR)
                show.say(f"{folder.name}: step {step}: the learning rate goes up {LR_FACTOR:g} times")
            if sick and step == int(NAN_AT * steps):
                training.lose_a_reward()
                show.say(f"{folder.name}: step {step}: one reward of the batch comes back as NaN")
            verdict = dog.observe(step, training.train_one_step())
            show.tick(folder.name, verdict.level)
            for outcome in verdict.actions if act else ():
                actions.append(outcome)
                if outcome.action != "checkpoint_now":
                    show.say(f"{folder.name}: {briefing.sentence(outcome)}")
            if act and verdict.halt:
                break
    return Played(training.true_reward(), actions, dog.halted if act else "")


def _attached(training: DenoiseTraining, folder: Path, rules: str, *, act: bool) -> gw.Watchdog:
    if not act:
        return gw.Watchdog(rules, run_dir=folder)
    return gw.attach(
        model=training.policy,
        optimizer=training.optimizer,
        scheduler=training.scheduler,
        reference=training.reference,
        kl_coef=gw.attr(training.config, "kl_coef"),
        clip_epsilon=gw.attr(training.config, "clip_epsilon"),
        state={"sampler": training.sampler},
        rules=rules,
        targets="scaled",
        run_dir=folder,
        checkpoint_every=20,
    )


class _Screen:
    """A progress bar on a terminal, and lines above it; on a pipe only the lines."""

    def __init__(self, total: int, *, quiet: bool) -> None:
        self._total, self._done, self._quiet = total, 0, quiet
        self._bar = sys.stderr.isatty() and not quiet

    def tick(self, run: str, level: str) -> None:
        self._done += 1
        if self._bar:
            filled = 40 * self._done // self._total
            percent = 100 * self._done // self._total
            bar = f"\r[{'#' * filled}{'.' * (40 - filled)}] {percent:3d} %  {run:<10}{level:<10}"
            print(bar, end="", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        if not self._quiet:
            self.done()
            print(text, flush=True)

    def done(self) -> None:
        if self._bar:
            print("\r" + " " * 76 + "\r", end="", file=sys.stderr, flush=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the watchdog's log off the screen: the demo prints the interventions itself."""
    import logging  # noqa: PLC0415

    log = logging.getLogger("grpo_watchdog")
    before, log.propagate = log.propagate, False
    handler = logging.NullHandler()
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.propagate = before


def _free() -> Path:
    path, count = Path("runs/demo"), 1
    while path.exists():
        count += 1
        path = Path(f"runs/demo-{count}")
    return path


def _table(result: dict[str, Any], halted: str) -> None:
    rewards = result["final_reward"]
    share: Callable[[str], str] = lambda name: f"{rewards[name] / rewards['healthy']:.2f}"  # noqa: E731
    print("\nfinal true reward                        of healthy")
    for name, what in (("healthy", ""), ("unwatched", "sick, nobody acts"), ("watched", "sick, the watchdog acts")):
        print(f"  {name:<10}{rewards[name]:.3f}  {what:<24} {share(name)}")
    if halted:
        print(f"\nthe watched run was halted: {halted}")
    print(
        f"\n{len(result['interventions'])} interventions in {result['seconds']} s; the runs lie in {result['run_dir']}"
    )
    command = sys.argv[0] if sys.argv[0].endswith("grpo-watchdog") else "grpo-watchdog"  # it may not be on the path
    print(f"read why: {command} report {result['run_dir']}/watched")
