"""Checkpoints: whole or not there at all, whatever happens to the process, the disk and the bits."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

import grpo_watchdog as gw
from fake_training import HEALTHY, Training, attaching, differences
from grpo_watchdog.checkpoints import Ledger
from grpo_watchdog.integrations.torch_codec import decode, encode

SICK = {"log_ratio": 25.0}
Attach = Callable[..., gw.Watchdog]


@pytest.fixture
def attach() -> Iterator[Attach]:
    yield from attaching()


def parts(training: Training) -> dict[str, Any]:
    return {
        "model": training.model, "optimizer": training.optimizer, "scheduler": training.scheduler,
        "state": training.handed_over(),
    }  # fmt: skip


def folders(run_dir: Path) -> list[Path]:
    return sorted(run_dir.glob("checkpoints/ckpt-*"))


@pytest.fixture(scope="module")
def proven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with three proven checkpoints, of steps 0, 4 and 8."""
    run_dir = tmp_path_factory.mktemp("proven") / "run"
    training = Training(1)
    with gw.attach(**parts(training), run_dir=run_dir, probation=2, checkpoint_every=4) as dog:
        for step in range(11):
            training.step()
            dog.observe(step, HEALTHY)
    assert [f.name[-6:] for f in folders(run_dir)] == ["step-0", "step-4", "step-8"]
    assert all((f / "proven").exists() for f in folders(run_dir))
    return run_dir


def truth() -> dict[int, Any]:
    """What the training is after the steps that have a checkpoint."""
    training, states = Training(1), {}
    for step in range(9):
        training.step()
        if step % 4 == 0:
            states[step] = training.snapshot()
    return states


TRUTH = truth()


def resumed(run_dir: Path) -> tuple[int | None, Training]:
    training = Training(7)
    with gw.attach(**parts(training), run_dir=run_dir, resume=True) as dog:
        return dog.resumed_from, training


FILES = ["manifest.json", "model.pt", "optimizer.pt", "training.pt", "watchdog.json"]


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_anywhere_is_noticed(proven: Path, name: str) -> None:
    """torch.load takes most of them silently. Flipped and flipped back, in the newest of three."""
    rng = random.Random(name)
    newest = folders(proven)[-1]
    path = newest / name
    whole = path.read_bytes()
    vault = _vault(proven)
    try:
        for _ in range(100):
            damaged = bytearray(whole)
            damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            with pytest.raises(gw.DamagedError, match=newest.name):
                vault.verify(newest.name)
        vault_sees = [c.step for c in vault.proven()]
    finally:
        path.write_bytes(whole)
    assert vault_sees == [0, 4]
    assert [c.step for c in vault.proven()] == [0, 4, 8]


def _vault(run_dir: Path) -> Any:  # noqa: ANN401
    from grpo_watchdog.checkpoints import Vault  # noqa: PLC0415

    return Vault(run_dir / "checkpoints")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def swap(path: Path) -> None:
    """Put the file of another checkpoint there: whole, but not of this one."""
    other = next(p for p in sorted(path.parent.parent.glob(f"ckpt-*/{path.name}")) if p != path)
    shutil.copy(other, path)


DAMAGE: list[Callable[[Path], object]] = [flip, cut, empty, swap, Path.unlink]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_resumed_run_takes_the_next_proven_checkpoint(
    proven: Path, tmp_path: Path, damage: Callable[[Path], object], name: str
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(proven, run_dir)
    damage(folders(run_dir)[-1] / name)
    step, training = resumed(run_dir)
    assert step == 4
    assert not differences(training.snapshot(), TRUTH[4])


@pytest.mark.parametrize("broken", [1, 2, 3])
def test_a_rollback_takes_the_next_proven_checkpoint_or_halts(tmp_path: Path, attach: Attach, broken: int) -> None:
    training = Training(1)
    dog = attach(**parts(training), run_dir=tmp_path, probation=2, checkpoint_every=4)
    for step in range(11):
        training.step()
        dog.observe(step, HEALTHY)
    for folder, damage in zip(folders(tmp_path)[::-1][:broken], DAMAGE, strict=False):
        damage(folder / "model.pt")
    before = training.snapshot()
    verdict = dog.observe(11, SICK)
    if broken < 3:
        assert verdict.rolled_back_to == 8 - 4 * broken
        assert not verdict.halt
        assert not differences(training.snapshot(), TRUTH[8 - 4 * broken])
        reason = next(o.reason for o in verdict.actions if o.action == "rollback")
        assert "passed over" in reason
    else:
        assert verdict.halt
        assert verdict.rolled_back_to is None
        assert "is not what was written" in dog.halted
        assert not differences(training.snapshot(), before)


def test_resuming_where_no_proven_checkpoint_is_whole_is_refused(proven: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(proven, run_dir)
    for folder in folders(run_dir):
        flip(folder / "training.pt")
    training = Training(7)
    with pytest.raises(gw.DamagedError, match="no proven checkpoint is whole"):
        gw.attach(**parts(training), run_dir=run_dir, resume=True)
    assert not differences(training.snapshot(), Training(7).snapshot())


def test_what_was_not_proven_is_not_trusted_and_what_a_killed_process_left_is_swept(
    proven: Path, tmp_path: Path, attach: Attach
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(proven, run_dir)
    newest = folders(run_dir)[-1]
    (newest / "proven").unlink()
    for left in (".writing-123", ".deleting-ckpt-000009-step-9"):
        shutil.copytree(newest, run_dir / "checkpoints" / left)
    (run_dir / "checkpoints" / "ckpt-of-mine").mkdir()
    training = Training(7)
    dog = attach(**parts(training), run_dir=run_dir, resume=True, probation=2)
    assert dog.resumed_from == 4
    outcome = dog.checkpoint(5)
    assert outcome.ok
    names = sorted(p.name for p in (run_dir / "checkpoints").iterdir())
    assert names == ["ckpt-000001-step-0", "ckpt-000002-step-4", "ckpt-000004-step-5", "ckpt-of-mine"]


# ── a disk that is full, or not to be written ─────────────────────────────────────────────────────────────────────
MOUNT, UMOUNT = shutil.which("mount") or "/bin/mount", shutil.which("umount") or "/bin/umount"


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Return what mounts a small disk of its own with the given options; skip where one may not."""
    place = tmp_path / "disk"
    place.mkdir()

    def make(options: str) -> Path:
        command = [MOUNT, "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        try:
            done = subprocess.run(command, check=False, capture_output=True)
        except OSError:
            pytest.skip("there is no mount")
        if done.returncode:
            pytest.skip("not allowed to mount")
        return place

    yield make
    subprocess.run([UMOUNT, "-l", str(place)], check=False, capture_output=True)


def big_run(disk: Path, attach: Attach) -> tuple[Any, gw.Watchdog]:
    training = Training(1)
    training.model.append(torch.nn.Linear(2, 20_000))  # 240 kB of weights
    run_dir = disk / "run"
    return training, attach(model=training.model, optimizer=training.optimizer, run_dir=run_dir, probation=2)


def test_a_full_disk_is_an_outcome_and_what_was_proven_stays(mount: Callable[[str], Path], attach: Attach) -> None:
    disk = mount("size=1m")
    training, dog = big_run(disk, attach)
    assert dog.checkpoint(0).ok
    for step in range(3):
        dog.observe(step, HEALTHY)
    kept = [p.detach().clone() for p in training.model.parameters()]
    (disk / "others").write_bytes(bytes(os.statvfs(disk).f_bavail * 4096 - 100_000))
    for step in range(3, 6):
        outcome = dog.checkpoint(step)
        assert not outcome.ok
        assert "No space left on device" in outcome.detail
        assert [p.name for p in (disk / "run" / "checkpoints").iterdir()] == ["ckpt-000001-step-0"]
        assert not dog.observe(step, HEALTHY).halt
    with torch.no_grad():
        for parameter in training.model.parameters():
            parameter.add_(1)
    assert dog.observe(6, SICK).rolled_back_to == 0
    assert all(torch.equal(a, b) for a, b in zip(training.model.parameters(), kept, strict=True))
    (disk / "others").unlink()
    assert dog.checkpoint(7).ok


@pytest.mark.parametrize("free", range(0, 400_000, 40_000))
def test_wherever_the_disk_fills_up_nothing_partial_is_left(
    mount: Callable[[str], Path], attach: Attach, free: int
) -> None:
    disk = mount("size=1m")
    _, dog = big_run(disk, attach)
    (disk / "others").write_bytes(bytes(os.statvfs(disk).f_bavail * 4096 - free))
    outcome = dog.checkpoint(0)
    assert outcome.ok == bool(folders(disk / "run"))
    if not outcome.ok:
        assert "No space left on device" in outcome.detail
        assert not [p for p in (disk / "run" / "checkpoints").glob("*") if p.is_dir()]


def test_a_disk_that_may_not_be_written_is_an_outcome(mount: Callable[[str], Path], attach: Attach) -> None:
    disk = mount("size=4m")
    training, dog = big_run(disk, attach)
    assert dog.checkpoint(0).ok
    for step in range(3):
        dog.observe(step, HEALTHY)
    dog.close()
    subprocess.run([MOUNT, "-o", "remount,ro", str(disk)], check=True, capture_output=True)
    outcome = dog.checkpoint(3)
    assert not outcome.ok
    assert "Read-only file system" in outcome.detail
    with torch.no_grad():
        next(training.model.parameters()).add_(1)
    assert dog.observe(4, SICK).rolled_back_to == 0, "what lies there can still be read"


LIMITED = """
import pathlib, resource, signal, sys
import torch
import grpo_watchdog as gw
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
model = torch.nn.Linear(300, 300)
dog = gw.attach(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), run_dir=sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
outcome = dog.checkpoint(0)
print(outcome.ok, outcome.detail)
print([p.name for p in pathlib.Path(sys.argv[1], "checkpoints").iterdir()])
"""


def test_a_file_that_may_not_grow_is_an_outcome(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "run")], check=True, capture_output=True, encoding="utf-8"
    )
    said, left = run.stdout.splitlines()
    assert said.startswith("False ")
    assert "File too large" in said
    assert left == "[]"


# ── kill -9 ───────────────────────────────────────────────────────────────────────────────────────────────────────
KILLS = 50
NURSERY = Path(__file__).with_name("kill_while_saving.py")


def test_a_process_killed_while_saving_leaves_whole_checkpoints_only(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, str(NURSERY), str(tmp_path / "run"), str(KILLS)],
        check=False, capture_output=True, encoding="utf-8",
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    seen = json.loads(run.stdout.splitlines()[-1])
    print(seen)
    assert seen["kills"] == KILLS
    assert seen["torn"] == []
    assert seen["went back"] == []
    assert seen["left half written"] >= 5, "some were killed amid saving"
    assert seen["resumed"] >= KILLS - 3, "nearly all found a proven checkpoint"


# ── what is refused, and that training goes on ────────────────────────────────────────────────────────────────────
def make_nan(training: Training) -> None:
    with torch.no_grad():
        training.last.bias[1] = float("nan")


def make_moment_inf(training: Training) -> None:
    training.optimizer.state[training.first.weight]["exp_avg_sq"][2, 3] = float("inf")


def make_buffer_nan(training: Training) -> None:
    assert training.norm.running_var is not None
    training.norm.running_var[0] = float("nan")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (make_nan, "4.bias is not finite"),
        (make_moment_inf, "exp_avg_sq of 0.weight is not finite"),
        (make_buffer_nan, "1.running_var is not finite"),
    ],
)
def test_a_state_that_is_not_finite_is_not_kept(
    tmp_path: Path, attach: Attach, spoil: Callable[[Training], None], said: str
) -> None:
    training = Training(1)
    dog = attach(**parts(training), run_dir=tmp_path)
    training.step()
    spoil(training)
    outcome = dog.checkpoint(0)
    assert not outcome.ok
    assert said in outcome.detail
    assert folders(tmp_path) == []
    assert not dog.observe(0, HEALTHY).halt
    training.step()


def test_what_is_large_or_was_never_finite_is_kept(tmp_path: Path, attach: Attach) -> None:
    """The norm of a half-precision tensor overflows long before its elements; a mask is made of -inf."""
    model = torch.nn.Linear(200, 200).half()
    model.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))
    with torch.no_grad():
        model.weight.fill_(60000)
        wide = torch.nn.Parameter(torch.full((1000,), 1e38))
    model.register_parameter("wide", wide)
    tiny = torch.nn.Parameter(torch.ones(4).to(torch.float8_e4m3fn), requires_grad=False)
    model.register_parameter("tiny", tiny)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    dog = attach(model=model, optimizer=optimizer, run_dir=tmp_path)
    outcome = dog.checkpoint(0)
    assert outcome.ok, outcome.detail
    tiny.data[1] = float("nan")
    assert "tiny is not finite" in dog.checkpoint(1).detail


@given(
    probation=st.integers(1, 5),
    keep=st.integers(1, 4),
    moves=st.lists(st.tuples(st.booleans(), st.integers(0, 4)), max_size=60),
)
def test_retention_never_deletes_the_last_proven_one(probation: int, keep: int, moves: list[tuple[bool, int]]) -> None:
    ledger, best = Ledger(probation, keep), ""
    there: set[str] = set()
    for number, (save, mood) in enumerate(moves):
        proven, gone = ledger.tick(healthy=mood > 0)
        there -= set(gone)
        assert best not in gone or proven, "the newest proven one goes only when there is a newer one"
        best = max([best, *proven])
        assert not best or best in there
        assert [c.id for c in ledger.entries] == sorted(there)
        assert len(ledger.proven()) <= keep
        if save:
            there.add(f"{number:06d}")
            ledger.add(f"{number:06d}", number, {})


def test_retention_keeps_the_newest_proven_ones_on_disk(tmp_path: Path, attach: Attach) -> None:
    training = Training(1)
    dog = attach(**parts(training), run_dir=tmp_path, probation=2, checkpoint_every=1, keep=2)
    for step in range(12):
        dog.observe(step, HEALTHY)
        stamped = [f for f in folders(tmp_path) if (f / "proven").exists()]
        assert len(stamped) == min(max(step - 1, 0), 2)
    for step in range(12, 20):  # trouble: the candidates go, the proven ones stay
        dog.observe(step, {"log_ratio": 6.0})
        assert [f.name[-7:] for f in folders(tmp_path)] == ["-step-8", "-step-9"]


# ── what a checkpoint can hold ────────────────────────────────────────────────────────────────────────────────────
def through_a_file(value: Any, folder: Path) -> Any:  # noqa: ANN401
    torch.save(encode(value, "state"), folder / "state.pt")
    return decode(torch.load(folder / "state.pt", weights_only=True))


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint8,
    torch.bool, torch.complex64,
]  # fmt: skip
tensors = st.builds(
    lambda dtype, shape, seed: (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 9 - 3).to(dtype),
    st.sampled_from(DTYPES), st.sampled_from([(), (0,), (3,), (2, 0, 2), (2, 3)]), st.integers(0, 99),
)  # fmt: skip
arrays = npst.arrays(
    st.one_of(npst.boolean_dtypes(), npst.integer_dtypes(endianness="?"), npst.unsigned_integer_dtypes(),
              npst.floating_dtypes(endianness="?"), npst.complex_number_dtypes()),
    npst.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=3),
)  # fmt: skip
scalars = npst.from_dtype(np.dtype("f4")) | npst.from_dtype(np.dtype("i8")) | npst.from_dtype(np.dtype("?"))
hashable = (
    st.none() | st.booleans() | st.integers() | st.integers(2**999, 2**3000) | st.floats() | st.text() | st.binary()
)
keys = st.recursive(hashable, lambda k: st.tuples(k, k) | st.frozensets(k, max_size=2), max_leaves=3)
states = st.recursive(
    hashable | tensors | arrays | scalars,
    lambda v: (
        st.lists(v, max_size=3)
        | st.lists(v, max_size=3).map(tuple)
        | st.dictionaries(keys | st.just("__kind__"), v, max_size=3)
        | st.dictionaries(keys, v, max_size=3).map(OrderedDict)
        | st.dictionaries(keys, v, max_size=3).map(lambda d: defaultdict(list, d))
        | st.dictionaries(keys, st.integers(), max_size=3).map(Counter)
        | st.sets(keys, max_size=3)
        | st.lists(v, max_size=3).map(lambda items: deque(items, maxlen=5))
    ),
    max_leaves=8,
)


@given(state=states)
def test_any_state_comes_back_exactly(state: Any, tmp_path_factory: pytest.TempPathFactory) -> None:  # noqa: ANN401
    folder = tmp_path_factory.getbasetemp()
    back = through_a_file(state, folder)
    assert not differences(sorted_sets(back), sorted_sets(state))
    if isinstance(state, deque):
        assert back.maxlen == state.maxlen
    if isinstance(state, defaultdict):
        assert back.default_factory is state.default_factory


def sorted_sets(value: Any) -> Any:  # noqa: ANN401
    """Return the value with sets and deques as lists: they have no order, and no index."""
    if isinstance(value, set | frozenset):
        return [type(value).__name__, *sorted(repr(sorted_sets(item)) for item in value)]
    if isinstance(value, deque):
        return ["deque", *map(sorted_sets, value)]
    if isinstance(value, list | tuple):
        return type(value)(map(sorted_sets, value))
    if isinstance(value, dict):
        return OrderedDict((repr(sorted_sets(k)), sorted_sets(v)) for k, v in value.items()) | {
            "type": type(value).__name__
        }
    return value


Point = namedtuple("Point", "x y")  # noqa: PYI024 - the plain one


class Settings(dict[str, int]):
    """A dict of a user's own."""


def circle() -> list[Any]:
    ring: list[Any] = []
    ring.append(ring)
    return ring


@pytest.mark.parametrize(
    ("state", "where"),
    [
        (object(), "thing is a object"),
        ({"a": [1, {"b": print}]}, "thing['a'][1]['b'] is a builtin_function_or_method"),
        ({"point": Point(1, 2)}, "thing['point'] is a Point"),
        ({"settings": Settings(a=1)}, "thing['settings'] is a Settings"),
        ({"late": defaultdict(lambda: 3)}, "thing['late'] is a defaultdict of <function"),
        ({"names": np.array(["a"], dtype=object)}, "thing['names'] is a numpy ndarray of object"),
        ({torch.ones(1): 1}, "thing has a tensor as a key"),
        ({Point(1, 2): 1}, "thing: the key Point(x=1, y=2) is a Point"),
        ({"path": Path()}, "thing['path'] is a"),
        (circle(), "the state of thing cannot be read: RecursionError"),
    ],
)
def test_what_cannot_be_stored_is_said_at_attach(tmp_path: Path, state: Any, where: str) -> None:  # noqa: ANN401
    training = Training(1)
    given_state = {"thing": (lambda: state, lambda _: None)}
    with pytest.raises(gw.ConfigurationError) as caught:
        gw.attach(model=training.model, optimizer=training.optimizer, state=given_state, run_dir=tmp_path / "run")
    assert where in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_what_has_no_state_or_a_taken_name_is_said_at_attach() -> None:
    training = Training(1)

    def attach_with(**state: Any) -> None:
        gw.attach(model=training.model, optimizer=training.optimizer, scheduler=training.scheduler, state=state)

    with pytest.raises(gw.ConfigurationError, match="thing is a list: it needs state_dict and load_state_dict"):
        attach_with(thing=[1])
    with pytest.raises(gw.ConfigurationError, match="'scheduler' is taken"):
        attach_with(scheduler=training.scheduler)
    with pytest.raises(gw.ConfigurationError, match=r"'rng\.torch' is taken"):
        attach_with(**{"rng.torch": training.sampler})
