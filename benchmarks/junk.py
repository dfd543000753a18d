"""What it takes to say that a large file is no log: seconds, memory and the answer, for junk of many shapes.

Each file is written, handed to the real command in a process of its own, and removed. Linear shapes cost what their
size says; one that costs more than its share of time or memory is where a reader hangs.

    python benchmarks/junk.py [--megabytes 100] [--only SHAPE ...]
"""

from __future__ import annotations

import argparse
import gzip
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

MEGABYTE = 1_000_000
LONGEST = 300  # seconds
Shape = Callable[[int], Iterator[bytes]]


def again(unit: bytes, before: bytes = b"", after: bytes = b"") -> Shape:
    """Return what repeats one thing over a number of bytes."""

    def shape(size: int) -> Iterator[bytes]:
        yield before
        block = unit * max(1, min(MEGABYTE, size) // len(unit))
        for _ in range(size // len(block)):
            yield block
        yield after

    return shape


def noise(size: int) -> Iterator[bytes]:
    """Yield random bytes in lines of text."""
    rng = random.Random(0)
    for _ in range(size // 80):
        yield bytes(rng.choices(range(32, 127), k=79)) + b"\n"


SHAPES: dict[str, Shape] = {
    "zeros": again(b"\0"),
    "random text": noise,
    "one letter": again(b"a"),
    "line breaks": again(b"\n", b"x\n"),
    "carriage returns": again(b"loss: 1\r", b"x\n"),
    "messages": again(b"INFO 11-28 12:00:01 worker.py:33] loading shard 3 of 8: done in 3.2 s\n"),
    "program": again(b'def f(x):\n    return {"a": x, "b": [y for y in x]}\n'),
    "open brackets": again(b"["),
    "open objects": again(b'{"a":'),
    "one key twice": again(b',"a": 1', b'{"a": 1', b"}"),
    "one list": again(b"1.5,", b'{"step": 1, "loss": [', b"1]}"),
    "one line of rows": again(b'{"step": 1, "loss": 0.5},', b"[", b"{}]"),
    "torn history": again(b'{"a": 1, "b": [', b'{"log_history": ['),
    "digits": again(b"1", b'{"step": 1, "loss": ', b"}"),
    "open dicts": again(b"{'b': [1,\n", b"x\n"),
    "commas": again(b",", b"step,loss\n1,0.5\n"),
    "open quote": again(b"a\n", b'step,loss\n1,0.5\n"'),
    "quotes": again(b'"\n",1,1,1,1,1,1,1,', b"step,loss\n1,0.5\n"),
    "pairs in a line": again(b"a=1 ", b"Step 1: "),
    "steps in a line": again(b"step 1 "),
    "colours": again(b"\x1b["),
}


def measured(path: Path) -> tuple[float, float, int, str]:
    """Return CPU seconds, megabytes, exit status and the last line said of diagnosing one file."""
    command = (sys.executable, "-m", "grpo_watchdog.cli", "diagnose", str(path), "--rules", "guarded")
    with tempfile.TemporaryFile() as said:
        started = time.monotonic()
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)  # noqa: S603 - our own command
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() - started > LONGEST:
                process.kill()
            time.sleep(0.05)
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        lines = said.read().decode(errors="replace").strip().splitlines() or [""]
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / MEGABYTE, process.returncode, lines[-1]


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--only", nargs="*", choices=SHAPES, metavar="SHAPE", help=", ".join(SHAPES))
    args = parser.parse_args()
    print(f"{args.megabytes} MB each\n{'shape':18} {'CPU s':>6} {'MB':>6} {'exit':>4}  said last")
    with tempfile.TemporaryDirectory() as folder:
        for name in args.only or SHAPES:
            path = Path(folder) / "junk"
            with path.open("wb") as file:
                file.writelines(SHAPES[name](args.megabytes * MEGABYTE))
            seconds, memory, status, last = measured(path)
            print(
                f"{name:18} {seconds:6.1f} {memory:6.0f} {status:4}  {last.replace(str(path), 'junk')[:90]}", flush=True
            )
        bomb = Path(folder) / "bomb.jsonl.gz"
        with gzip.open(bomb, "wb", compresslevel=9) as packed:
            packed.writelines(again(b"\n")(10 * args.megabytes * MEGABYTE))
        size = bomb.stat().st_size / MEGABYTE
        seconds, memory, status, last = measured(bomb)
        print(f"{'bomb':18} {seconds:6.1f} {memory:6.0f} {status:4}  {last[:90]} ({size:.1f} MB packed)")


if __name__ == "__main__":
    main()
