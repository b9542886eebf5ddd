"""What a large piece of work has used goes back to the host."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def given_back() -> Iterator[None]:
    """Whatever is allocated within and let go of is no longer this process's afterwards.

    CPython leaves what hangs in cycles until it next looks, and glibc keeps what was freed for a thread that may come
    again: of an image's build, 130 MiB for as long as the worker lives.
    """
    try:
        yield
    finally:
        gc.collect()
        with suppress(AttributeError):  # another C library, which has no such call
            ctypes.CDLL(None).malloc_trim(0)
