"""Settings to services: the only place that knows concrete drivers. Imports are lazy, a command pays for its own."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from mvm.domain.ids import InstanceRef, NodeId
from mvm.domain.job import JobVerb
from mvm.domain.layout import StateLayout
from mvm.errors import NotFound

if TYPE_CHECKING:
    from mvm.drivers.backup.taking import Taking
    from mvm.ports.agents import NodeAgents
    from mvm.ports.audit import AuditLog
    from mvm.ports.cgroup import Cgroups
    from mvm.ports.clock import Clock
    from mvm.ports.firewall import PacketFilter
    from mvm.ports.guest import GuestChannel
    from mvm.ports.host import HostMemory
    from mvm.ports.images import ImageBuilder
    from mvm.ports.locks import Locks
    from mvm.ports.network import HostNetwork
    from mvm.ports.probing import Probing
    from mvm.ports.queue import JobQueue
    from mvm.ports.registry import Registry
    from mvm.ports.secrets import SecretStore
    from mvm.ports.storage import NodeStorage
    from mvm.ports.store import NodeStore
    from mvm.ports.vmm import VmmDriver
    from mvm.services.heartbeat import Heartbeat
    from mvm.services.jobs import Jobs
    from mvm.services.metadata import Metadata
    from mvm.services.networks import Networks
    from mvm.services.runner import Observer, Runner, Workers
    from mvm.services.urgent import UrgentWake
    from mvm.services.views import NodeView
    from mvm.settings import Settings


@dataclass(frozen=True)
class Client:
    """What a command line needs of a running stack; each part is connected on first use."""

    connection: Mapping[str, str]
    layout: StateLayout

    @property
    def node_id(self) -> NodeId:
        """The node this machine is."""
        return NodeId(self.connection["node_id"])

    @cached_property
    def registry(self) -> Registry:
        """The cluster's registry."""
        from mvm.drivers.redis_registry import RedisRegistry
        from mvm.drivers.registry_migrations import registry_link

        return RedisRegistry(registry_link(self.connection["redis_url"]))

    @cached_property
    def jobs(self) -> Jobs:
        """Submitting and following jobs."""
        from mvm.drivers.celery_queue import CeleryQueue
        from mvm.drivers.clock import SystemClock
        from mvm.drivers.redis_link import RedisLink
        from mvm.services.jobs import Jobs

        link = RedisLink(self.connection["broker_url"], code="broker.unreachable")
        expires_s = float(self.connection.get("job_expires_s", 86400.0))
        return Jobs(self.registry, CeleryQueue(link), SystemClock(), expires_s=expires_s)

    @cached_property
    def agents(self) -> NodeAgents:
        """The nodes' agents, reached from inside the stack's network namespace."""
        from mvm.drivers.netns import path_of, socket_in
        from mvm.drivers.quic.client import QuicAgents
        from mvm.drivers.quic.known_nodes import KnownNodes

        netns = self.connection.get("netns")
        make: Callable[[], socket.socket] = lambda: socket_in(  # noqa: E731
            path_of(netns) if netns else None, socket.AF_INET, socket.SOCK_DGRAM
        )
        own = {self.connection["agent_address"]: self.node_id} if "agent_address" in self.connection else {}
        return QuicAgents(self.layout.certs, make, known=KnownNodes(self.layout.known_nodes, own))


def open_client(connection: Mapping[str, str], layout: StateLayout) -> Client:
    """A client of the stack that `connection` (as written by ``mvm up``) describes."""
    return Client(connection, layout)


def open_jobs(settings: Settings) -> Jobs:
    """Submitting jobs, for a process that has no node of its own."""
    connection = {
        "node_id": settings.node, "redis_url": settings.redis, "broker_url": settings.broker,
        "job_expires_s": str(settings.job_expires_s),
    }  # fmt: skip
    return Client(connection, settings.layout).jobs


@dataclass(frozen=True)
class NodePorts:
    """The outside of a node, whatever drives it."""

    store: NodeStore
    registry: Registry
    queue: JobQueue
    locks: Locks
    clock: Clock
    vmm: VmmDriver
    guest: GuestChannel
    network: HostNetwork
    packets: PacketFilter
    probing: Probing | None
    storage: NodeStorage
    images: ImageBuilder
    memory: HostMemory
    audit: AuditLog
    cgroups: Cgroups
    secrets: SecretStore


@dataclass(frozen=True)
class NodeServices:
    """A node's services, ready to run jobs."""

    runner: Runner
    jobs: Jobs
    registry: Registry
    store: NodeStore
    heartbeat: Heartbeat
    urgent: UrgentWake
    view: NodeView
    networks: Networks


def open_node(settings: Settings) -> NodeServices:
    """The services of this node, over the drivers that `settings` names."""
    from mvm.telemetry.metrics import observe_job

    ports = open_ports(settings)
    return build_node(
        ports, settings, authorized_key=_authorized_key(settings), observers=(observe_job,), workers=_workers()
    )


def _workers() -> Workers:
    from mvm.drivers import processes
    from mvm.services.runner import Workers

    return Workers(processes.name_of(os.getpid()), processes.goes_on)


def open_metadata(settings: Settings) -> Metadata:
    """Who asks at the metadata address. It knows the node's store and nothing else."""
    from mvm.drivers.sqlite_store import SqliteStore
    from mvm.services.metadata import Metadata

    return Metadata(SqliteStore(settings.layout.database), _authorized_key(settings))


def _authorized_key(settings: Settings) -> str:
    key = Path(f"{settings.layout.ssh_key}.pub")
    return key.read_text().strip() if key.exists() else ""


def open_ports(settings: Settings) -> NodePorts:
    """The drivers that `settings` names."""
    from mvm.drivers.audit_log import FileAuditLog
    from mvm.drivers.celery_queue import CeleryQueue
    from mvm.drivers.clock import SystemClock
    from mvm.drivers.identity import check_node, mark
    from mvm.drivers.locks import FileLocks
    from mvm.drivers.redis_link import RedisLink
    from mvm.drivers.redis_registry import RedisRegistry
    from mvm.drivers.registry_migrations import registry_link
    from mvm.drivers.secret_files import SecretFiles
    from mvm.drivers.sqlite_store import SqliteStore

    check_node(settings)
    layout = settings.layout
    store = SqliteStore(layout.database)
    registry = RedisRegistry(registry_link(settings.redis))
    queue = CeleryQueue(RedisLink(settings.broker, code="broker.unreachable"))
    locks = FileLocks(layout.locks, takeover_s=settings.takeover_s)
    audit = FileAuditLog(layout.audit, locks)
    if settings.driver == "fake":
        from mvm.drivers.fake.shared import SharedFakeHost

        host = SharedFakeHost(SystemClock(), layout.root / "fake-host")
        return NodePorts(
            store, registry, queue, locks, host.clock, host.vmm, host.guest, host.network,
            host.packets, None, host.storage, host.images, host.memory, audit, host.cgroups, SecretFiles(layout),
        )  # fmt: skip
    from mvm.drivers.cgroups import LinuxCgroups
    from mvm.drivers.file_storage import FileStorage
    from mvm.drivers.guest_channel import UnixGuestChannel
    from mvm.drivers.host_memory import ProcMemory
    from mvm.drivers.images_builtin import BuiltinImages
    from mvm.drivers.linux_network import LinuxNetwork
    from mvm.drivers.netns import of_parent
    from mvm.drivers.nftables import Nftables
    from mvm.drivers.qemu.driver import QemuDriver
    from mvm.drivers.shell import LocalShell
    from mvm.drivers.veth_probes import VethProbes

    shell, cgroups = LocalShell(), LinuxCgroups(mark(layout))
    return NodePorts(
        store,
        registry,
        queue,
        locks,
        SystemClock(),
        QemuDriver(layout, shell, cgroups, require_isolation=settings.require_isolation, uid_of=_uid_of(store)),
        UnixGuestChannel(),
        LinuxNetwork(shell),
        Nftables(shell, layout.uplink_mark),
        VethProbes(shell),
        FileStorage(layout, shell),
        BuiltinImages(layout, shell, LocalShell(of_parent())),
        ProcMemory(),
        audit,
        cgroups,
        SecretFiles(layout),
    )


def open_backup(settings: Settings) -> Taking:
    """Taking backups of this node, beside its stack or without."""
    from mvm.drivers.backup.taking import Taking

    ports = open_ports(settings)
    shared = bool(settings.redis_url or settings.broker_url)
    return Taking(settings.layout, settings.node, ports.store, ports.locks, ports.vmm, ports.clock, shared)


def _uid_of(store: NodeStore) -> Callable[[InstanceRef], int | None]:
    """Whose user the VMM of an instance runs as; that never changes, so who was found is not looked up again."""
    known: dict[InstanceRef, int] = {}

    def uid_of(ref: InstanceRef) -> int | None:
        if ref not in known:
            try:
                known[ref] = store.tenant(ref.tenant).network.uid(store.instance(ref).offset)
            except NotFound:
                return None
        return known[ref]

    return uid_of


def build_node(
    ports: NodePorts,
    settings: Settings,
    *,
    authorized_key: str,
    observers: tuple[Observer, ...] = (),
    workers: Workers | None = None,
) -> NodeServices:
    """Services over `ports`: the same for real and fake ones."""
    from mvm.domain.disk import Watermarks
    from mvm.services.audit import Audit
    from mvm.services.desired_states import DesiredStates
    from mvm.services.disk import Disk
    from mvm.services.disk_room import DiskRoom
    from mvm.services.health import GuestHealth
    from mvm.services.heartbeat import Heartbeat
    from mvm.services.idle import Idleness
    from mvm.services.insight import Insight
    from mvm.services.jobs import Jobs
    from mvm.services.lifecycle import Lifecycle
    from mvm.services.microvm import Limits, MicroVms
    from mvm.services.network_check import NetworkCheck
    from mvm.services.network_proof import NetworkProof
    from mvm.services.networks import Networks
    from mvm.services.orphans import Orphans
    from mvm.services.pools import Pools
    from mvm.services.precedence import Precedence
    from mvm.services.reconcile import Reconcile
    from mvm.services.recovery import Recovery
    from mvm.services.runner import Handler, Runner
    from mvm.services.secrets import TenantSecrets
    from mvm.services.snapshots import Snapshots
    from mvm.services.stalls import Stalls
    from mvm.services.sweeps import StalePids, alone
    from mvm.services.tenants import Tenants
    from mvm.services.urgent import UrgentWake
    from mvm.services.views import NodeView

    p, node = ports, settings.node
    address = f"{settings.agent_host}:{settings.agent_port}"
    jobs = Jobs(p.registry, p.queue, p.clock, expires_s=settings.job_expires_s, cap_s=settings.retry_cap_s)
    precedence = Precedence(p.locks)
    audit = Audit(p.store, p.audit, p.clock, precedence, node)
    runner = Runner(p.store, p.registry, p.locks, p.clock, jobs, precedence, audit, settings.tries, observers, workers)
    marks = Watermarks(low=settings.disk_low_mib << 20, reserve=settings.disk_reserve_mib << 20)
    room = DiskRoom(p.store, p.storage, p.vmm, marks)
    health = GuestHealth(
        store=p.store, clock=p.clock, vmm=p.vmm, guest=p.guest, network=p.network, storage=p.storage,
        limit=settings.health_checks, answer_s=settings.health_answer_s,
    )  # fmt: skip
    snapshots = Snapshots(
        locks=p.locks, clock=p.clock, vmm=p.vmm, guest=p.guest, storage=p.storage, room=room, health=health,
        boot_deadline_s=settings.boot_deadline_s, sleep_deadline_s=settings.sleep_deadline_s,
    )  # fmt: skip
    networks = Networks(p.store, p.locks, p.network, p.packets, settings.plan)
    secrets = TenantSecrets(
        store=p.store, secrets=p.secrets, locks=p.locks, clock=p.clock, vmm=p.vmm, guest=p.guest, storage=p.storage,
        audit=audit,
    )  # fmt: skip
    microvms = MicroVms(
        store=p.store, clock=p.clock, vmm=p.vmm, guest=p.guest, networks=networks, storage=p.storage,
        snapshots=snapshots, secrets=secrets, cgroups=p.cgroups,
        limits=Limits(settings.parallel_boots, settings.boot_deadline_s, settings.stop_grace_s),
        authorized_key=authorized_key,
    )  # fmt: skip
    lifecycle = Lifecycle(p.store, p.locks, p.clock, microvms, audit, manual_hold_s=settings.manual_hold_s)
    reconcile = Reconcile(
        store=p.store, registry=p.registry, jobs=jobs, lifecycle=lifecycle, locks=p.locks, clock=p.clock, node_id=node,
        health=health, room=room, memory=p.memory, uplink=bool(settings.plan.uplink),
        period_s=settings.reconcile_sweep_s,
    )  # fmt: skip
    shared = bool(settings.redis_url)
    tenants = Tenants(p.store, p.registry, p.locks, networks, secrets, shared=shared)
    pools = Pools(p.store, p.registry, p.images, p.storage, p.locks, reconcile, networks, room, shared=shared)
    disk = Disk(
        store=p.store, storage=p.storage, locks=p.locks, room=room, node_id=node, keep=settings.keep_revisions
    )  # fmt: skip
    recovery = Recovery(p.store, p.locks, p.vmm, microvms, audit)
    stale_pids = StalePids(
        store=p.store, registry=p.registry, vmm=p.vmm, storage=p.storage, lifecycle=lifecycle, secrets=secrets,
        audit=audit, node_id=node, keep_jobs=settings.keep_jobs, cgroups=p.cgroups, recovery=recovery,
    )  # fmt: skip
    orphans = Orphans(
        store=p.store, jobs=jobs, locks=p.locks, clock=p.clock, vmm=p.vmm, network=p.network, networks=networks,
        storage=p.storage, node_id=node, grace_s=settings.orphan_grace_s, cgroups=p.cgroups, tenants=tenants,
    )  # fmt: skip
    idleness = Idleness(
        store=p.store, registry=p.registry, jobs=jobs, clock=p.clock, vmm=p.vmm, guest=p.guest, storage=p.storage,
        memory=p.memory, room=room, node_id=node, reserve_percent=settings.memory_reserve_percent,
        period_s=settings.idleness_sweep_s,
    )  # fmt: skip
    undoes = {
        JobVerb.TENANT_CREATE: tenants.undo_create,
        JobVerb.POOL_CREATE: pools.undo_create,
        JobVerb.INSTANCE_CREATE: lifecycle.undo_create,
    }
    stalls = Stalls(p.vmm, p.storage, lifecycle)
    handlers: dict[JobVerb, Handler] = {
        JobVerb.TENANT_CREATE: tenants.create,
        JobVerb.TENANT_UPDATE: tenants.update,
        JobVerb.TENANT_DESTROY: tenants.destroy,
        JobVerb.TENANT_SECRETS: secrets.deliver,
        JobVerb.POOL_CREATE: pools.create,
        JobVerb.POOL_UPDATE: pools.update,
        JobVerb.POOL_BUILD: pools.build,
        JobVerb.POOL_SCALE: pools.scale,
        JobVerb.POOL_DESTROY: pools.destroy,
        JobVerb.INSTANCE_CREATE: lifecycle.create,
        JobVerb.INSTANCE_START: lifecycle.start,
        JobVerb.INSTANCE_STOP: lifecycle.stop,
        JobVerb.INSTANCE_WARM: lifecycle.warm,
        JobVerb.INSTANCE_SLEEP: lifecycle.sleep,
        JobVerb.INSTANCE_WAKE: lifecycle.wake,
        JobVerb.INSTANCE_DESTROY: lifecycle.destroy,
        JobVerb.NODE_RECONCILE: reconcile.sweep,
        JobVerb.NODE_CLEAN: disk.clean,
        JobVerb.SWEEP_STALE_PIDS: stale_pids.sweep,
        JobVerb.SWEEP_ORPHANS: orphans.sweep,
        JobVerb.SWEEP_RECONCILE: reconcile.sweep,
        JobVerb.SWEEP_IDLENESS: idleness.sweep,
        JobVerb.SWEEP_DISK: disk.sweep,
        JobVerb.SWEEP_HEALTH: lambda context: health.sweep(context, stalls),
    }
    for verb, handler in handlers.items():
        marked = verb.value.startswith("instance.") and verb is not JobVerb.INSTANCE_CREATE
        undo = undoes.get(verb, recovery.undo if marked else None)
        runner.register(verb, alone(p.locks, handler) if verb.is_sweep else handler, undo)
    urgent = UrgentWake(p.store, p.registry, jobs, runner, precedence, node)
    proof = NetworkProof(
        store=p.store, clock=p.clock, network=p.network, networks=networks, probing=p.probing, guest=p.guest,
        storage=p.storage,
    )  # fmt: skip
    network_check = NetworkCheck(
        store=p.store, registry=p.registry, clock=p.clock, network=p.network, packets=p.packets, networks=networks,
        proof=proof, node_id=node,
    )  # fmt: skip
    view = NodeView(
        store=p.store,
        storage=p.storage,
        guest=p.guest,
        vmm=p.vmm,
        clock=p.clock,
        node_id=node,
        address=address,
        urgent=urgent,
        secrets=secrets,
        insight=Insight(p.store, p.registry, p.vmm, p.storage, p.clock, node, health, reconcile),
        network_check=network_check,
        disk=disk,
        audit=audit,
        desired=DesiredStates(p.store, jobs, reconcile, audit, node),
    )
    heartbeat = Heartbeat(
        store=p.store, registry=p.registry, locks=p.locks, clock=p.clock, node_id=node, address=address,
        facts={"driver": p.vmm.name},
    )  # fmt: skip
    return NodeServices(runner, jobs, p.registry, p.store, heartbeat, urgent, view, networks)
