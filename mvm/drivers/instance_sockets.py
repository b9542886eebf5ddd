"""Unix sockets in an instance's directory, on which its VMM listens: the guest's ports and the VMM's monitor.

Each serves one client at a time; threads and processes take turns by a lock file beside it.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mvm.errors import Failed

_TURN_S = 0.01  # when a taken socket is tried again, at first; the kernel tells nobody when a lock ends
_LONGEST_TURN_S = 0.08
_BACKLOG = 16


def listen(directory: Path, name: str) -> socket.socket:
    """A listening socket for a VMM to inherit, and its lock file; replaces a former run's."""
    with _open_directory(directory) as fd:
        listener = socket.socket(socket.AF_UNIX)
        try:
            os.close(os.open(f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=fd))
            path = _path(fd, name)
            Path(path).unlink(missing_ok=True)
            listener.bind(path)
            listener.listen(_BACKLOG)
        except OSError as error:
            listener.close()
            raise Failed("vmm.start_failed", f"no socket in {directory}: {error.strerror}") from None
        return listener


class NoTurn(TimeoutError):
    """All of the sockets were in use for as long as was waited."""


class Connection:
    """The first of the sockets `names` that is free, for as long as it is open; `end` is a monotonic time.

    Raises `TimeoutError` past `end`, `NoTurn` of it while others use them, and `ConnectionError` when nobody listens.
    """

    def __init__(self, directory: Path, names: Sequence[str], end: float) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self._lock = -1
        try:
            self._connect(directory, names, end)
        except (FileNotFoundError, NotADirectoryError):
            self.close()
            raise ConnectionError("nobody listens") from None
        except BlockingIOError:
            self.close()
            raise TimeoutError("nobody answers") from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Hang up, then let the next one have its turn: it finds the socket free."""
        self.socket.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _connect(self, directory: Path, names: Sequence[str], end: float) -> None:
        with _open_directory(directory) as fd:
            name = self._take_turn(fd, names, end)
            # A blocking connect waits while the VMM has not yet dismissed clients that were killed.
            seconds, fraction = divmod(remaining(end), 1)
            limit = struct.pack("@ll", int(seconds), int(fraction * 1e6))
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
            self.socket.connect(_path(fd, name))

    def _take_turn(self, directory: int, names: Sequence[str], end: float) -> str:
        """Lock the first that is free; the lock ends with us, however we end."""
        pause = _TURN_S
        while True:
            for name in names:
                self._lock = os.open(f"{name}.lock", os.O_RDWR | os.O_CLOEXEC, dir_fd=directory)
                try:
                    fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return name
                except BlockingIOError:
                    os.close(self._lock)
                    self._lock = -1
            left = end - time.monotonic()
            if left <= 0:
                raise NoTurn
            threading.Event().wait(min(pause, left))
            pause = min(pause * 2, _LONGEST_TURN_S)


def remaining(end: float) -> float:
    """Seconds until the monotonic time `end`; raises `TimeoutError` past it."""
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


@contextmanager
def _open_directory(directory: Path) -> Iterator[int]:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _path(directory: int, name: str) -> str:
    """A socket's path by its directory's descriptor: the real one may exceed the 107 bytes that fit an address."""
    return f"/proc/self/fd/{directory}/{name}.sock"
