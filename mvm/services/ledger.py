"""What is recorded and not on the host: told, and made again where that can be done while guests run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import structlog

from mvm.domain.findings import Missing
from mvm.domain.instance import Instance
from mvm.domain.lifecycle import Status
from mvm.errors import Failed, NotFound
from mvm.ports.network import HostNetwork
from mvm.ports.storage import NodeStorage
from mvm.ports.store import NodeStore
from mvm.ports.vmm import Snapshotting, VmmDriver

log = structlog.get_logger("mvm.sweeps")


class Ledger:
    """Compares the store with the host. A job may change both at once, so what is missing is looked at twice."""

    def __init__(self, *, store: NodeStore, network: HostNetwork, storage: NodeStorage, vmm: VmmDriver) -> None:
        self._store = store
        self._network = network
        self._storage = storage
        self._vmm = vmm

    def check(self) -> tuple[Sequence[Missing], Sequence[str]]:
        """What is missing, and what was made again."""
        made = list(self._reconnect())
        first = list(self._missing())
        return [each for each in self._missing() if each in first] if first else [], made

    def _reconnect(self) -> Iterator[str]:
        """Bridges are there, and the TAPs of guests that run are their ports."""
        bridges, taps = self._network.bridges(), self._network.taps()
        up = [i for i in self._store.instances() if i.has_vmm and i.in_flight is None]
        for tenant in self._store.tenants():
            network = tenant.network
            if network.bridge not in bridges and not self._network.has(network.bridge):
                self._network.ensure_bridge(network)
                yield f"bridge {network.bridge} was made again"
            for instance in up:
                tap = network.tap(instance.offset)
                if instance.ref.tenant == tenant.id and tap in taps and taps[tap] != network.bridge:
                    self._network.ensure_tap(network, instance.offset)
                    yield f"tap {tap} is a port of {network.bridge} again"

    def _missing(self) -> Iterator[Missing]:
        # The store is read before the host: what is being removed is still recorded then, and has a job.
        instances = [i for i in self._store.instances() if i.in_flight is None and i.status is not Status.CREATED]
        networks = {tenant.id: tenant.network for tenant in self._store.tenants()}
        taps, directories, revisions = self._network.taps(), self._storage.instances(), self._storage.revisions()
        for instance in instances:
            ref = str(instance.ref)
            if instance.ref not in directories:
                yield Missing("directory", f"directory of {ref}", ref, "its disks are lost; destroy it")
            elif instance.status is Status.SLEEPING:
                yield from self._of_sleeping(instance)
            elif instance.has_vmm and networks[instance.ref.tenant].tap(instance.offset) not in taps:
                tap = networks[instance.ref.tenant].tap(instance.offset)
                yield Missing("tap", f"tap {tap}", ref, "its guest is not well: it is replaced, or stop and start it")
        for pool in self._store.pools():
            if pool.revision is not None and pool.revision not in revisions:
                name = f"revision {pool.revision.short} of {pool.ref}"
                yield Missing("revision", name, None, f"build it again: mvm pool build {pool.ref}")

    def _of_sleeping(self, instance: Instance) -> Iterator[Missing]:
        if not isinstance(self._vmm, Snapshotting):
            return
        ref = instance.ref
        parts = [("snapshot", self._storage.snapshot(ref))]
        if instance.cloned and instance.revision is not None:
            parts.append(("template", self._storage.template(ref.pool_ref, instance.revision)))
        for kind, path in parts:
            try:
                self._vmm.manifest(path)
            except (NotFound, Failed) as error:
                then = f"what it held is lost ({error.code}): mvm instance start --force {ref}"
                yield Missing(kind, f"{kind} of {ref}", str(ref), then)
