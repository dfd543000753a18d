"""The fire drill's report: what was proven on this training before the real run, what failed, and what could not be."""

from __future__ import annotations

import runpy
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

Result = Literal["pass", "fail", "unproven"]

# Set by `grpo-watchdog drill`: called, with the watchdog, where the script's training begins.
rehearsal: Callable[[Any], None] | None = None
folder = ""  # where such a run's journal and checkpoints go, meanwhile


class Proof(NamedTuple):
    """One thing that the watchdog must be able to do, tried on the training itself.

    Attributes:
        what: which dose, or what else.
        result: "pass", "fail", or "unproven" where it could not be tried: that is never a pass.
        detail: what was seen, or why it could not be tried.
        seconds: how long it took, putting everything back included [s].
    """

    what: str
    result: Result
    detail: str
    seconds: float


class DrillReport(NamedTuple):
    """All proofs of one drill; prints as a table."""

    proofs: tuple[Proof, ...]

    @property
    def passed(self) -> bool:
        """Return whether nothing failed and something was proven."""
        results = {proof.result for proof in self.proofs}
        return "fail" not in results and "pass" in results

    def as_json(self) -> list[dict[str, Any]]:
        """Return the proofs as JSON-able values."""
        return [proof._asdict() for proof in self.proofs]

    def __str__(self) -> str:
        """Return a table, a line for each proof, and the verdict."""
        width = max((len(proof.what) for proof in self.proofs), default=0)
        rows = [f"{p.result.upper():8}  {p.what:{width}}  {p.seconds:7.3f} s  {p.detail}" for p in self.proofs]
        count = {kind: sum(p.result == kind for p in self.proofs) for kind in ("pass", "fail", "unproven")}
        told = f"{count['pass']} proven, {count['fail']} failed, {count['unproven']} could not be proven"
        return "\n".join([*rows, f"drill {'passed' if self.passed else 'FAILED'}: {told}"])


class DoneError(BaseException):
    """Ends a script that is only run for its drill: what the script catches must not keep it going."""


def of_script(script: Path, arguments: Sequence[str]) -> tuple[DrillReport | None, str]:
    """Run a script up to where its training begins, and drill there, on the first watchdog that it attached.

    Its journal and checkpoints go to a temporary folder; what the script itself writes before, it writes.

    Returns:
        The report, or None and what happened instead.
    """
    reports: list[DrillReport] = []

    def rehearse(dog: Any) -> None:  # noqa: ANN401
        reports.append(dog.drill())
        raise DoneError

    argv, path = sys.argv, list(sys.path)
    sys.argv, sys.path[0:0] = [str(script), *arguments], [str(script.resolve().parent)]
    what = "it never attached a watchdog, or never observed a step"
    with tempfile.TemporaryDirectory(prefix="drill-") as place:
        globals().update(rehearsal=rehearse, folder=place)
        try:
            runpy.run_path(str(script), run_name="__main__")
        except DoneError:
            pass
        except SystemExit as error:
            what = f"it ended with {error.code!r} before a step was observed"
        except Exception as error:  # noqa: BLE001 - whatever a stranger's script raises
            what = f"{type(error).__name__}: {error}"
        finally:
            globals().update(rehearsal=None, folder="")
            sys.argv, sys.path[:] = argv, path
    return (reports[0], "") if reports else (None, what)
