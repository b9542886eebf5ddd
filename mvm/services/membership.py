"""Who exists is known to the registry and to the node: both are told, or neither."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager

from mvm.domain import lock_names
from mvm.errors import Unreachable
from mvm.ports.locks import Locks
from mvm.ports.registry import Registry
from mvm.ports.store import NodeStore

_LOCK_S = 60.0
_REBUILD_S = 15.0  # the heartbeats of every node that lives have noticed it by then


def known_to_all(locks: Locks, *, deadline_s: float = _LOCK_S) -> AbstractContextManager[None]:
    """Within, whoever takes a tenant or a pool out of the registry and the store is not overtaken.

    The heartbeat reminds the registry of what it has read in the store: between the two, nothing may be destroyed, or
    the registry would know what nobody has. Raises `TimedOut` (``lock.busy``).
    """
    return locks.hold(lock_names.MEMBERSHIP, deadline_s=deadline_s)


def rebuilding_s(registry: Registry, store: NodeStore) -> float:
    """`Registry.rebuilding_s`, as this node's store sees it: 0 as long as the registry has not lost its data."""
    used = bool(store.given_net_ids() or store.tenants())
    return registry.rebuilding_s(used=used, within_s=_REBUILD_S)


def check_whole(registry: Registry, store: NodeStore) -> None:
    """For whoever asks the registry what other nodes have. Raises `Unreachable` (``registry.rebuilding``)."""
    left_s = rebuilding_s(registry, store)
    if left_s:
        raise Unreachable(
            "registry.rebuilding", "the registry has lost its data, and the nodes are putting back what they know",
            hint=f"try again in {math.ceil(left_s)} s", field="registry", left_s=math.ceil(left_s),
        )  # fmt: skip


def remind(registry: Registry, store: NodeStore, net_ids: frozenset[int] = frozenset()) -> None:
    """The registry knows again what this node's store knows, and that `net_ids` are given, for whoever holds the lock.

    Whoever is about to choose among what is free does so first: a registry that was emptied says that all is.
    """
    pools = {pool.ref: pool.node_id for pool in store.pools()}
    registry.restore(store.tenants(), pools, store.given_net_ids() | net_ids)
