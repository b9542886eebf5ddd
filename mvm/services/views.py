"""What a node shows of itself: the command line's JSON fields, read from the store."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mvm.domain.addressing import TenantNetwork
from mvm.domain.commands import ExecPart
from mvm.domain.ids import InstanceRef, NodeId, PoolRef, TenantId
from mvm.domain.instance import Instance
from mvm.domain.job import Job
from mvm.domain.lifecycle import Status
from mvm.domain.plans import Plan
from mvm.domain.pool import DesiredCounts, WorkerPool
from mvm.domain.tenant import Tenant
from mvm.errors import NotAllowed
from mvm.ports.clock import Clock
from mvm.ports.guest import GuestChannel
from mvm.ports.storage import NodeStorage
from mvm.ports.store import NodeStore
from mvm.ports.vmm import VmmDriver
from mvm.services.audit import Audit
from mvm.services.insight import Insight
from mvm.services.network_check import NetworkCheck
from mvm.services.quotas import usage
from mvm.services.secrets import TenantSecrets
from mvm.services.urgent import UrgentWake

if TYPE_CHECKING:  # it leads back here
    from mvm.services.desired_states import DesiredStates
    from mvm.services.disk import Disk

_FOLLOW_S = 0.2


def instance_view(network: TenantNetwork, instance: Instance) -> dict[str, Any]:
    """An instance's fields."""
    return {
        "ref": str(instance.ref),
        "status": instance.status.value,
        "node_id": str(instance.node_id),
        "revision": instance.revision,
        "guest_ip": str(network.ip(instance.offset)),
        "mac": network.mac(instance.offset),
        "tap": network.tap(instance.offset),
        "pid": instance.process.pid if instance.process else None,
        "job": (
            {"job_id": str(instance.in_flight.job_id), "verb": instance.in_flight.verb.value}
            if instance.in_flight
            else None
        ),
        "last_error": instance.last_error,
        "ended": instance.ended.value if instance.ended else None,
        "stalled": instance.stalled.value if instance.stalled else None,
        "created_at": instance.created_at.isoformat(),
        "last_started_at": instance.last_started_at.isoformat() if instance.last_started_at else None,
        "last_stopped_at": instance.last_stopped_at.isoformat() if instance.last_stopped_at else None,
    }


def pool_view(store: NodeStore, pool: WorkerPool) -> dict[str, Any]:
    """A pool's fields; a pool that was never scaled shows zeros."""
    counts = Counter(i.status.value for i in store.instances(pool=pool.ref))
    return {
        "ref": str(pool.ref),
        "flake_ref": pool.source.flake_ref,
        "profile": pool.source.profile,
        "resources": asdict(pool.resources),
        "start": pool.start.value,
        "compression": pool.compression.value,
        "seccomp_policy": pool.seccomp_policy.value,
        "sleep_policy": asdict(pool.sleep_policy),
        "pinned": pool.pinned,
        "critical": pool.critical,
        "on_exit": pool.on_exit.value,
        "egress": pool.egress.to_dict(),
        "metadata_enabled": pool.metadata_enabled,
        "user_data_bytes": len(pool.user_data.encode()),
        "desired": asdict(pool.desired or DesiredCounts()),
        "counts": dict(sorted(counts.items())),
        "revision": pool.revision,
        "node_id": str(pool.node_id),
        "created_at": pool.created_at.isoformat(),
    }


def tenant_view(store: NodeStore, tenant: Tenant) -> dict[str, Any]:
    """A tenant's fields."""
    return {
        "tenant_id": str(tenant.id),
        "net_id": tenant.network.net_id,
        "subnet": str(tenant.network.subnet),
        "gateway": str(tenant.network.gateway),
        "bridge": tenant.network.bridge,
        "quota": tenant.quota.to_dict(),
        "usage": asdict(usage(store, tenant.id)),
        "secrets_epoch": tenant.secrets_epoch,
        "created_at": tenant.created_at.isoformat(),
    }


class NodeView:
    """The node as its agent shows it."""

    def __init__(
        self, *, store: NodeStore, storage: NodeStorage, guest: GuestChannel, vmm: VmmDriver, clock: Clock,
        node_id: NodeId, address: str, urgent: UrgentWake, insight: Insight, secrets: TenantSecrets, audit: Audit,
        network_check: NetworkCheck, desired: DesiredStates, disk: Disk,
    ) -> None:  # fmt: skip
        self._store = store
        self._storage = storage
        self._guest = guest
        self._clock = clock
        self._node_id = node_id
        self._address = address
        self._vmm = vmm
        self._urgent = urgent
        self._insight = insight
        self._network_check = network_check
        self._secrets = secrets
        self._audit = audit
        self._desired = desired
        self._disk = disk

    def node_info(self) -> dict[str, Any]:
        """The node's fields."""
        counts = Counter(i.status.value for i in self._store.instances())
        return {
            "node_id": str(self._node_id),
            "address": self._address,
            "status": "ready",
            "driver": self._vmm.name,
            "vcpus": os.cpu_count() or 1,
            "mem_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20,
            "instances": dict(sorted(counts.items())),
            "last_seen_at": self._clock.now().isoformat(),
        }

    def node_stats(self) -> dict[str, Any]:
        """Counts, and what the instances take of the host and spare it."""
        tenants = self._store.tenants()
        used = [usage(self._store, tenant.id) for tenant in tenants]
        info = self.node_info()
        return {
            "node_id": info["node_id"],
            "tenants": len(tenants),
            "pools": len(self._store.pools()),
            "instances": info["instances"],
            **self._insight.memory(),
            "vcpus": {"host": info["vcpus"], "in_use": sum(u.vcpus for u in used)},
            "mem_mib": {"host": info["mem_mib"], "in_use": sum(u.mem_mib for u in used)},
            "disk": self._disk.space(),
            "data_disk_mib": sum(u.disk_mib for u in used),
            "jobs_running": len(self._store.unfinished_jobs()),
            "load": list(os.getloadavg()),
        }

    def verify_network(self, *, active: bool, check: Callable[[], None] = lambda: None) -> Mapping[str, Any]:
        """The tenants' networks as they are against as they should be; with `active` proven with traffic."""
        return self._network_check.verify(active=active, check=check)

    def disk_report(self) -> Mapping[str, Any]:
        """What lies on the disk and whose, and the space that is left."""
        return self._disk.report()

    def tenants(self) -> list[dict[str, Any]]:
        """All tenants."""
        return [tenant_view(self._store, tenant) for tenant in self._store.tenants()]

    def pools(self, tenant: TenantId | None) -> list[dict[str, Any]]:
        """All pools, or one tenant's; an unknown tenant is an error, not an empty list.

        Those of one tenant with what keeps each from its counts (``obstacles``).
        """
        rows = [pool_view(self._store, pool) for pool in self._store.pools(tenant)]
        if tenant is None:
            return rows
        self._store.tenant(tenant)
        obstacles = self._insight.obstacles(tenant)
        return [{**row, "obstacles": obstacles.get(row["ref"], [])} for row in rows]

    def instances(self, tenant: TenantId | None, pool: PoolRef | None, status: Status | None) -> list[dict[str, Any]]:
        """Instances, filtered; an unknown tenant or pool is an error, not an empty list.

        With why its guest is not well (``unwell``), None of one that is, or that does not run.
        """
        if tenant is not None:
            self._store.tenant(tenant)
        if pool is not None:
            self._store.pool(pool)
        found = self._store.instances(tenant=tenant, pool=pool)
        networks = {t.id: t.network for t in self._store.tenants()}
        wanted = [i for i in found if status in (None, i.status)]
        unwell = self._insight.unwell(wanted)
        return [{**instance_view(networks[i.ref.tenant], i), "unwell": unwell.get(i.ref)} for i in wanted]

    def instance(self, ref: InstanceRef) -> dict[str, Any]:
        """One instance."""
        instance = self._store.instance(ref)
        unwell = self._insight.unwell([instance]).get(ref)
        return {**instance_view(self._store.tenant(ref.tenant).network, instance), "unwell": unwell}

    def explain(self, ref: InstanceRef) -> dict[str, Any]:
        """Why an instance is as it is, and what comes next."""
        return self._insight.explain(ref)

    def stats(self, ref: InstanceRef) -> dict[str, Any]:
        """What an instance takes: memory, snapshot, and how long its sleeping and waking took."""
        return self._insight.stats(ref)

    def set_secrets(self, tenant: TenantId, content: bytes, actor: str) -> Mapping[str, Any]:
        """Keep the secrets in a secrets file; which epoch they are."""
        return self._secrets.set(tenant, content, actor)

    def wake(self, ref: InstanceRef, actor: str) -> Mapping[str, Any]:
        """Wake an instance now, past every queue."""
        return self._urgent.wake(ref, actor)

    def audit_tail(
        self, tenant: TenantId, count: int, *, follow: bool
    ) -> Generator[Sequence[Mapping[str, Any]], None, None]:
        """A tenant's last audit entries; with `follow` also what comes."""
        return self._audit.tail(tenant, count, follow=follow)

    def audit_verify(self, tenant: TenantId, *, check: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """Whether a tenant's audit trail is whole."""
        return self._audit.verify(tenant, check)

    def desired_plan(self, content: bytes, *, prune: bool) -> Plan:
        """What a desired-state document would do here."""
        return self._desired.plan(content, prune=prune)

    def desired_apply(self, content: bytes, *, prune: bool, expect: str | None, actor: str) -> tuple[Plan, Job]:
        """Accept a desired-state document and begin with it."""
        return self._desired.apply(content, prune=prune, expect=expect, actor=actor)

    def run(self, ref: InstanceRef, command: bytes, *, deadline_s: float) -> Generator[ExecPart, None, None]:
        """Run a command in a running guest; see `GuestChannel.run`."""
        instance = self._store.instance(ref)
        if instance.status is not Status.RUNNING:
            raise NotAllowed("instance.not_running", f"{ref} is {instance.status}", hint=f"mvm instance start {ref}",
                             subject=str(ref), status=instance.status.value)  # fmt: skip
        return self._guest.run(ref, self._storage.directory(ref), command, deadline_s=deadline_s)

    def logs(self, ref: InstanceRef, *, follow: bool) -> Generator[str, None, None]:
        """The guest's console; with `follow` also what comes, and an empty text when for a while nothing does."""
        directory, offset, pause = self._storage.directory(self._store.instance(ref).ref), 0, threading.Event()
        while True:
            text, offset = self._vmm.console(directory, offset=offset)
            if text or follow:
                yield text
            if not text:
                if not follow:
                    return
                pause.wait(_FOLLOW_S)
