"""Fuzzing of the readers of logs with atheris, by hand: python tests/fuzz_logs.py -max_total_time=300 [CORPUS].

Whatever the bytes, a log is read or refused with a LogError of one line, in bounded time. Needs `pip install atheris`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris  # type: ignore[import-untyped,import-not-found,unused-ignore] # no dependency of the project

with atheris.instrument_imports(include=["grpo_watchdog.logs"]):
    from grpo_watchdog.errors import LogError
    from grpo_watchdog.logs import opened

NOTEBOOK = (
    b'{"cells": [{"cell_type": "code", "outputs": [{"output_type": "display_data", "data": {"text/html": '
    b'"<table><tr><th>Step</th><th>L</th></tr><tr><td>1</td><td>2</td></tr></table>"}}]}], "nbformat": 4}'
)
SEEDS = (
    b'{"log_history": [{"step": 1, "loss": 0.5, "kl": null}, {"step": 2, "loss": NaN}]}',
    b'[{"step": 1, "a": {"b": [1, 2]}}, {"step": 2}]',
    b'{"loss": [1, 2], "reward": [3, null]}',
    b'{"loss": {"0": 1}, "reward": {"0": 2}}',
    b'{"columns": ["step", "loss"], "data": [[1, 2]]}',
    b'{"step": 1, "run": "a", "loss": 1e999}\n{"step": 2, "tag": "x", "value": 2}\n',
    b'step,loss\n1,0.5\n2,"a\nb"\n',
    b"Step\tTraining Loss\n1\tNo Log\n2\tnan\n",
    b"| step | loss |\n|--|--|\n| 1 | 2 |\n",
    b'"Step","a - r","a - r__MIN"\n1,2,3\n',
    b"Step 1: {'loss': np.float64(0.5), 'x': [1, tensor(2, device='c')]}\n{\n 'a': 1}\n",
    b"step:1 - a/b:np.float64(0.5) - c:nan\n\x1b[36m(W pid=1)\x1b[0m step 2 | loss 0.1 | kl 1e-5\n",
    b"train: 5%|x| 1/9 [00:10<01:30, 1.0s/it, loss=0.5]\rEpoch:[1/2](3/9), KL: 0.1, loss: 1,234\n",
    NOTEBOOK,
    b'{"kind":"start","schema":1}\n{"kind":"step","step":1,"values":{"loss":"NaN"}}\n',
    b"PAR1\x15\x04PAR1",
)


def one(data: bytes) -> None:
    """Read one log."""
    FILE.write_bytes(data)
    try:
        with opened((str(FILE),)) as log:
            for row in log.rows:
                if not all(isinstance(value, float) for value in row.values.values()):
                    raise TypeError(f"no number in {row}")
    except LogError as error:
        if "\n" in str(error):
            raise TypeError(f"more than one line: {error}") from error


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        FILE = Path(folder) / "x.log"
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        for count, seed in enumerate(SEEDS):
            (corpus / str(count)).write_bytes(seed)
        atheris.Setup([*sys.argv, str(corpus)], one)
        atheris.Fuzz()
