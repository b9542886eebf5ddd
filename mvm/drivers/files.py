"""What Python's library lacks for files."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

_KEEP_SIZE, _PUNCH_HOLE = 1, 2
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
