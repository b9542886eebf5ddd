"""A node says that it lives, and reminds the registry of what it knows."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from mvm.domain.ids import NodeId
from mvm.errors import TimedOut
from mvm.ports.clock import Clock
from mvm.ports.locks import Locks
from mvm.ports.registry import NodeRecord, Registry
from mvm.ports.store import NodeStore
from mvm.services.membership import known_to_all, rebuilding_s, remind

_RESTORE_EVERY = 10


class Heartbeat:
    """One beat at a time; the worker calls it on a timer."""

    def __init__(
        self, *, store: NodeStore, registry: Registry, locks: Locks, clock: Clock, node_id: NodeId, address: str,
        facts: Mapping[str, Any],
    ) -> None:  # fmt: skip
        self._store = store
        self._registry = registry
        self._locks = locks
        self._clock = clock
        self._node_id = node_id
        self._address = address
        self._facts = facts
        self._beats = 0

    def beat(self) -> None:
        """Raises `Unreachable` when the registry does not answer; the next beat tries again."""
        lost = rebuilding_s(self._registry, self._store) > 0
        if lost or self._beats % _RESTORE_EVERY == 0:
            self._remind()
        self._registry.heartbeat(NodeRecord(self._node_id, self._address, self._clock.now(), self._facts))
        self._beats += 1

    def _remind(self) -> None:
        """An emptied registry is rebuilt from its nodes. While something is being destroyed the next beat does it."""
        with suppress(TimedOut), known_to_all(self._locks, deadline_s=0):
            remind(self._registry, self._store)
            return
        self._beats -= 1
