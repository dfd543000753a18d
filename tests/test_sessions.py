"""Several sessions of one run, killed anywhere, with loops that do odd things: nothing raises, all of it replays."""

from __future__ import annotations

import gc
import math
import random
from pathlib import Path
from typing import Any

import pytest

import grpo_watchdog as gw
from fakes import HEALTHY, FakeControls
from grpo_watchdog import journal

SIZES = [0.0, 0.0, 0.0, 0.0, 4.5, 6.0, -12.0, 20.0, 21.0, math.nan, math.inf, None]


def odd_row(rng: random.Random) -> Any:  # noqa: ANN401 - what a loop may hand over
    row: dict[str, Any] = {**HEALTHY, "kl_penalty": rng.choice([0.1, 1.0, 3.0]), "log_ratio": rng.choice(SIZES)}
    if rng.random() < 0.3:
        row |= {"loss": rng.choice([0.3, 1e9, math.nan]), "mean_ratio": rng.choice([1.0, 485165216.0, math.inf, -1.0])}
    if rng.random() < 0.1:
        row |= {"mean_reward": "text", "std_reward": [1, 2], "unknown": object()}
    return [row] if rng.random() < 0.03 else row


def session(folder: Path, rng: random.Random, *, resume: bool, options: dict[str, Any]) -> None:
    controls = FakeControls()
    dog = gw.Watchdog("documented", controls, folder, resume=resume, **options)
    step, calm = rng.choice([0, 5]), rng.random() < 0.5
    for count in range(rng.choice([3, 40, 80])):
        if rng.random() < 0.1:
            dog.checkpoint(step)
        if rng.random() < 0.1:
            controls.settings["kl_coef"] = 0.1
        verdict = dog.observe(step, HEALTHY if calm and count % 30 else odd_row(rng))
        assert not any("failed on this step" in text for text in verdict.notices)
        assert controls.settings["learning_rate"] <= 1e-5
        assert controls.settings["kl_coef"] >= 0.1
        assert controls.settings["clip_epsilon"] <= 0.2
        again = verdict.rolled_back_to is not None and rng.random() < 0.5
        step = verdict.rolled_back_to + 1 if again and verdict.rolled_back_to is not None else step + 1
        if verdict.halt and rng.random() < 0.7:
            break
    if rng.random() < 0.4:
        dog.close()


@pytest.mark.parametrize("seed", range(25))
def test_nothing_raises_and_all_of_it_replays(tmp_path: Path, seed: int) -> None:
    rng, folder = random.Random(seed), tmp_path / "run"
    options = {
        "checkpoint_every": rng.choice([0, 1, 3]),
        "probation": rng.choice([1, 2, 5]),
        "keep": rng.choice([1, 2]),
        "recover_after": rng.choice([1, 5, 50]),
        "rollback_budget": rng.choice([0, 1, 3]),
        "recur_within": rng.choice([0, 5, 50]),
        "check_every": rng.choice([0, 1, 7]),
        "on_divergence": rng.choice(["rollback", "halt"]),
        "targets": rng.choice(["absolute", "scaled"]),
    }
    for number in range(3):
        session(folder, rng, resume=number > 0, options=options)
        gc.collect()
        path = folder / journal.FILE
        whole = path.read_bytes()
        if rng.random() < 0.5:  # a kill, anywhere in this session
            begun = whole.index(b"\n", whole.rfind(b'{"kind":"start"')) + 1
            path.write_bytes(whole[: rng.randint(begun, len(whole))])
        assert gw.replay(folder).differences == ()
        for style in ("text", "markdown", "json"):
            for lang in ("en", "zh"):
                gw.report(folder, style, lang)
