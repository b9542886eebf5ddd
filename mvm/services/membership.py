"""Who exists is known to the registry and to the node: both are told, or neither."""

from __future__ import annotations

from contextlib import AbstractContextManager

from mvm.domain import lock_names
from mvm.ports.locks import Locks
from mvm.ports.registry import Registry
from mvm.ports.store import NodeStore

_LOCK_S = 60.0


def known_to_all(locks: Locks, *, deadline_s: float = _LOCK_S) -> AbstractContextManager[None]:
    """Within, whoever takes a tenant or a pool out of the registry and the store is not overtaken.

    The heartbeat reminds the registry of what it has read in the store: between the two, nothing may be destroyed, or
    the registry would know what nobody has. Raises `TimedOut` (``lock.busy``).
    """
    return locks.hold(lock_names.MEMBERSHIP, deadline_s=deadline_s)


def remind(registry: Registry, store: NodeStore, net_ids: frozenset[int] = frozenset()) -> None:
    """The registry knows again what this node's store knows, and that `net_ids` are given, for whoever holds the lock.

    Whoever is about to choose among what is free does so first: a registry that was emptied says that all is.
    """
    pools = {pool.ref: pool.node_id for pool in store.pools()}
    registry.restore(store.tenants(), pools, store.given_net_ids() | net_ids)
