"""Time and randomness, so that services have neither of their own."""

from __future__ import annotations

from datetime import datetime
from typing import Protocol


class Clock(Protocol):
    """Wall time, monotonic time, and random bytes."""

    def now(self) -> datetime:
        """The wall time, in UTC."""
        ...

    def monotonic(self) -> float:
        """Seconds that only grow."""
        ...

    def random(self, count: int) -> bytes:
        """`count` random bytes."""
        ...
