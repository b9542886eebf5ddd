"""One fake host for all processes of a stack."""

from __future__ import annotations

import fcntl
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mvm.drivers.fake import FakeHost
from mvm.ports.clock import Clock

_KEPT = ("machines", "consoles", "taps", "bridges", "files", "saved", "spoilt", "revisions", "groups",
         "out_of_memory", "endings", "last_pid", "rules", "tampered", "forwards")  # fmt: skip
_MARK_BYTES = 16  # of what a write begins with, so that nobody reads again what he wrote himself


class SharedFakeHost(FakeHost):
    """A `FakeHost` whose contents are in the file `path` between any two calls.

    So the urgent worker's sweeps see what the other worker started, and guests outlive the stack as real ones do.
    Faults are each process's own, and so are its `locks`: a stack takes real ones.
    """

    def __init__(self, clock: Clock, path: Path) -> None:
        super().__init__(clock)
        self._path = path
        self._inside = False
        self._mark = bytes(_MARK_BYTES)

    @contextmanager
    def turn(self, *, looks: bool = False) -> Iterator[None]:
        """Within it no other thread or process reads or changes the host. A part may ask another one within it.

        Writing takes a tenth of a second with some hundred guests, and makes everybody else read: who only `looks`
        does not write.
        """
        with self.lock:
            if self._inside:
                yield
                return
            with self._path.with_suffix(".lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                self._read()
                self._inside = True
                try:
                    yield
                finally:
                    self._inside = False
                    if not looks:
                        self._write()

    def _read(self) -> None:
        """Take over what another process has written since."""
        with suppress(FileNotFoundError), self._path.open("rb") as file:
            mark = file.read(len(self._mark))
            if mark != self._mark:
                vars(self).update(pickle.load(file))
                self._mark = mark

    def _write(self) -> None:
        draft, self._mark = self._path.with_suffix(".new"), os.urandom(_MARK_BYTES)
        draft.write_bytes(self._mark + pickle.dumps({name: getattr(self, name) for name in _KEPT}))
        draft.replace(self._path)
