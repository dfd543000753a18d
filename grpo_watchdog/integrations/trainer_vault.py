"""The vault of a transformers Trainer: its own `checkpoint-N` folders, stamped and protected; no second copy.

What the watchdog knows of a checkpoint lies in `checkpoint-N/grpo_watchdog/`: its memory, a hash of every file that a
rollback reads, and the stamp. `resume_from_checkpoint` of transformers does not look at that folder.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from grpo_watchdog.checkpoints import MEMORY, Checkpoint, Vault, step_of
from grpo_watchdog.errors import CheckpointError, DamagedError
from grpo_watchdog.integrations.trainer_state import MARKS, TrainerState

_RUN = "run"
_PREFIX = "checkpoint-"
_log = logging.getLogger("grpo_watchdog")


class TrainerVault(Vault):
    """Keeps track of the trainer's own checkpoints.

    Args:
        folder: the trainer's output_dir.
        run: what this run is called: stamps of another run in the same folder count for nothing.
        state: reads and completes such a folder.
        best: returns the names of what the trainer calls its best: never deleted here.
        writes: whether this process marks checkpoints: one of several does.
    """

    def __init__(
        self, folder: Path, run: str, state: TrainerState, best: Callable[[], set[str]], *, writes: bool = True
    ) -> None:
        """Remember where; touch nothing."""
        super().__init__(folder)
        self._run, self._state, self._best, self._writes = run, state, best, writes
        self._due: dict[str, Mapping[str, Any]] = {}  # asked for and not written yet: the watchdog's memory
        self._ours: set[str] = set()  # written because the watchdog asked, and for no other reason
        self._marked: dict[str, Mapping[str, Any]] = {}  # the memory of what was written and marked
        self.known: set[str] = set()  # in the ledger: not to be deleted by anybody else

    def save(self, step: int, write: Callable[[Path], None], memory: Mapping[str, Any]) -> str:
        """Ask for one checkpoint and return its id; it is marked when the trainer has written it (`arrived`).

        Raises:
            CheckpointError: the state is not worth keeping, or could not be written.
        """
        checkpoint_id = f"{_PREFIX}{step}"
        self._due[checkpoint_id] = memory
        self.known.add(checkpoint_id)
        if not (self.folder / checkpoint_id).exists() or checkpoint_id in self._ids():
            self._ours.add(checkpoint_id)  # else it takes the place of another run's, which may have been wanted
        try:
            write(self.folder / checkpoint_id)
        except BaseException as error:
            self.forget(checkpoint_id)
            if isinstance(error, CheckpointError) or not isinstance(error, Exception):
                raise
            raise CheckpointError(f"{checkpoint_id} not written: {type(error).__name__}: {error}") from error
        return checkpoint_id

    def disown(self) -> None:
        """Take the marks off what an earlier run of the same name left: this one begins anew."""
        for checkpoint_id in self._ids() if self._writes else ():
            shutil.rmtree(self.marks(checkpoint_id), ignore_errors=True)

    def asked_for(self, checkpoint_id: str) -> bool:
        """Return whether it is waited for."""
        return checkpoint_id in self._due

    def written(self, checkpoint_id: str) -> bool:
        """Return whether it was written and marked before, and is still known."""
        return checkpoint_id in self._marked

    def users(self, checkpoint_id: str) -> None:
        """Take note that the user wanted this one too: it is never deleted here."""
        self._ours.discard(checkpoint_id)

    def arrived(self, checkpoint_id: str) -> None:
        """Mark a checkpoint that the trainer has just written.

        Raises:
            CheckpointError: it could not be restored; it stays on the disk, unmarked.
        """
        memory = self._due.pop(checkpoint_id, None) or self._marked[checkpoint_id]
        self._marked[checkpoint_id] = memory
        if not self._writes:
            return
        folder, marks = self.folder / checkpoint_id, self.marks(checkpoint_id)
        self._state.check(folder)
        shutil.rmtree(marks, ignore_errors=True)  # of an earlier run that wrote here
        marks.mkdir()
        extras = self._state.write_extras(marks)
        told, run = marks / MEMORY, marks / _RUN
        told.write_text(json.dumps(memory))
        run.write_text(self._run)
        own = {str(path.relative_to(folder)): path for path in (extras, told, run)}
        self.seal(marks, step_of(checkpoint_id), {**self._state.files(folder), **own})

    def marks(self, checkpoint_id: str) -> Path:
        """Return the folder in which the manifest, the stamp and the watchdog's own memory lie."""
        return self.folder / checkpoint_id / MARKS

    def stamp(self, checkpoint_id: str) -> None:
        """Mark a checkpoint as proven, on disk."""
        if self._writes and self.marks(checkpoint_id).is_dir():
            super().stamp(checkpoint_id)

    def delete(self, checkpoint_id: str) -> None:
        """Delete a checkpoint that was only written for the watchdog; take its marks off any other."""
        ours = checkpoint_id in self._ours and checkpoint_id not in self._best()
        self.forget(checkpoint_id)
        if not self._writes:
            return
        if ours and (self.folder / checkpoint_id / MARKS).is_dir():
            super().delete(checkpoint_id)
        else:
            shutil.rmtree(self.marks(checkpoint_id), ignore_errors=True)

    def forget(self, checkpoint_id: str) -> None:
        """Leave a checkpoint to the trainer."""
        self._due.pop(checkpoint_id, None)
        self._marked.pop(checkpoint_id, None)
        self.known.discard(checkpoint_id)
        self._ours.discard(checkpoint_id)

    def rotate(self, limit: int | None) -> None:
        """Delete the oldest checkpoints over the user's `save_total_limit`, but none that the watchdog needs."""
        if not limit or limit < 0 or not self._writes:
            return
        kept = sorted(self.folder.glob(f"{_PREFIX}[0-9]*"), key=lambda path: path.stat().st_mtime)
        wanted = {path.name for path in kept[-1:]} | (self._best() & {path.name for path in kept})
        safe = wanted | self.known
        surplus = len(kept) - max(limit, len(wanted))
        for path in kept:
            if surplus <= 0:
                break
            if path.name not in safe:
                shutil.rmtree(path, ignore_errors=True)
                surplus -= 1

    def proven(self) -> list[Checkpoint]:
        """Return the checkpoints of this run that are stamped and whole, oldest first, and keep them from now on."""
        found = super().proven()
        self.known |= {checkpoint.id for checkpoint in found}
        return found

    def verify(self, checkpoint_id: str) -> Path:
        """Return the folder of a checkpoint after every byte was held against its manifest."""
        if checkpoint_id in self._due:
            raise DamagedError(f"{checkpoint_id} was asked for and never written")
        return super().verify(checkpoint_id)

    def _ids(self) -> list[str]:
        """Return this run's checkpoints on disk, oldest first."""
        found = [path.parent.parent.name for path in self.folder.glob(f"{_PREFIX}[0-9]*/{MARKS}/{_RUN}")]
        return sorted((name for name in found if self._of_this_run(name)), key=step_of)

    def _of_this_run(self, name: str) -> bool:
        try:
            return (self.marks(name) / _RUN).read_text() == self._run
        except OSError as error:
            _log.warning("passed over: %s: %s", name, error)
            return False
