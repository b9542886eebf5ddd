"""Waiting for an observed condition, with a deadline."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

_PAUSE = threading.Event()


def until(condition: Callable[[], object], deadline_s: float, what: str) -> None:
    """Return once `condition` is true; fails with `what` after the deadline."""
    end = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"not within {deadline_s} s: {what}")
        _PAUSE.wait(0.01)
