"""The demo: a real run is ruined, and rescued by the watchdog, over several seeds."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import grpo_watchdog as gw
from grpo_watchdog.cli import main


def test_the_demo_ruins_and_rescues_a_real_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--json", "--seed", "0", "--run-dir", str(tmp_path / "demo")]) == 0
    result = json.loads(capsys.readouterr().out)
    reward = result["final_reward"]
    assert reward["unwatched"] <= 0.6 * reward["healthy"]
    assert reward["watched"] >= 0.8 * reward["healthy"]
    assert {i["action"] for i in result["interventions"]} >= {"lower_learning_rate", "raise_kl_coef"}
    for name in ("healthy", "unwatched", "watched"):
        folder = tmp_path / "demo" / name
        assert gw.replay(folder).differences == ()
        assert (folder / "report.md").read_text() == gw.report(folder, "markdown")
    assert gw.read_run(tmp_path / "demo/healthy").verdict in ("ok", "notice")
    assert gw.read_run(tmp_path / "demo/unwatched").verdict == "critical"


def test_the_demo_prints_interventions_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--steps", "40", "--run-dir", str(tmp_path / "demo")]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"healthy +0\.\d+", printed)
    assert main(["demo", "--steps", "40", "--run-dir", str(tmp_path / "demo")]) == 1
    assert "already holds a run" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(1, 6))
def test_the_demo_over_more_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int) -> None:
    assert main(["demo", "--json", "--seed", str(seed), "--run-dir", str(tmp_path / "demo")]) == 0
    reward = json.loads(capsys.readouterr().out)["final_reward"]
    assert reward["unwatched"] <= 0.6 * reward["healthy"]
    assert reward["watched"] >= 0.8 * reward["healthy"]
