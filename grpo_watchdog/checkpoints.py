"""Checkpoints: the ledger of which exist and which are proven healthy, and the vault that keeps them on disk.

A checkpoint is a candidate until `probation` healthy observations have followed it. Trouble in between
discards it. The ledger decides from what it was told and touches no disk; the vault writes atomically
(temporary folder, fsync, rename), with a hash manifest, and verifies every byte before anything is restored.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from grpo_watchdog.errors import CheckpointError, DamagedError

_MANIFEST, _PROVEN, MEMORY = "manifest.json", "proven", "watchdog.json"
_SCHEMA = 1
_ID = re.compile(r"ckpt-(\d+)-step--?\d+")
_STEP, _SERIAL = re.compile(r"-(-?\d+)$"), re.compile(r"-(\d+)")
_log = logging.getLogger("grpo_watchdog")


class Checkpoint(NamedTuple):
    """One checkpoint.

    Attributes:
        id: the name of its folder; unique in a run, its first number ascending in the order of saving.
        step: the step after which it was taken.
        healthy: healthy observations since.
        proven: whether there were enough of them.
        memory: the findings' state at that step, which a rollback brings back.
        born: the ledger's count of observations when it was taken; -1 for one of an earlier session.
    """

    id: str
    step: int
    healthy: int
    proven: bool
    memory: dict[str, Any]
    born: int = 0


def step_of(checkpoint_id: str) -> int:
    """Return the step that a checkpoint's id ends in."""
    found = _STEP.search(checkpoint_id)
    if found is None:
        raise DamagedError(f"{checkpoint_id} is not the name of a checkpoint")
    return int(found[1])


def serial(checkpoint_id: str) -> int:
    """Return the number by which checkpoints of one run are ordered, whoever names them."""
    found = _SERIAL.search(checkpoint_id)
    return int(found[1]) if found else -1


class Ledger:
    """Which checkpoints exist, oldest first, and which are proven. Pure memory.

    Args:
        probation: healthy observations that prove a checkpoint [observations].
        keep: how many proven checkpoints are kept.
    """

    def __init__(self, probation: int, keep: int) -> None:
        """Start empty."""
        self._probation, self._keep = probation, keep
        self.entries: list[Checkpoint] = []
        self._settling = False  # whether any candidate waits
        self._now = 0  # observations
        self._shorter = 1.0

    def add(self, checkpoint_id: str, step: int, memory: dict[str, Any]) -> None:
        """Enter a fresh candidate."""
        self.entries.append(Checkpoint(checkpoint_id, step, 0, proven=False, memory=memory, born=self._now))
        self._settling = True

    def tick(self, *, healthy: bool) -> tuple[list[str], list[str]]:
        """Count one observation; return the ids that became proven, and those that are to be deleted."""
        self._now += 1
        if not self._settling:
            return [], []
        if not healthy:
            failed = [c.id for c in self.entries if not c.proven]
            self.drop(failed)
            return [], failed
        counted = [c if c.proven else c._replace(healthy=c.healthy + 1) for c in self.entries]
        enough = max(1, round(self._probation * self._shorter))
        proven = [c.id for c in counted if not c.proven and c.healthy >= enough]
        self.entries = [c._replace(proven=c.proven or c.id in proven) for c in counted]
        surplus = self.proven()[: -self._keep] if proven else []
        self.drop([c.id for c in surplus])
        self._settling = any(not c.proven for c in self.entries)
        return proven, [c.id for c in surplus]

    def shorten(self, factor: float) -> None:
        """Take this part of the probation as enough from now on."""
        self._shorter = factor

    def proven(self) -> list[Checkpoint]:
        """Return the proven ones, oldest first."""
        return [c for c in self.entries if c.proven]

    def waiting(self) -> int:
        """Return how many candidates wait for their probation."""
        return sum(not c.proven for c in self.entries)

    def choices(self, older_than: int = 0) -> list[Checkpoint]:
        """Return what a rollback may go to, best first: proven, newest first, taken before a trouble began.

        Where none is that old, the oldest there is.

        Args:
            older_than: how long ago it began; 0 for just now [observations].
        """
        proven = self.proven()
        old_enough = [c for c in reversed(proven) if c.born < self._now - older_than]
        return old_enough or proven[:1]

    def drop(self, ids: list[str]) -> None:
        """Strike checkpoints off."""
        self.entries = [c for c in self.entries if c.id not in ids]
        self._settling = any(not c.proven for c in self.entries)

    def state_dict(self) -> dict[str, Any]:
        """Return the entries as JSON-able values."""
        return {"entries": [list(c) for c in self.entries], "now": self._now, "shorter": self._shorter}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self.entries = [Checkpoint(*row) for row in state["entries"]]
        self._now, self._shorter = state["now"], state["shorter"]
        self._settling = any(not c.proven for c in self.entries)


class Vault:
    """The folder in which checkpoints lie.

    Args:
        folder: made when the first one is saved.
    """

    def __init__(self, folder: Path) -> None:
        """Remember where; touch nothing."""
        self.folder = folder
        self._count = 0
        self._saved: set[str] = set()  # by this vault

    def save(self, step: int, write: Callable[[Path], None], memory: Mapping[str, Any]) -> str:
        """Write one checkpoint and return its id.

        Args:
            step: after which it is taken.
            write: writes the training state into an empty folder.
            memory: the watchdog's own state, stored beside it.

        Raises:
            CheckpointError: it could not be written whole; nothing is left behind.
        """
        temporary = self.folder / f".writing-{os.getpid()}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            checkpoint_id = self._next_id(step)
            self._sweep()
            temporary.mkdir()
            write(temporary)
            (temporary / MEMORY).write_text(json.dumps(memory))
            self.seal(temporary, step, {p.name: p for p in temporary.iterdir()})
            temporary.rename(self.folder / checkpoint_id)
            self._saved.add(checkpoint_id)
            _sync(self.folder)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if not isinstance(error, Exception):
                raise
            told = str(error) if isinstance(error, CheckpointError | OSError) else f"{type(error).__name__}: {error}"
            raise CheckpointError(f"checkpoint of step {step} not written: {told}") from error
        return checkpoint_id

    def verify(self, checkpoint_id: str) -> Path:
        """Return the folder of a checkpoint after every byte was held against its manifest.

        Raises:
            DamagedError: a file is missing, of another size, or of another hash.
        """
        folder = self.folder / checkpoint_id
        try:
            manifest = json.loads((self.marks(checkpoint_id) / _MANIFEST).read_text())
            if manifest.pop("seal") != _seal(manifest):
                raise DamagedError(f"checkpoint {checkpoint_id}: {_MANIFEST} is not what was written")
            for name, expected in manifest["files"].items():
                if _fingerprint(folder / name) != expected:
                    raise DamagedError(f"checkpoint {checkpoint_id}: {name} is not what was written")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedError(f"checkpoint {checkpoint_id}: {type(error).__name__}: {error}") from error
        return folder

    def marks(self, checkpoint_id: str) -> Path:
        """Return the folder in which the manifest, the stamp and the watchdog's own memory lie."""
        return self.folder / checkpoint_id

    def seal(self, marks: Path, step: int, files: Mapping[str, Path]) -> None:
        """Write the manifest over these files, and have all of it on the disk."""
        manifest = {"schema": _SCHEMA, "step": step, "files": {n: _fingerprint(p) for n, p in sorted(files.items())}}
        (marks / _MANIFEST).write_text(json.dumps({**manifest, "seal": _seal(manifest)}))
        for path in (*files.values(), marks / _MANIFEST, marks):
            _sync(path)

    def stamp(self, checkpoint_id: str) -> None:
        """Mark a checkpoint as proven, on disk."""
        mark = self.marks(checkpoint_id) / _PROVEN
        mark.touch()
        _sync(mark.parent)

    def delete(self, checkpoint_id: str) -> None:
        """Delete a checkpoint, all of it or (a process killed meanwhile) none that could be taken for one."""
        doomed = self.folder / f".deleting-{checkpoint_id}"
        try:
            (self.folder / checkpoint_id).rename(doomed)
        except FileNotFoundError:
            return
        except OSError as error:
            _log.warning("checkpoint %s cannot be deleted: %s", checkpoint_id, error)
            return
        shutil.rmtree(doomed, ignore_errors=True)

    def proven(self) -> list[Checkpoint]:
        """Return the checkpoints on disk that are stamped and whole, oldest first; what a resumed run may trust.

        Raises:
            DamagedError: some are stamped, and none of them is whole.
        """
        found, damaged = list[Checkpoint](), list[str]()
        for checkpoint_id in self._ids():
            marks = self.marks(checkpoint_id)
            if (marks / _PROVEN).exists():
                try:
                    self.verify(checkpoint_id)
                    step = json.loads((marks / _MANIFEST).read_text())["step"]
                    memory = json.loads((marks / MEMORY).read_text())
                except (DamagedError, OSError, ValueError, KeyError) as error:
                    _log.warning("passed over: %s", error)
                    damaged.append(str(error))
                    continue
                found.append(Checkpoint(checkpoint_id, step, 0, proven=True, memory=memory, born=-1))
        if damaged and not found:
            raise DamagedError(f"no proven checkpoint is whole: {'; '.join(damaged)}")
        return found

    def _ids(self) -> list[str]:
        """Return the checkpoints on disk, oldest first."""
        return sorted(p.name for p in self.folder.glob("ckpt-*") if _ID.fullmatch(p.name))

    def _next_id(self, step: int) -> str:
        """Return a name that sorts after all others: steps may come again after a rollback."""
        taken = [int(name.split("-")[1]) for name in self._ids()]
        self._count = max([self._count, *taken]) + 1
        return f"ckpt-{self._count:06d}-step-{step}"

    def _sweep(self) -> None:
        """Remove what an earlier process left: half written, half deleted, or never proven."""
        orphans = [
            self.folder / name
            for name in self._ids()
            if name not in self._saved and not (self.folder / name / _PROVEN).exists()
        ]
        for left in (*self.folder.glob(".writing-*"), *self.folder.glob(".deleting-*"), *orphans):
            shutil.rmtree(left, ignore_errors=True)


def _fingerprint(path: Path) -> list[Any]:
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _seal(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
