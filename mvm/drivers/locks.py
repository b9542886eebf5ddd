"""Locks between threads and processes: ``flock`` on files, which the kernel releases with their holder.

A holder that is stopped (SIGSTOP, a debugger's) holds up nobody for ever: whoever has waited for its lock, and seen it
stopped all the while, takes the lock over. Its file then is another one.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
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
_SEEN_S = 0.1  # the most that one look counts for: the looker may have been stopped itself


class FileLocks:
    """ports/locks.py over files in `directory`, which is made when needed. A lock's file is gone when nobody has it."""

    def __init__(self, directory: Path, *, takeover_s: float = 30.0) -> None:
        self._directory = directory
        self._takeover_s = takeover_s

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
                if _is_at(fd, path):  # else it was taken over
                    path.unlink()
            os.close(fd)

    def wait_free(self, name: str, *, deadline_s: float) -> bool:
        """See ports/locks.py. A lock that nobody holds has no file, so that mostly nothing is opened."""
        path = self._directory / _file_name(name)
        return _asking(lambda: _is_free(path) or None, monotonic() + deadline_s) is not None

    def _acquire(self, path: Path, end: float) -> int | None:
        """A descriptor that holds the lock, or None at the deadline."""
        watch = _Watch(path)

        def ask() -> int | None:
            fd = self._try(path)
            if fd is None and watch.stopped_s() >= self._takeover_s:
                self._break(path, watch)
            return fd

        return _asking(ask, end)

    def _break(self, path: Path, watch: _Watch) -> None:
        """Put the file of a stopped holder out of the way; one at a time, so that nobody removes a successor's."""
        fd = self._try(self._directory / "takeover.lock")
        if fd is None:
            return
        try:
            if watch.same():
                with suppress(FileNotFoundError):
                    path.unlink()
        finally:
            os.close(fd)

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
                if _is_at(fd, path):
                    _sign(fd)
                    return fd
            except BlockingIOError:
                os.close(fd)
                return None
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)  # its last holder removed the file after we had opened it: this lock is nobody's


class _Watch:
    """How long the process that holds a lock has been seen stopped, without a break."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._holder: tuple[int, int] | None = None
        self._since = 0.0
        self._seen_s = 0.0

    def stopped_s(self) -> float:
        """Look once more, and tell."""
        now, holder = monotonic(), self._look()
        if holder is None or holder != self._holder:
            self._seen_s = 0.0
        else:
            self._seen_s += min(now - self._since, _SEEN_S)
        self._holder, self._since = holder, now
        return self._seen_s

    def same(self) -> bool:
        """Whether the lock is still that of the process that was seen, and it is stopped still."""
        return self._holder is not None and self._look() == self._holder

    def _look(self) -> tuple[int, int] | None:
        """The lock file's inode and its holder's pid, if that is stopped."""
        try:
            with self._path.open("rb") as file:
                inode, pid = os.fstat(file.fileno()).st_ino, int(file.read() or b"0")
            stat = Path(f"/proc/{pid}/stat").read_bytes()
        except (OSError, ValueError):
            return None
        return (inode, pid) if stat.rpartition(b") ")[2][:1] == b"T" else None


def _sign(fd: int) -> None:
    """Write down who holds the lock, for whoever waits for it while its holder is stopped.

    On a full disk it is held without: what only reads needs no room.
    """
    try:
        os.pwrite(fd, f"{os.getpid():<10}".encode(), 0)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise


def _is_at(fd: int, path: Path) -> bool:
    """Whether the open file still is the one at `path`."""
    held = os.fstat(fd)
    try:
        there = os.lstat(path)
    except FileNotFoundError:
        return False
    return (held.st_dev, held.st_ino) == (there.st_dev, there.st_ino)


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


@lru_cache(maxsize=1024)
def _file_name(name: str) -> str:
    quoted = quote(name, safe=" ")
    if len(quoted) > _LONGEST_NAME:
        quoted = quoted[:100] + sha256(name.encode()).hexdigest()
    return quoted + ".lock"
