"""Kill -9 processes that save checkpoints in a loop, and look at what the next one restores: a script of its own.

torch is imported once and every process is forked from there; fifty of them take seconds instead of minutes. What each
writes is a function of the step: whatever is restored must be of one step in all its parts.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import grpo_watchdog as gw

BOOK = gw.load("documented")  # read once, for all processes


class Training:
    """Weights, moments, a schedule, a counter and random numbers that all say which step it is."""

    def __init__(self) -> None:
        self.model = torch.nn.Linear(64, 64)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0, momentum=0.9)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 10**6)
        self.count = {"step": 0}

    def handed_over(self) -> dict[str, Any]:
        return {
            "model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler,
            "state": {"count": (lambda: dict(self.count), self.count.update)},
        }  # fmt: skip

    def become(self, step: int) -> None:
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(step)
                self.optimizer.state[parameter]["momentum_buffer"] = torch.full_like(parameter, step)
        self.scheduler.last_epoch = self.count["step"] = step
        torch.manual_seed(step)
        random.seed(step)

    def steps(self) -> set[float]:
        """Return every step that a part of it says it is; one where nothing is torn."""
        seen = {float(v) for p in self.model.parameters() for v in p.detach().unique()}
        seen |= {float(v) for s in self.optimizer.state.values() for v in s["momentum_buffer"].unique()}
        seen |= {float(self.scheduler.last_epoch), float(self.count["step"]), float(torch.initial_seed())}
        state = random.getstate()
        random.seed(self.count["step"])
        return seen if random.getstate() == state else {*seen, -1.0}


def save_for_ever(run_dir: Path, first: int, started: int) -> None:
    training = Training()
    dog = gw.attach(
        **training.handed_over(), rules=BOOK, run_dir=run_dir, resume=(run_dir / "journal.jsonl").exists(),
        probation=1, keep=2, checkpoint_every=1,
    )  # fmt: skip
    for step in range(first, first + 1000):
        training.become(step)
        dog.observe(step, {"log_ratio": 0.0})
        if step == first + 3:
            os.write(started, b"x")


def look(run_dir: Path, result: int) -> None:
    training = Training()
    with gw.attach(**training.handed_over(), rules=BOOK, run_dir=run_dir, resume=True) as dog:
        found = {"step": dog.resumed_from, "parts": sorted(training.steps()) if dog.resumed_from is not None else []}
    os.write(result, json.dumps(found).encode())


def forked(work: Callable[[int], None]) -> tuple[int, int]:
    """Run `work(pipe)` in a process of its own; return its id and the end of the pipe to read."""
    ours, theirs = os.pipe()
    process = os.fork()
    if process:
        os.close(theirs)
        return process, ours
    try:
        work(theirs)
    except BaseException:  # noqa: BLE001 - nothing of the parent may run here
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def read_all(pipe: int) -> bytes:
    data = b""
    while piece := os.read(pipe, 4096):
        data += piece
    os.close(pipe)
    return data


def main(run_dir: Path, kills: int) -> None:
    torch.set_num_threads(1)
    with gw.attach(**Training().handed_over(), rules=BOOK, run_dir=run_dir.with_name("warm")) as dog:
        dog.checkpoint(0)  # imports what is imported late
    rng = random.Random(0)
    seen: dict[str, Any] = {"kills": 0, "resumed": 0, "left half written": 0, "torn": [], "went back": []}
    newest = 0
    for round_ in range(kills):
        first = 1000 * round_
        process, pipe = forked(lambda end, first=first: save_for_ever(run_dir, first, end))  # type: ignore[misc]
        if os.read(pipe, 1) != b"x":
            sys.exit("the process that saves did not start")
        time.sleep(rng.uniform(0, 0.05))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(pipe)
        seen["kills"] += 1
        left = [*(run_dir / "checkpoints").glob(".writing-*"), *(run_dir / "checkpoints").glob(".deleting-*")]
        seen["left half written"] += bool(left)
        process, pipe = forked(lambda end: look(run_dir, end))
        answer = read_all(pipe)
        if os.waitpid(process, 0)[1]:
            sys.exit("the process that resumes failed")
        found = json.loads(answer)
        seen["resumed"] += found["step"] is not None
        if found["step"] is not None and found["parts"] != [float(found["step"])]:
            seen["torn"].append(found)
        if found["step"] is None or found["step"] < newest:
            seen["went back"].append([newest, found["step"]])
        newest = max(newest, first)
    print(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
