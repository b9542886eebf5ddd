"""A command in a guest: what it writes while it runs, and how it ended."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ExecOutput:
    """What a command wrote next, in bytes. Both may be empty: then nothing came for a while."""

    stdout: bytes = b""
    stderr: bytes = b""


@dataclass(frozen=True, slots=True)
class ExecEnd:
    """How a command ended. `truncated`: the guest kept only the beginning of a stream. `timed_out`: at its deadline."""

    exit_code: int
    truncated: bool = False
    timed_out: bool = False


ExecPart = ExecOutput | ExecEnd


@dataclass(frozen=True, slots=True)
class ExecResult:
    """A command that ran in a guest, and all that was kept of what it wrote."""

    exit_code: int
    stdout: bytes
    stderr: bytes
    truncated: bool = False
    timed_out: bool = False


def collected(parts: Iterable[ExecPart], *, limit: int = 1 << 20) -> ExecResult:
    """All of a command's parts; of each stream at most `limit` bytes, and `truncated` when there were more."""
    out, err = _Kept(limit), _Kept(limit)
    ended = None
    for part in parts:
        if isinstance(part, ExecOutput):
            out.add(part.stdout)
            err.add(part.stderr)
        else:
            ended = part
    assert ended is not None, "a command's parts have an end"
    truncated = ended.truncated or out.more or err.more
    return ExecResult(ended.exit_code, bytes(out.data), bytes(err.data), truncated, ended.timed_out)


def as_line(argv: Sequence[bytes]) -> bytes:
    """What a shell must be given to run a program with exactly these arguments."""
    words = [shlex.quote(word.decode("utf-8", "surrogateescape")) for word in argv]
    return " ".join(words).encode("utf-8", "surrogateescape")


class _Kept:
    """The beginning of a stream."""

    def __init__(self, limit: int) -> None:
        self.data = bytearray()
        self.more = False
        self._limit = limit

    def add(self, data: bytes) -> None:
        room = self._limit - len(self.data)
        self.data += data[:room]
        self.more = self.more or len(data) > room
