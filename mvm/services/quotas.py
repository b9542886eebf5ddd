"""What a tenant uses and whether more fits: checked inside the transaction that takes it."""

from __future__ import annotations

from collections.abc import Iterable

from mvm.domain.ids import TenantId
from mvm.domain.instance import Instance
from mvm.domain.lifecycle import Status
from mvm.domain.pool import WorkerPool
from mvm.domain.room import usage_of
from mvm.domain.tenant import Limit, Tenant, Usage, check_quota
from mvm.ports.store import NodeStore


def usage(store: NodeStore, tenant: TenantId) -> Usage:
    """What `tenant` holds; an instance on its way counts where it is and where it will land."""
    return usage_of({pool.ref: pool.resources for pool in store.pools(tenant)}, store.instances(tenant=tenant))


def admit_pool(store: NodeStore, tenant: Tenant, pool: WorkerPool) -> None:
    """Raises `QuotaExceeded` unless one more pool fits and one of its instances could ever run."""
    quota, shape = tenant.quota, pool.resources
    check_quota(
        tenant.id,
        (
            Limit("max_pools", len(store.pools(tenant.id)), 1, quota.max_pools),
            Limit("max_vcpus", 0, shape.vcpus, quota.max_vcpus),
            Limit("max_mem_mib", 0, shape.mem_mib, quota.max_mem_mib),
            Limit("max_disk_gib", 0, _gib(shape.data_disk_mib), quota.max_disk_gib),
        ),
    )


def admit_instances(store: NodeStore, tenant: Tenant, pool: WorkerPool, count: int) -> None:
    """Raises `QuotaExceeded` unless `count` more instances fit into `pool` and their disks into the tenant."""
    used = usage(store, tenant.id)
    disk = used.disk_mib + count * pool.resources.data_disk_mib
    check_quota(
        tenant.id,
        (
            Limit(
                "max_instances_per_pool",
                len(store.instances(pool=pool.ref)),
                count,
                tenant.quota.max_instances_per_pool,
            ),
            Limit("max_disk_gib", _gib(used.disk_mib), _gib(disk) - _gib(used.disk_mib), tenant.quota.max_disk_gib),
        ),
    )


def admit_running(store: NodeStore, tenant: Tenant, pool: WorkerPool, *, from_memory: bool = False) -> None:
    """Raises `QuotaExceeded` unless one more instance of `pool` may run; a warm one has its memory."""
    used, quota, shape = usage(store, tenant.id), tenant.quota, pool.resources
    more = 0 if from_memory else 1
    check_quota(
        tenant.id,
        (
            Limit("max_running", used.running, 1, quota.max_running),
            Limit("max_vcpus", used.vcpus, more * shape.vcpus, quota.max_vcpus),
            Limit("max_mem_mib", used.mem_mib, more * shape.mem_mib, quota.max_mem_mib),
        ),
    )


def admit_warm(store: NodeStore, tenant: Tenant) -> None:
    """Raises `QuotaExceeded` unless one more instance may be warm."""
    check_quota(tenant.id, (Limit("max_warm", usage(store, tenant.id).warm, 1, tenant.quota.max_warm),))


def admit_counts(tenant: Tenant, pool: WorkerPool, others: Iterable[Instance]) -> None:
    """Raises `QuotaExceeded` unless the pool's desired counts fit beside what runs in other pools."""
    if pool.desired is None:
        return
    elsewhere = sum(i.lands_on is Status.RUNNING for i in others)
    counts, quota, shape = pool.desired, tenant.quota, pool.resources
    in_memory = counts.running + (counts.warm or 0)
    check_quota(
        tenant.id,
        (
            Limit("max_instances_per_pool", 0, counts.total, quota.max_instances_per_pool),
            Limit("max_running", elsewhere, counts.running, quota.max_running),
            Limit("max_warm", 0, counts.warm or 0, quota.max_warm),
            Limit("max_vcpus", 0, in_memory * shape.vcpus, quota.max_vcpus),
            Limit("max_mem_mib", 0, in_memory * shape.mem_mib, quota.max_mem_mib),
            Limit("max_disk_gib", 0, _gib(counts.total * shape.data_disk_mib), quota.max_disk_gib),
        ),
    )


def _gib(mib: int) -> int:
    return -(-mib // 1024)
