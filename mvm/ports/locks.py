"""Mutual exclusion on one node, between threads and processes."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol


class Locks(Protocol):
    """Named locks that end with their holder, so a killed process leaves none behind.

    One that is stopped for long loses its locks to whoever waits, and is not told: what it then does must be fenced.
    """

    def hold(self, name: str, *, deadline_s: float) -> AbstractContextManager[None]:
        """Hold `name`; raises `TimedOut` (``lock.busy``) when another holds it past the deadline."""
        ...

    def wait_free(self, name: str, *, deadline_s: float) -> bool:
        """Return once nobody holds `name`, or at the deadline; whether it was free."""
        ...
