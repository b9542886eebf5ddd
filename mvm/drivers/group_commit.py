"""Commits of many threads reach the disk together.

A disk takes milliseconds to say that something is on it. SQLite with ``synchronous = FULL`` asks at every commit, and
lets no other writer begin meanwhile. With ``NORMAL`` it writes the commit into its write-ahead log and does not ask;
then `GroupCommit.reached` asks once for all who wait.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path


class GroupCommit:
    """For one database file in WAL mode, whose connections have ``synchronous = NORMAL``."""

    def __init__(self, database: Path) -> None:
        self._log = f"{database}-wal"
        self._counting = threading.Lock()
        self._asking = threading.Lock()
        self._committed = 0
        self._on_disk = 0

    def reached(self) -> None:
        """Return once everything that the calling thread has committed is on the disk. Raises `OSError`."""
        with self._counting:
            self._committed += 1
            mine = self._committed
        with self._asking:
            if self._on_disk >= mine:
                return  # whoever asked last came after our commit
            with self._counting:
                upto = self._committed
            log = os.open(self._log, os.O_RDONLY | os.O_CLOEXEC)  # SQLite has no locks on this file that we could end
            try:
                os.fdatasync(log)
            finally:
                os.close(log)
            self._on_disk = upto
