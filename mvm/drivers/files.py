"""What Python's library lacks for files."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event

_TURN_S = 1.0
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_AT_FDCWD, _EXCHANGE = -100, 2
_LONGEST_NAME = 200  # of 255, so that more fits behind it
_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def closing_fd(fd: int) -> Iterator[int]:
    """Closed at the end of the block."""
    try:
        yield fd
    finally:
        os.close(fd)


def take_turn(fd: int, meanwhile: Callable[[], None]) -> None:
    """Hold the lock of the open file `fd` alone. While others do, `meanwhile` is called about once a second, and may
    raise.
    """
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            meanwhile()
            Event().wait(_TURN_S)  # nothing tells when it is free
        else:
            return


def sync(path: Path) -> None:
    """What was written to `path` is on the disk: a file's content, or a directory's names."""
    with closing_fd(os.open(path, os.O_RDONLY | os.O_CLOEXEC)) as fd:
        os.fsync(fd)


def write_new(path: Path, data: bytes) -> None:
    """A new file `path` holds `data`, 0600, and does so on the disk once its directory is synced.

    Raises `FileExistsError`. Every `OSError` of this and the following ones names a file.
    """
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # a write does not tell of which file it was
        error.filename = error.filename or str(path)
        raise


def write_private(path: Path, data: bytes) -> None:
    """`path` holds `data`, 0600, and does so on the disk; at no moment is it anything between before and after.

    Of several writers at once the last one is right.
    """
    with _drafted(path, data) as draft:
        draft.rename(path)
    sync(path.parent)


def write_once(path: Path, data: bytes) -> None:
    """`path` is there, whole, 0600 and on the disk. It holds `data`, or what it held before.

    Of several writers at once the first one is right, but on a file system without hard links.
    """
    if path.exists():
        return
    with _drafted(path, data) as draft:
        try:
            path.hardlink_to(draft)
        except FileExistsError:
            pass
        except OSError:  # there are no links here
            draft.rename(path)
    sync(path.parent)


@contextmanager
def _drafted(path: Path, data: bytes) -> Iterator[Path]:
    """A file with `data` beside `path`, of a name of its own; it is gone after the block."""
    draft = path.with_name(f".{path.name[:_LONGEST_NAME]}.{os.urandom(8).hex()}")
    try:
        write_new(draft, data)
        yield draft
    finally:
        draft.unlink(missing_ok=True)


def punch(fd: int, length: int) -> None:
    """Give back the blocks of the first `length` bytes; they read as zeros. Where that cannot be, empty the file."""
    if length > 0 and _libc.fallocate(fd, _KEEP_SIZE | _PUNCH_HOLE, ctypes.c_long(0), ctypes.c_long(length)):
        os.ftruncate(fd, 0)


def take_place(new: Path, old: Path) -> None:
    """The directory `new` is where `old` is, or was not; what was there is at `new`, if it was there.

    In one step, but on a file system that cannot: there nothing is in between, and a crash then leaves what was there
    at `former`. For one caller at a time.
    """
    try:
        exchange(new, old)
    except FileNotFoundError:
        new.rename(old)
        shutil.rmtree(former(old), ignore_errors=True)  # of one that was killed
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        _step_aside(new, old)


def former(place: Path) -> Path:
    """Where `take_place` puts what was at `place`, for a moment, on a file system that cannot exchange."""
    return place.with_name(f"{place.name}.former")


def _step_aside(new: Path, old: Path) -> None:
    aside = former(old)
    shutil.rmtree(aside, ignore_errors=True)  # of one that was killed: another is at its place by now
    old.rename(aside)
    try:
        new.rename(old)
    except OSError:
        aside.rename(old)
        raise
    aside.rename(new)


def exchange(one: Path, other: Path) -> None:
    """Each is where the other was, in one step: whoever looks, and whatever crashes, there is never neither.

    Raises `OSError` where the file system cannot, or either is a mount of its own.
    """
    if _libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _EXCHANGE) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(other))


def reserve(fd: int, length: int) -> None:
    """Have the file system keep blocks for its first `length` bytes, without making it longer; where that can be."""
    _libc.fallocate(fd, _KEEP_SIZE, ctypes.c_long(0), ctypes.c_long(length))
