"""Who asks at the metadata address, told by where the question came from and by nothing else."""

from __future__ import annotations

from ipaddress import IPv4Address

from mvm.domain import metadata
from mvm.domain.metadata import Self
from mvm.ports.store import NodeStore


class Metadata:
    """Reads the node's store; an answer is never older than the question."""

    def __init__(self, store: NodeStore, ssh_key: str) -> None:
        self._store = store
        self._ssh_key = ssh_key

    def asker(self, bridge: str, address: IPv4Address) -> Self | None:
        """The guest that has `address` behind `bridge`; None when there is none, or its pool has no metadata."""
        for tenant in self._store.tenants():
            network = tenant.network
            if network.bridge != bridge or address not in network.subnet:
                continue
            offset = int(address) - int(network.subnet.network_address)
            for instance in self._store.instances(tenant=tenant.id):
                if instance.offset == offset:
                    pool = self._store.pool(instance.ref.pool_ref)
                    return metadata.of(network, pool, instance, self._ssh_key) if pool.metadata_enabled else None
        return None
