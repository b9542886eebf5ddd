"""The machine's own clock and randomness."""

from __future__ import annotations

import secrets
import time
from datetime import UTC, datetime


class SystemClock:
    """ports/clock.py over the kernel."""

    def now(self) -> datetime:
        """The wall time, in UTC."""
        return datetime.now(UTC)

    def monotonic(self) -> float:
        """Seconds that only grow."""
        return time.monotonic()

    def random(self, count: int) -> bytes:
        """`count` bytes fit for keys."""
        return secrets.token_bytes(count)
