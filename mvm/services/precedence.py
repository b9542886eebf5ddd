"""Who goes first on this node's processors."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from mvm.domain import lock_names
from mvm.errors import TimedOut
from mvm.ports.locks import Locks

_LET_PASS_S = 0.5  # the longest that a stream of urgent wakes holds up one job


class Precedence:
    """While urgent wakes are under way no job begins or tells of its end: a backlog leaves them the processors."""

    def __init__(self, locks: Locks) -> None:
        self._locks = locks
        self._lock = threading.Lock()
        self._under_way = 0
        self._held = ExitStack()

    @contextmanager
    def taken(self) -> Iterator[None]:
        """A wake is under way."""
        with self._lock:
            self._under_way += 1
            if self._under_way == 1:
                with suppress(TimedOut):  # another agent's wakes are as good as ours
                    self._held.enter_context(self._locks.hold(lock_names.URGENT_WAKES, deadline_s=0))
        try:
            yield
        finally:
            with self._lock:
                self._under_way -= 1
                if not self._under_way:
                    self._held.close()

    def given(self) -> None:
        """Return once no wake is under way, or after a while."""
        self._locks.wait_free(lock_names.URGENT_WAKES, deadline_s=_LET_PASS_S)
