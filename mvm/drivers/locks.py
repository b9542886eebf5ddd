"""Locks between threads and processes: ``flock`` on files, which the kernel releases with their holder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from threading import Event
from time import monotonic
from typing import TypeVar
from urllib.parse import quote

from mvm.errors import Failed, TimedOut

_T = TypeVar("_T")
_LONGEST_NAME = 200  # of a file system's 255
_SLOWEST_RETRY_S = 0.025


class FileLocks:
    """ports/locks.py over files in `directory`, which is made when needed. A lock's file is gone when nobody has it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @contextmanager
    def hold(self, name: str, *, deadline_s: float) -> Iterator[None]:
        """See ports/locks.py. A thread that holds `name` already waits for itself."""
        path = self._directory / _file_name(name)
        try:
            fd = self._acquire(path, monotonic() + deadline_s)
        except OSError as error:
            raise Failed(
                "lock.failed", f"{path}: {error.strerror}", hint="is the state directory writable?", lock=name
            ) from None
        if fd is None:
            raise TimedOut(
                "lock.busy", f"{name} was busy for {deadline_s:g} s", hint="another operation holds it; try again",
                lock=name,
            )  # fmt: skip
        try:
            yield
        finally:
            with suppress(OSError):  # the lock ends with its descriptor; a file that stays does no harm
                path.unlink()
            os.close(fd)

    def wait_free(self, name: str, *, deadline_s: float) -> bool:
        """See ports/locks.py. A lock that nobody holds has no file, so that mostly nothing is opened."""
        path = self._directory / _file_name(name)
        return _asking(lambda: _is_free(path) or None, monotonic() + deadline_s) is not None

    def _acquire(self, path: Path, end: float) -> int | None:
        """A descriptor that holds the lock, or None at the deadline."""
        return _asking(lambda: self._try(path), end)

    def _try(self, path: Path) -> int | None:
        """A descriptor that holds the lock now, or None when another has it."""
        while True:
            try:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            except FileNotFoundError:
                self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                continue
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = os.fstat(fd)
                with suppress(FileNotFoundError):
                    there = path.stat(follow_symlinks=False)
                    if (held.st_dev, held.st_ino) == (there.st_dev, there.st_ino):
                        return fd
            except BlockingIOError:
                os.close(fd)
                return None
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)  # its last holder removed the file after we had opened it: this lock is nobody's


def _asking(ask: Callable[[], _T | None], end: float) -> _T | None:
    """What `ask` returns, asked until then or until the deadline.

    The kernel tells nobody that a lock came free within a deadline, so it is asked again, ever more slowly.
    """
    delay = 0.001
    while True:
        answer = ask()
        left = end - monotonic()
        if answer is not None or left <= 0:
            return answer
        Event().wait(min(delay, left))
        delay = min(delay * 2, _SLOWEST_RETRY_S)


def _is_free(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def _file_name(name: str) -> str:
    quoted = quote(name, safe=" ")
    if len(quoted) > _LONGEST_NAME:
        quoted = quoted[:100] + sha256(name.encode()).hexdigest()
    return quoted + ".lock"
