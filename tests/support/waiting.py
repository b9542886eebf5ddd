"""Waiting for an observed condition, with a deadline."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

_PAUSE = threading.Event()
_SHORTEST_S, _LONGEST_S = 0.01, 0.5


def until(condition: Callable[[], object], deadline_s: float, what: str) -> None:
    """Return once `condition` is true; fails with `what` after the deadline.

    A condition that takes long to ask, as a command's answer, is asked half of the time: the machine has other work,
    and is often waited for itself.
    """
    end = time.monotonic() + deadline_s
    asked = time.monotonic()
    while not condition():
        now = time.monotonic()
        if now > end:
            raise AssertionError(f"not within {deadline_s} s: {what}")
        _PAUSE.wait(min(max(now - asked, _SHORTEST_S), _LONGEST_S))
        asked = time.monotonic()
