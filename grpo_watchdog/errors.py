"""Everything the watchdog raises, as one tree.

WatchdogError
├── ConfigurationError      an option, a knob or a handed-over object cannot be used
│   └── RulebookError       a rulebook cannot be used; lists every problem as file:line:column
├── CheckpointError         a checkpoint cannot be written, trusted or restored
│   ├── DamagedError        what lies on disk is not what was written
│   └── RestartError        this trainer goes back to a checkpoint only when it is started anew
├── JournalError            a journal cannot be read
└── LogError                a log cannot be read, or nothing in it can be used

Bad configuration raises. Trouble in the run is returned in a verdict, and an action that failed is an
outcome: nothing here is ever raised out of `Watchdog.observe`.
"""

from __future__ import annotations

from typing import NamedTuple


class WatchdogError(Exception):
    """Base of every error of this package."""


class ConfigurationError(WatchdogError):
    """An option, a knob or an object that was handed over cannot be used."""


class Problem(NamedTuple):
    """One thing wrong with a rulebook, and where."""

    file: str
    line: int
    column: int
    message: str

    def __str__(self) -> str:
        """Return `file:line:column: message`, as editors and compilers print it."""
        return f"{self.file}:{self.line}:{self.column}: {self.message}"


class RulebookError(ConfigurationError):
    """A rulebook cannot be used.

    Attributes:
        problems: everything that is wrong, in the order of the file.
    """

    def __init__(self, problems: list[Problem]) -> None:
        """Keep the problems, sorted by place."""
        self.problems = tuple(sorted(problems))
        super().__init__("\n".join(map(str, self.problems)))


class CheckpointError(WatchdogError):
    """A checkpoint cannot be written, trusted or restored; the message says which and why."""


class DamagedError(CheckpointError):
    """What lies on disk is not what was written: a hash, a size or a file does not match."""


class RestartError(CheckpointError):
    """This trainer cannot be put back while it runs; it can be started anew from that checkpoint."""


class JournalError(WatchdogError):
    """A journal cannot be read: it is absent, of another schema, or not a journal."""


class LogError(WatchdogError):
    """A log cannot be read, or nothing in it can be used: one line of where, what, and what is allowed."""
