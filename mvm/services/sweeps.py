"""Housekeeping that Beat asks for: what is recorded but gone, and what is there but not recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import structlog

from mvm.domain.ids import InstanceRef, NodeId
from mvm.domain.instance import Instance
from mvm.domain.job import Job, Reason
from mvm.domain.lifecycle import Status
from mvm.errors import Cancelled, Failed, NotFound, TimedOut, Unreachable
from mvm.ports.cgroup import Cgroups
from mvm.ports.clock import Clock
from mvm.ports.locks import Locks
from mvm.ports.network import HostNetwork
from mvm.ports.registry import Registry
from mvm.ports.storage import NodeStorage
from mvm.ports.store import NodeStore
from mvm.ports.vmm import Presence, Snapshotting, VmmDriver
from mvm.services.audit import Audit
from mvm.services.jobs import Jobs
from mvm.services.lifecycle import Lifecycle
from mvm.services.networks import Networks
from mvm.services.recovery import Recovery
from mvm.services.runner import Handler, JobContext
from mvm.services.secrets import TenantSecrets

log = structlog.get_logger("mvm.sweeps")

_LOST_S = 30.0
"""How long a job may wait in no queue: longer than sending it takes."""

_CONSOLE_BYTES = 1 << 20  # of a running guest's console that are kept

_REPAIRED = 20  # lines of rules that a result names

_UP = (Status.RUNNING, Status.WARM)


def one_at_a_time(locks: Locks, handler: Handler) -> Handler:
    """A sweep that never overlaps one of its kind on this node, however slow it is: the later one ends at once."""

    def sweep(context: JobContext) -> Mapping[str, Any]:
        verb = context.job.verb
        with ExitStack() as held:
            try:
                held.enter_context(locks.hold(f"{verb}", deadline_s=0))
            except TimedOut:
                raise Cancelled("sweep.under_way", f"{verb} is still under way on {context.job.node_id}") from None
            return handler(context)

    return sweep


@dataclass(frozen=True, slots=True)
class Orphan:
    """Something on the host without an owner in the store, and how to remove it."""

    name: str
    remove: Callable[[], None]
    ref: InstanceRef | None = None


class Sweeps:
    """Stale PIDs and orphans. An orphan is removed once it has been one for the grace time."""

    def __init__(
        self, *, store: NodeStore, registry: Registry, jobs: Jobs, locks: Locks, clock: Clock, vmm: VmmDriver,
        network: HostNetwork, networks: Networks, storage: NodeStorage, lifecycle: Lifecycle, secrets: TenantSecrets,
        audit: Audit, node_id: NodeId, grace_s: float, keep_jobs: int, cgroups: Cgroups, recovery: Recovery,
    ) -> None:  # fmt: skip
        self._store = store
        self._registry = registry
        self._jobs = jobs
        self._locks = locks
        self._clock = clock
        self._vmm = vmm
        self._network = network
        self._networks = networks
        self._storage = storage
        self._lifecycle = lifecycle
        self._secrets = secrets
        self._audit = audit
        self._node_id = node_id
        self._grace_s = grace_s
        self._keep_jobs = keep_jobs
        self._cgroups = cgroups
        self._recovery = recovery
        self._first_seen: dict[str, float] = {}

    def stale_pids(self, context: JobContext) -> Mapping[str, Any]:
        """Instances recorded running whose process is gone become stopped, with the reason; consoles are kept short."""
        context.step("compare processes", 0, 1)
        gone = []
        for instance in self._store.instances():
            if instance.status not in _UP or instance.in_flight:
                continue
            if self._vmm.observe(instance.ref, instance.process) is not Presence.ABSENT:
                self._vmm.trim_console(self._storage.directory(instance.ref), keep=_CONSOLE_BYTES)
                continue
            reason = self._reason(instance)
            try:
                if self._lifecycle.mark_gone(context.job, instance, reason):
                    gone.append({"ref": str(instance.ref), "reason": reason})
                    log.warning("instance gone", instance=str(instance.ref), why=reason)
            except TimedOut:
                continue  # a job holds it and will see for itself
        settled = self._recovery.left(context.job)
        self._secrets.catch_up()
        self._publish_ends()
        self._audit.complete()
        self._store.forget_jobs(keep=self._keep_jobs)
        return {"changed": bool(gone or settled), "stopped": gone, "settled": settled}

    def _reason(self, instance: Instance) -> str:
        pid = instance.process.pid if instance.process else "?"
        if self._cgroups.out_of_memory(instance.ref):
            return f"VMM process {pid} reached its memory limit and was ended by the host's kernel [vmm.out_of_memory]"
        tail = self._vmm.console_tail(self._storage.directory(instance.ref), lines=3)
        panic = "; the guest panicked" if "Kernel panic" in tail else ""
        return f"VMM process {pid} was found gone{panic} [vmm.gone]"

    def _publish_ends(self) -> None:
        """Tell the registry of jobs that ended while it was away."""
        try:
            for job in self._registry.open_jobs(self._node_id):
                known = self._store.job(job.job_id)
                if known is not None and known.state.final:
                    self._registry.update(known)
        except Unreachable:
            return

    def orphans(self, context: JobContext) -> Mapping[str, Any]:
        """Processes, control groups, TAPs, bridges, directories, files that no record owns; rules changed by hand."""
        context.step("compare host and store", 0, 1)
        sent = self._send_lost(context.job)
        found = self._find_orphans()
        now = self._clock.monotonic()
        self._first_seen = {name: self._first_seen.get(name, now) for name in found}
        removed = []
        for name, orphan in sorted(found.items()):
            if now - self._first_seen[name] >= self._grace_s and self._remove(orphan):
                removed.append(name)
                log.warning("orphan removed", orphan=name)
        repaired = list(self._networks.repair())
        if repaired:
            log.warning("rules repaired", lines=len(repaired), first=repaired[0])
        return {
            "changed": bool(removed or sent or repaired), "found": sorted(found), "removed": removed,
            "sent_again": sent, "repaired": repaired[:_REPAIRED],
        }  # fmt: skip

    def _send_lost(self, own: Job) -> list[str]:
        """Jobs that wait in no queue, and those begun here that nobody works on and nobody will be told to."""
        try:
            lost = [*self._jobs.send_lost(self._node_id, older_than_s=_LOST_S), *self._left(own)]
        except Unreachable:
            return []
        return [str(job.job_id) for job in lost]

    def _left(self, own: Job) -> Sequence[Job]:
        """A message too many does no harm, so a job is sent again that may only just have lost its worker."""
        due = self._clock.now() - timedelta(seconds=_LOST_S)
        open_jobs = [
            job
            for job in self._store.unfinished_jobs()
            if job.reason is not Reason.URGENT  # their agent takes them up
            and job.job_id != own.job_id
            and (job.retry_at or job.started_at or due) <= due
            and self._locks.wait_free(f"job {job.job_id}", deadline_s=0)
        ]
        if not open_jobs:
            return []
        queued = self._jobs.queued(self._node_id)
        left = [job for job in open_jobs if job.job_id not in queued]
        self._jobs.send_again(left)
        return left

    def _find_orphans(self) -> dict[str, Orphan]:
        # The host is read before the store: what is being created is written down first, so it has an owner by then.
        processes, taps, bridges = self._vmm.processes(), self._network.taps(), self._network.bridges()
        groups = self._cgroups.groups()
        directories, leftovers = self._storage.instances(), self._storage.leftovers()
        instances = {i.ref: i for i in self._store.instances()}
        networks = {t.id: t.network for t in self._store.tenants()}
        active = {ref: i for ref, i in instances.items() if i.status in _UP or i.in_flight}
        used_taps = {networks[ref.tenant].tap(i.offset) for ref, i in active.items()}
        orphans = [
            Orphan(f"process {processes[ref][0].pid} of {ref}", partial(self._vmm.kill, ref, None), ref)
            for ref in processes.keys() - active.keys()
        ]
        orphans += [
            Orphan(f"tap {tap}", partial(self._network.remove_taps, frozenset({tap})))
            for tap in taps.keys() - used_taps
        ]
        orphans += [
            Orphan(f"bridge {bridge}", partial(self._network.remove_bridges, frozenset({bridge})))
            for bridge in bridges - {network.bridge for network in networks.values()}
        ]
        orphans += [
            Orphan(f"directory of {ref}", partial(self._storage.remove, ref), ref)
            for ref in directories - instances.keys()
        ]
        orphans += [
            Orphan(f"files of {ref}", partial(self._storage.clean_runtime, ref), ref)
            for ref, names in leftovers.items()
            if names and ref in instances and ref not in active and instances[ref].status is not Status.SLEEPING
        ]
        orphans += [
            Orphan(f"control group of {ref}", partial(self._cgroups.remove, ref), ref)
            for ref in groups - active.keys() - processes.keys()  # else it goes with its process
        ]
        orphans += self._past_snapshots(instances.values())
        return {orphan.name: orphan for orphan in orphans}

    def _past_snapshots(self, instances: Iterable[Instance]) -> Iterator[Orphan]:
        """Of those that a worker woke and was killed before it dropped what they slept in."""
        vmm = self._vmm
        for instance in instances:
            if instance.status is Status.SLEEPING or instance.in_flight or not isinstance(vmm, Snapshotting):
                continue
            snapshot = self._storage.snapshot(instance.ref)
            try:
                vmm.manifest(snapshot)
            except NotFound:
                continue
            except Failed:
                pass  # it is there, and damaged
            yield Orphan(f"snapshot of {instance.ref}", partial(vmm.discard, snapshot), instance.ref)

    def _remove(self, orphan: Orphan) -> bool:
        """Remove it if it still is an orphan once nobody else works on its instance."""
        with ExitStack() as held:
            if orphan.ref is not None:
                try:
                    held.enter_context(self._locks.hold(f"instance {orphan.ref}", deadline_s=0))
                except TimedOut:
                    return False
            if orphan.name not in self._find_orphans():
                return False
            orphan.remove()
            return True
