"""The command line: the frozen exit codes, one line of error for bad input, what each command prints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import grpo_watchdog as gw
from fakes import HEALTHY
from grpo_watchdog.cli import main

BY_LEVEL: dict[str, tuple[dict[str, Any], int]] = {
    "ok": ({"log_ratio": 0.1}, 0),
    "notice": ({"mean_advantage": 0.0}, 0),
    "warning": ({"log_ratio": 7.0}, 10),
    "critical": ({"log_ratio": 70.0}, 20),
}


def run_of(folder: Path, row: dict[str, Any]) -> Path:
    with gw.Watchdog("documented", run_dir=folder) as dog:
        dog.observe(0, row)
    return folder


@pytest.mark.parametrize("level", BY_LEVEL)
@pytest.mark.parametrize("style", ["text", "markdown", "json"])
def test_report_exits_by_the_worst_level(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], level: str, style: str
) -> None:
    row, code = BY_LEVEL[level]
    folder = run_of(tmp_path / "run", row)
    assert main(["report", str(folder), "--format", style]) == code
    printed = capsys.readouterr().out
    assert printed == gw.report(folder, style)
    if style == "json":
        assert json.loads(printed)["verdict"] == level


def test_report_writes_to_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_of(tmp_path / "run", HEALTHY)
    assert main(["report", str(folder), "--output", str(tmp_path / "report.txt")]) == 0
    assert (tmp_path / "report.txt").read_text() == gw.report(folder)
    assert not capsys.readouterr().out
    assert main(["report", str(folder), "--output", str(tmp_path / "no/such/folder")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["reprot"],
        ["report"],
        ["report", "x", "--format", "pdf"],
        ["rules"],
        ["demo", "--steps", "0"],
        ["rules", "check"],
    ],
)
def test_usage_errors_exit_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_rules_list_show_and_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rules", "list"]) == 0
    assert "documented" in capsys.readouterr().out
    assert main(["rules", "show", "documented"]) == 0
    shown = capsys.readouterr().out
    assert "lower_learning_rate 1e-07" in shown
    assert "log_ratio 差值" in shown
    assert main(["rules", "schema"]) == 0
    assert "properties" in json.loads(capsys.readouterr().out)


def test_rules_check_names_every_problem_of_every_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = "schema: 1\nname: mine\nextends: documented\n"
    (tmp_path / "good.yaml").write_text(good)
    (tmp_path / "one.yaml").write_text(good + "rules:\n  loss: {high: ten}\n")
    (tmp_path / "two.yaml").write_text(good + "polcy: {}\n")
    assert main(["rules", "check", str(tmp_path / "good.yaml"), "documented"]) == 0
    assert capsys.readouterr().out.count(": good, ") == 2
    assert main(["rules", "check", str(tmp_path / "one.yaml"), str(tmp_path / "two.yaml")]) == 1
    error = capsys.readouterr().err
    assert f"{tmp_path}/one.yaml:5:16: " in error
    assert f"{tmp_path}/two.yaml:4:" in error


def test_rules_test_fails_where_an_example_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rules", "test", "documented"]) == 0
    path = tmp_path / "mine.yaml"
    path.write_text(
        "schema: 1\nname: mine\nextends: documented\nrules:\n  loss:\n    high: 1000\n    examples:\n"
        "      - {rows: [{loss: 500}], expect: warning}\n      - {rows: [{loss: 500}], expect: ok}\n"
    )
    assert main(["rules", "test", str(path)]) == 1
    assert "loss, example 1: expected warning, got ok" in capsys.readouterr().out


def test_help_and_the_module_run_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "grpo_watchdog.cli", "rules", "list"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "documented" in done.stdout


def test_a_closed_pipe_is_no_traceback(tmp_path: Path) -> None:
    command = f"{sys.executable} -m grpo_watchdog.cli rules schema | head -1"
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert "Traceback" not in done.stderr
