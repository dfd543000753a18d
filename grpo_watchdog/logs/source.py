"""Source: one file, or standard input, as every reader sees it: decompressed, bounded, its beginning known."""

from __future__ import annotations

import gzip
import io
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from grpo_watchdog.errors import LogError

HEAD = 1 << 16  # bytes that a reader may look at to recognise its format
LONGEST_LINE = 1 << 24  # bytes; what is longer is cut, and said
MOST = 1 << 36  # bytes after decompression; a bomb ends there
MOST_FROM_ONE = 200  # bytes that one compressed byte may become, beyond the first `_FREE`; logs come to 5 to 30
_FREE = 1 << 28
_MOST_SAID = 50
_GZIP = b"\x1f\x8b"


class Source:
    """One log. `-` is standard input.

    Args:
        path: the file.
        progress: called with the bytes of the file that were just read.
    """

    def __init__(self, path: str | Path, progress: Callable[[int], None] | None = None) -> None:
        """Open it and look at its beginning.

        Raises:
            LogError: it cannot be opened, or not decompressed.
        """
        self.path = str(path)
        self.name = "standard input" if self.path == "-" else self.path
        self.notices: list[str] = []
        self._progress = progress
        try:
            raw: BinaryIO = sys.stdin.buffer if self.path == "-" else Path(self.path).open("rb")  # noqa: SIM115
        except OSError as error:
            raise LogError(f"{self.name}: {error.strerror}") from error
        self._raw = io.BufferedReader(_Counted(raw, self._count))
        self._read = 0
        try:
            self.compressed = self._raw.peek(2)[:2] == _GZIP
            opened = gzip.GzipFile(fileobj=self._raw) if self.compressed else self._raw
            self.stream = io.BufferedReader(_Guarded(opened, self), HEAD)  # type: ignore[arg-type]
            self.head: bytes = self.stream.peek(HEAD)[:HEAD]
        except OSError as error:
            self.close()
            raise LogError(f"{self.name}: cannot be read: {error.strerror or error}") from error
        except BaseException:
            self.close()
            raise

    def lines(self) -> Iterator[tuple[int, str]]:
        """Yield (number, text) of every line, the first being 1; undecodable bytes are replaced, and said once."""
        encoding = _encoding(self.head)
        text = io.TextIOWrapper(self.stream, encoding, errors="replace", newline=None)
        number = 0
        while line := text.readline(LONGEST_LINE):
            number += 1
            if len(line) == LONGEST_LINE and not line.endswith("\n"):
                self.say(f"line {number} is longer than {LONGEST_LINE} characters: its end is left out")
                while (rest := text.readline(LONGEST_LINE)) and not rest.endswith("\n"):
                    pass
            if "\ufffd" in line:
                self.say(f"line {number} is not {encoding}: what cannot be read in it is left out")
            yield number, line.rstrip("\n")

    def say(self, text: str) -> None:
        """Keep a notice for the report; the same one once, and not without end."""
        if text not in self.notices and len(self.notices) < _MOST_SAID:
            last = len(self.notices) == _MOST_SAID - 1
            self.notices.append("there is more of this kind, and no more is said" if last else text)

    def error(self, place: str, text: str) -> LogError:
        """Return the error that names this log and the place in it."""
        return LogError(f"{self.name}:{place}: {text}" if place else f"{self.name}: {text}")

    def close(self) -> None:
        """Close the file."""
        if self.path != "-":
            self._raw.close()

    def _count(self, size: int) -> None:
        self._read += size
        if self._progress is not None:
            self._progress(size)

    @property
    def consumed(self) -> int:
        """Return the bytes of the file that were read so far, before decompression."""
        return self._read


def _encoding(head: bytes) -> str:
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    return "utf-8-sig"


class _Counted(io.RawIOBase):
    """Counts what is read."""

    def __init__(self, raw: BinaryIO, count: Callable[[int], None]) -> None:
        self._raw, self._count = raw, count

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        chunk = self._raw.read(len(buffer))
        buffer[: len(chunk)] = chunk
        self._count(len(chunk))
        return len(chunk)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Guarded(io.RawIOBase):
    """Ends a bomb, and turns what decompression raises into the end of what is readable."""

    def __init__(self, stream: gzip.GzipFile | io.BufferedReader, source: Source) -> None:
        self._stream, self._source, self._given = stream, source, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        source = self._source
        try:
            chunk = self._stream.read(len(buffer))
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            if not self._given:
                raise source.error("", f"cannot be decompressed: {error}") from error
            source.say(f"the compressed file ends or breaks after {self._given} bytes: {error}")
            return 0
        except OSError as error:
            raise source.error("", f"cannot be read: {error.strerror or error}") from error
        self._given += len(chunk)
        allowed = min(MOST, _FREE + source.consumed * MOST_FROM_ONE)
        if self._given > allowed:
            source.say(f"decompresses to more than {allowed} bytes: the rest is left out")
            return 0
        buffer[: len(chunk)] = chunk
        return len(chunk)
