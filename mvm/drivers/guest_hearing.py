"""Hearing a guest's agent. Who answers may be anybody: what one request hears, and the work for it, is bounded."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

from mvm.domain.ids import InstanceRef
from mvm.domain.refusals import guest_refused

_SHARE = 0.25  # of a core, for what one command's guest says
_FREE_S = 0.05  # of each window; what nearly all commands take in all is less
_WINDOW_S = 1.0
_LONGEST_REST_S = 0.1


class Bounds(NamedTuple):
    """How much may be said. Each read and each line is work, however short it is."""

    size: int
    reads: int
    lines: int


class Hearing:
    """What came of the guest of `ref` so far. Raises `GuestRefused` beyond `bounds`."""

    def __init__(self, ref: InstanceRef, bounds: Bounds) -> None:
        self._ref = ref
        self._bounds = bounds
        self._size = self._reads = self._lines = 0
        self._pieces: list[bytes] = []

    def read(self, data: bytes) -> bytes:
        """Count what one read brought."""
        self._size += len(data)
        self._reads += 1
        if self._size > self._bounds.size or self._reads > self._bounds.reads:
            raise guest_refused(self._ref, "a reply without end")
        return data

    def lines(self, data: bytes) -> Iterator[bytes]:
        """The lines that `data`, which came next, completes; of empty ones nothing is said."""
        *complete, rest = data.split(b"\n", self._bounds.lines)
        for line in complete:
            whole = b"".join((*self._pieces, line))
            self._pieces.clear()
            self._lines += 1
            if whole:
                yield whole
        if self._lines > self._bounds.lines or b"\n" in rest:
            raise guest_refused(self._ref, "more lines than it was asked for")
        self._pieces.append(rest)


class Effort:
    """Keeps a thread that hears a guest to a share of a core, however finely the guest cuts what it says.

    What comes meanwhile is heard together, and a guest whose host does not read is held up. The thread's whole time
    counts, also what is done with the parts.
    """

    def __init__(self) -> None:
        self._begin()

    def rest(self) -> None:
        """Wait, for a moment at most, when more than the share was used."""
        passed = time.monotonic() - self._began
        owed = (time.thread_time() - self._used - _FREE_S) / _SHARE - passed
        if owed > 0:
            threading.Event().wait(min(owed, _LONGEST_REST_S))
        elif passed > _WINDOW_S:
            self._begin()

    def _begin(self) -> None:
        self._began = time.monotonic()
        self._used = time.thread_time()
