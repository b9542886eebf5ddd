"""The size of the pages in which a process started here has its memory."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_SET_THP_DISABLE = 41  # prctl(2)
_libc = ctypes.CDLL(None, use_errno=True)
_lock = threading.Lock()


@contextmanager
def small() -> Iterator[None]:
    """What is started within the block gets no huge pages, whatever it asks for; they have their setting for life.

    QEMU asks for huge ones for translated code: 2 MB where a clone needs a few kB more. A kernel that refuses is
    let be.
    """
    with _lock:
        _disable_huge(1)
        try:
            yield
        finally:
            _disable_huge(0)


def _disable_huge(disabled: int) -> None:
    _libc.prctl(_SET_THP_DISABLE, ctypes.c_ulong(disabled), *[ctypes.c_ulong(0)] * 3)
