"""The journal survives a kill at any byte, and replaying it gives every decision again."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import grpo_watchdog as gw
from fakes import HEALTHY, FakeControls
from grpo_watchdog import journal
from grpo_watchdog.cli import main


def eventful(folder: Path, *, close: bool = True) -> Path:
    """A run with warnings, doses, a rollback, a recovery, NaN and a checkpoint asked for by the loop."""
    controls = FakeControls()
    dog = gw.Watchdog("documented", controls, folder, checkpoint_every=10, probation=5, recover_after=15)
    for step in range(120):
        row: dict[str, Any] = dict(HEALTHY)
        if 25 <= step < 28:
            row["log_ratio"] = 7.0
        if step == 70:
            row["log_ratio"] = math.nan
        if step == 90:
            row = {"loss": "text", "unheard_of": 3}
        if step == 95:
            controls.settings["kl_coef"] = 0.01
        if step == 100:
            dog.checkpoint(step)
        dog.observe(step, row)
    if close:
        dog.close()
    return folder


def test_live_equals_replay(tmp_path: Path) -> None:
    found = gw.replay(eventful(tmp_path / "run"))
    assert found.steps == 120
    assert found.decisions > 10
    assert found.differences == ()
    kinds = {entry["kind"] for entry in journal.read(tmp_path / "run")}
    assert kinds >= {"start", "step", "decision", "outcome", "held", "call", "state", "blind", "notice", "end"}


@settings(max_examples=40)
@given(st.lists(st.sampled_from([0.1, 4.0, 5.5, 9.9, 10.0, 15.0, 21.0, -30.0, math.nan, math.inf]), max_size=60))
def test_live_equals_replay_whatever_the_run_does(tmp_path_factory: pytest.TempPathFactory, sizes: list[float]) -> None:
    folder = tmp_path_factory.mktemp("run") / "run"
    controls = FakeControls()
    with gw.Watchdog("documented", controls, folder, checkpoint_every=3, probation=2, recover_after=4) as dog:
        for step, size in enumerate(sizes):
            dog.observe(step, {**HEALTHY, "log_ratio": size})
    assert gw.replay(folder).differences == ()


@pytest.mark.parametrize(
    ("old", "new"), [('"log_ratio":7.0', '"log_ratio":4.0'), ('"level":"warning"', '"level":"ok"')]
)
def test_a_journal_that_was_tampered_with_does_not_replay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str
) -> None:
    path = eventful(tmp_path / "run") / journal.FILE
    path.write_text(path.read_text().replace(old, new, 1))
    assert gw.replay(tmp_path / "run").differences
    assert main(["replay", str(tmp_path / "run")]) == 1
    assert "differ" in capsys.readouterr().out


def test_a_kill_at_any_byte_loses_at_most_the_torn_line(tmp_path: Path) -> None:
    whole = (eventful(tmp_path / "run", close=False) / journal.FILE).read_bytes()
    for cut in [*range(len(whole) - 400, len(whole)), *range(1, len(whole), len(whole) // 97)]:
        torn = tmp_path / "torn"
        torn.mkdir(exist_ok=True)
        (torn / journal.FILE).write_bytes(whole[:cut])
        complete = whole[:cut].count(b"\n")
        if not complete:
            with pytest.raises(gw.JournalError):
                list(journal.read(torn))
            continue
        entries = list(journal.read(torn))
        assert len(entries) - (entries[-1].get("step", 0) is None and entries[-1]["kind"] == "notice") == complete
        assert gw.replay(torn).differences == ()
        gw.report(torn)


def test_going_on_after_a_kill_cuts_the_torn_line_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = eventful(tmp_path / "run", close=False) / journal.FILE
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    dog = gw.Watchdog("documented", FakeControls(), tmp_path / "run", resume=True)
    assert "torn and is dropped" in caplog.text
    dog.close()
    assert [e["kind"] for e in journal.read(tmp_path / "run")].count("start") == 2
    assert gw.replay(tmp_path / "run").differences == ()
    assert gw.read_run(tmp_path / "run").sessions == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"hello\nworld\n", "not a journal entry"),
        (b'{"kind":"step"}\n{"kind":"step"}\n', "begins with a start entry"),
        (b'{"kind":"start","schema":99}\n{"kind":"end"}\n', "schema 99; this version reads 1"),
    ],
)
def test_what_is_no_journal_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, said: str
) -> None:
    (tmp_path / journal.FILE).write_bytes(content)
    for command in ("report", "replay"):
        assert main([command, str(tmp_path)]) == 1
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    assert main(["report", str(tmp_path / "absent")]) == 1
    assert "journal.jsonl" in capsys.readouterr().err


def test_a_full_disk_ends_the_journal_and_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / journal.FILE).symlink_to("/dev/full")
    sink = journal.Journal(folder)
    sink.append({"kind": "start", "schema": 1})
    assert "journal ends here" in caplog.text
    sink.append({"kind": "end"})
    sink.close()


def test_entries_are_strict_json_with_exact_floats(tmp_path: Path) -> None:
    folder = eventful(tmp_path / "run")
    for line in (folder / journal.FILE).read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@given(st.floats())
def test_every_float_comes_back_to_the_bit(value: float) -> None:
    back = journal.decoded(json.loads(journal.encode({"value": value}))["value"])
    assert back == value or (math.isnan(back) and math.isnan(value))
    assert math.copysign(1, back) == math.copysign(1, value) or math.isnan(value)
