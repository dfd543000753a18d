"""Local run files of W&B, written here as W&B does it, and a record that W&B itself wrote."""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from event_files import Rows, read, read_or_none
from grpo_watchdog.errors import LogError
from grpo_watchdog.logs import READERS, Source

BLOCK = 1 << 15
OPENING = b":W&B\xe1\xbe\x00"
REAL = bytes.fromhex(  # one call of wandb.log, as wandb 0.31 keeps it
    "080d12a1010a25120a5f74696d657374616d70820116312e37393538393139383735353034353832652b30390a1f12085f72"
    "756e74696d65820112312e343636343531373739393939393939390a0b12055f73746570820101370a13120a747261696e2f"
    "6c6f7373820104302e32350a0e1206726577617264820103312e350a1012046e6f74658201072268656c6c6f220a0f12066e"
    "65737465641201618201013212020807"
)


def field(number: int, content: bytes | int) -> bytes:
    """Return one field of a message."""
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    return varint(number << 3 | 2) + varint(len(content)) + content


def varint(number: int) -> bytes:
    made = bytearray()
    while number > 0x7F:
        made.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*made, number))


def called(values: Mapping[str, object], step: int | None, *, nested: bool = True) -> bytes:
    """Return the record of one call of wandb.log."""
    items = [
        field(1, field(2 if nested else 1, key.encode()) + field(16, json.dumps(value).encode()))
        for key, value in values.items()
    ]
    count = b"" if step is None else field(2, field(1, step))
    return field(1, 7) + field(2, b"".join(items) + count)


def run_file(path: Path, records: Sequence[bytes]) -> Path:
    """Write a log of LevelDB's form: blocks of 32 KiB, records cut where a block ends."""
    made = bytearray(OPENING)
    for record in records:
        begun = False
        while True:
            room = BLOCK - len(made) % BLOCK
            if room < 7:
                made += bytes(room)
                continue
            part, record = record[: room - 7], record[room - 7 :]  # noqa: PLW2901 - eaten up
            kind = (3 if record else 4) if begun else (2 if record else 1)
            made += struct.pack("<IHB", zlib.crc32(bytes((kind,)) + part), len(part), kind) + part
            begun = True
            if not record:
                break
    path.write_bytes(made)
    return path


def test_what_was_logged_is_a_row_of_its_step(tmp_path: Path) -> None:
    calls = [
        called({"loss": 0.5, "note": "text", "ok": True, "_runtime": 1.5, "_timestamp": 9e9, "_step": 0}, 0),
        called({"loss": math.nan, "kl": math.inf, "deep": {"a": 1, "b": {"c": 2}}}, 1),
        called({"eval/loss": 3.0}, 2),
    ]
    rows, notices = read(run_file(tmp_path / "run-abc.wandb", calls))
    assert rows[0] == (0, {"loss": 0.5})
    assert rows[1] == (1, {"loss": pytest.approx(math.nan, nan_ok=True), "kl": math.inf, "deep/a": 1, "deep/b/c": 2})
    assert len(rows) == 2
    assert notices == []


def test_what_wandb_itself_wrote(tmp_path: Path) -> None:
    rows, _ = read(run_file(tmp_path / "run-abc.wandb", [REAL]))
    assert rows == [(7, {"train/loss": 0.25, "reward": 1.5, "nested/a": 2.0})]


@pytest.mark.parametrize("nested", [False, True])
def test_a_key_may_stand_in_either_field(tmp_path: Path, *, nested: bool) -> None:
    assert read(run_file(tmp_path / "run", [called({"loss": 1.0}, 4, nested=nested)]))[0] == [(4, {"loss": 1.0})]


def test_the_trainers_own_step_is_surer_than_the_count_of_calls(tmp_path: Path) -> None:
    calls = [called({"train/loss": 1.0, "train/global_step": 10 * n}, n) for n in range(3)]
    assert read(run_file(tmp_path / "run", calls))[0] == [(10 * n, {"train/loss": 1.0}) for n in range(3)]


def test_the_step_may_be_an_item(tmp_path: Path) -> None:
    assert read(run_file(tmp_path / "run", [called({"loss": 1.0, "_step": 12}, None)]))[0] == [(12, {"loss": 1.0})]


def test_media_are_no_metrics(tmp_path: Path) -> None:
    calls = [
        called({"hist/_type": "histogram", "hist/bins": [1, 2], "hist/values": [3, 4], "loss": 1.0}, 0),
        called({"picture": {"_type": "image-file", "width": 640}, "loss": 2.0}, 1),
    ]
    assert read(run_file(tmp_path / "run", calls))[0] == [(0, {"loss": 1.0}), (1, {"loss": 2.0})]


def test_records_over_several_blocks(tmp_path: Path) -> None:
    calls = [called({"loss": float(n), "text": "x" * (n * 997 % 90_000)}, n) for n in range(100)]
    path = run_file(tmp_path / "run", calls)
    assert path.stat().st_size > 50 * BLOCK
    assert read(path) == ([(n, {"loss": float(n)}) for n in range(100)], [])


def test_other_records_are_passed_over(tmp_path: Path) -> None:
    others = [field(17, field(1, b"abc")), field(7, b""), field(20, b"")]
    assert read(run_file(tmp_path / "run", [*others, called({"loss": 1.0}, 1)])) == ([(1, {"loss": 1.0})], [])


def test_a_record_that_is_none_is_said(tmp_path: Path) -> None:
    rows, notices = read(run_file(tmp_path / "run", [b"\xff\xff\xff", called({"loss": 1.0}, 1)]))
    assert rows == [(1, {"loss": 1.0})]
    assert notices == ["the record at byte 7 is none of W&B's and is left out"]


def test_a_damaged_block_costs_what_stands_in_it(tmp_path: Path) -> None:
    calls = [called({"loss": float(n), "text": "x" * 1000}, n) for n in range(100)]
    path = run_file(tmp_path / "run", calls)
    broken = bytearray(path.read_bytes())
    broken[BLOCK + 5000] ^= 4
    path.write_bytes(broken)
    rows, notices = read(path)
    steps = [step for step, _ in rows]
    assert 60 < len(steps) < 80
    assert steps[:20] == list(range(20))
    assert steps[-1] == 99
    assert all(values == {"loss": step} for step, values in rows)
    assert len(notices) == 1
    assert "damaged at byte 3" in notices[0]


def test_cut_at_every_byte_it_gives_what_was_whole(tmp_path: Path) -> None:
    calls = [called({"loss": n + 0.5}, n) for n in range(4)]
    whole = run_file(tmp_path / "run", calls).read_bytes()
    path = tmp_path / "cut"
    before = 0
    for end in range(8, len(whole)):
        path.write_bytes(whole[:end])
        rows, notices = read_or_none(path)
        assert rows == [(n, {"loss": n + 0.5}) for n in range(len(rows))]
        assert len(rows) >= before
        assert len(notices) == (not whole_records(whole[:end]) or not rows)
        before = len(rows)
    assert before == 3


def whole_records(content: bytes) -> bool:
    at = len(OPENING)
    while at + 7 <= len(content):
        at += 7 + int(struct.unpack_from("<H", content, at + 4)[0])
    return at == len(content)


def test_a_flipped_byte_anywhere_never_gives_a_value_that_was_not_written(tmp_path: Path) -> None:
    calls = [called({"loss": n + 0.5, "kl": 0.25}, n) for n in range(5)]
    whole = run_file(tmp_path / "run", calls).read_bytes()
    expected: Rows = [(n, {"loss": n + 0.5, "kl": 0.25}) for n in range(5)]
    path = tmp_path / "flipped"
    for at in range(len(whole)):
        broken = bytearray(whole)
        broken[at] ^= 1 << at % 8
        path.write_bytes(broken)
        rows, notices = read_or_none(path)
        assert all(row in expected for row in rows)
        assert rows == expected or notices


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.binary(max_size=60) | st.just(called({"loss": 1.0}, 1)), max_size=5), st.binary(max_size=40))
def test_anything_at_all_behind_the_opening_is_a_log_or_an_error(
    tmp_path: Path, records: list[bytes], tail: bytes
) -> None:
    path = run_file(tmp_path / "run", records)
    path.write_bytes(path.read_bytes() + tail)
    _, notices = read_or_none(path)
    assert all("\n" not in notice for notice in notices)


@pytest.mark.parametrize("opening", [b":W&B", b":W&B\xe1\xbe\x01", b":W&B\x00\x00\x00"])
def test_another_form_is_refused_by_name(tmp_path: Path, opening: bytes) -> None:
    path = tmp_path / "run.wandb"
    path.write_bytes(opening)
    with pytest.raises(LogError, match=r"run\.wandb: is a W&B file of another form"):
        read(path)


def test_a_run_file_is_known_by_its_content(tmp_path: Path) -> None:
    source = Source(run_file(tmp_path / "log.json", [called({"loss": 1.0}, 1)]))
    assert next(reader.NAME for reader in READERS if reader.recognises(source)) == "wandb"
    source.close()


def test_a_record_whose_middle_is_damaged_is_left_out_whole(tmp_path: Path) -> None:
    calls = [called({"loss": 1.0}, 1), called({"loss": 2.0, "text": "x" * 80_000}, 2), called({"loss": 3.0}, 3)]
    path = run_file(tmp_path / "run", calls)
    broken = bytearray(path.read_bytes())
    broken[BLOCK + 100] ^= 1
    path.write_bytes(broken)
    rows, notices = read(path)
    assert rows == [(1, {"loss": 1.0}), (3, {"loss": 3.0})]
    assert notices == [f"damaged at byte {BLOCK}: the block of {BLOCK} bytes is left out from there on"]
