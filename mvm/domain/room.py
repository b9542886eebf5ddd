"""What a tenant holds, and what it may still take. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from mvm.domain.addressing import TenantNetwork
from mvm.domain.ids import PoolRef
from mvm.domain.instance import Instance
from mvm.domain.lifecycle import Status
from mvm.domain.pool import InstanceResources
from mvm.domain.remarks import Cause
from mvm.domain.tenant import Quota, Usage


def usage_of(shapes: Mapping[PoolRef, InstanceResources], instances: Collection[Instance]) -> Usage:
    """What a tenant's `instances` hold in its pools of these shapes.

    One with a job counts where it is and where it will land: a limit holds at every moment between.
    """
    vcpus = mem_mib = running = warm = disk_mib = 0
    for instance in instances:
        shape, places = shapes[instance.ref.pool_ref], (instance.status, instance.lands_on)
        if any(place.has_vmm for place in places):
            vcpus += shape.vcpus
            mem_mib += shape.mem_mib
        running += Status.RUNNING in places
        warm += Status.WARM in places
        disk_mib += shape.data_disk_mib
    return Usage(vcpus, mem_mib, running, warm, len(shapes), len(instances), disk_mib)


class Lack(NamedTuple):
    """What there is not enough of: which of a quota's limits, if it is that."""

    cause: Cause
    limit: str | None = None


_NOTHING = Lack(Cause.QUOTA)  # before anything was refused


@dataclass(slots=True)
class Room:
    """What is left of a tenant's quota and subnet, counted down while a plan is made.

    No instance has room that needs more memory than the host has (`host_mib`; None: not known). `lack` is what the
    last refusal was for.
    """

    running: int
    warm: int
    vcpus: int
    mem_mib: int
    disk_mib: int
    addresses: int
    pools: int
    instances: dict[PoolRef, int]
    per_pool: int
    quota: Quota
    host_mib: int | None = None
    lack: Lack = _NOTHING

    @classmethod
    def of(
        cls, quota: Quota, network: TenantNetwork, shapes: Mapping[PoolRef, InstanceResources],
        instances: Collection[Instance], *, host_mib: int | None = None,
    ) -> Room:  # fmt: skip
        """The room beside what there is."""
        used = usage_of(shapes, instances)
        return cls(
            running=quota.max_running - used.running,
            warm=quota.max_warm - used.warm,
            vcpus=quota.max_vcpus - used.vcpus,
            mem_mib=quota.max_mem_mib - used.mem_mib,
            disk_mib=quota.max_disk_gib * 1024 - used.disk_mib,
            addresses=len(network.offsets) - used.instances,
            pools=quota.max_pools - used.pools,
            instances=_counts(instances),
            per_pool=quota.max_instances_per_pool,
            quota=quota,
            host_mib=host_mib,
        )

    def run(self, shape: InstanceResources, *, from_memory: bool = False) -> bool:
        """Take what one more running instance needs, if it is there. One that was warm has its memory."""
        vcpus, mem_mib = (0, 0) if from_memory else (shape.vcpus, shape.mem_mib)
        if not (self._fits_host(mem_mib) and self._has(running=1, vcpus=vcpus, mem_mib=mem_mib)):
            return False

        self.running -= 1
        self.vcpus -= vcpus
        self.mem_mib -= mem_mib
        return True

    def pause(self) -> bool:
        """Take the place of one more warm instance."""
        if not self._has(warm=1):
            return False

        self.warm -= 1
        return True

    def add(self, pool: PoolRef, shape: InstanceResources) -> bool:
        """Take what one more instance of `pool` that runs needs."""
        held = self.instances.get(pool, 0)
        if held >= self.per_pool:
            return self._refuse(Lack(Cause.QUOTA, "max_instances_per_pool"))
        if self.addresses < 1:
            return self._refuse(Lack(Cause.SUBNET))
        if not (self._has(disk_mib=shape.data_disk_mib) and self.run(shape)):
            return False

        self.instances[pool] = held + 1
        self.addresses -= 1
        self.disk_mib -= shape.data_disk_mib
        return True

    def add_pool(self) -> bool:
        """Take the place of one more pool."""
        if not self._has(pools=1):
            return False

        self.pools -= 1
        return True

    def too_large(self, shape: InstanceResources) -> str | None:
        """The limit that one instance of this shape would pass all by itself."""
        needs = {
            "max_vcpus": shape.vcpus,
            "max_mem_mib": shape.mem_mib,
            "max_disk_gib": -(-shape.data_disk_mib // 1024),
        }
        return next((limit for limit, need in needs.items() if need > getattr(self.quota, limit)), None)

    def _fits_host(self, mem_mib: int) -> bool:
        fits = self.host_mib is None or mem_mib <= self.host_mib
        return fits or self._refuse(Lack(Cause.HOST))

    def _has(self, **wanted: int) -> bool:
        for name, count in wanted.items():
            if getattr(self, name) < count:
                return self._refuse(Lack(Cause.QUOTA, _LIMITS[name]))
        return True

    def _refuse(self, lack: Lack) -> bool:
        self.lack = lack
        return False


_LIMITS = {
    "running": "max_running",
    "warm": "max_warm",
    "vcpus": "max_vcpus",
    "mem_mib": "max_mem_mib",
    "disk_mib": "max_disk_gib",
    "pools": "max_pools",
}


def _counts(instances: Iterable[Instance]) -> dict[PoolRef, int]:
    return dict(Counter(instance.ref.pool_ref for instance in instances))
