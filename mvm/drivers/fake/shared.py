"""One fake host for all processes of a stack."""

from __future__ import annotations

import fcntl
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mvm.drivers.fake import FakeHost
from mvm.ports.clock import Clock

_KEPT = ("machines", "consoles", "taps", "bridges", "files", "saved", "spoilt", "revisions", "groups",
         "out_of_memory", "last_pid", "rules", "tampered", "forwards")  # fmt: skip


class SharedFakeHost(FakeHost):
    """A `FakeHost` whose contents are in the file `path` between any two calls.

    So the urgent worker's sweeps see what the other worker started, and guests outlive the stack as real ones do.
    Faults are each process's own, and so are its `locks`: a stack takes real ones.
    """

    def __init__(self, clock: Clock, path: Path) -> None:
        super().__init__(clock)
        self._path = path
        self._inside = False

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Within it no other thread or process reads or changes the host. A part may ask another one within it."""
        with self.lock:
            if self._inside:
                yield
                return
            with self._path.with_suffix(".lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if self._path.exists():
                    vars(self).update(pickle.loads(self._path.read_bytes()))
                self._inside = True
                try:
                    yield
                finally:
                    self._inside = False
                    draft = self._path.with_suffix(".new")
                    draft.write_bytes(pickle.dumps({name: getattr(self, name) for name in _KEPT}))
                    draft.replace(self._path)
