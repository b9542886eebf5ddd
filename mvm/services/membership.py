"""Who exists is known to the registry and to the node: both are told, or neither."""

from __future__ import annotations

from contextlib import AbstractContextManager

from mvm.domain import lock_names
from mvm.ports.locks import Locks

_LOCK_S = 60.0


def known_to_all(locks: Locks, *, deadline_s: float = _LOCK_S) -> AbstractContextManager[None]:
    """Within, whoever takes a tenant or a pool out of the registry and the store is not overtaken.

    The heartbeat reminds the registry of what it has read in the store: between the two, nothing may be destroyed, or
    the registry would know what nobody has. Raises `TimedOut` (``lock.busy``).
    """
    return locks.hold(lock_names.MEMBERSHIP, deadline_s=deadline_s)
