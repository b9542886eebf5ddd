"""What Python's library lacks for files."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_AT_FDCWD, _EXCHANGE = -100, 2
_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def closing_fd(fd: int) -> Iterator[int]:
    """Closed at the end of the block."""
    try:
        yield fd
    finally:
        os.close(fd)


def punch(fd: int, length: int) -> None:
    """Give back the blocks of the first `length` bytes; they read as zeros. Where that cannot be, empty the file."""
    if length > 0 and _libc.fallocate(fd, _KEEP_SIZE | _PUNCH_HOLE, ctypes.c_long(0), ctypes.c_long(length)):
        os.ftruncate(fd, 0)


def exchange(one: Path, other: Path) -> None:
    """Each is where the other was, in one step: whoever looks, and whatever crashes, there is never neither.

    Raises `OSError` where the file system cannot, or either is a mount of its own.
    """
    if _libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _EXCHANGE) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(other))
