"""The orphan sweep: ledger and host compared, both ways.

What only the host has is shown, and removed once it has been so for the grace time, if it is surely ours: by its name
*and* by another mark (its user, its address, its place). What only the ledger has is made again where that can be done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import structlog

from mvm.domain import lock_names
from mvm.domain.findings import OrphanFound, OrphanResult
from mvm.domain.ids import InstanceRef, NodeId, TenantId
from mvm.domain.instance import Instance
from mvm.domain.job import Job
from mvm.domain.lifecycle import Status
from mvm.errors import Failed, NotFound, TimedOut, Unreachable
from mvm.ports.cgroup import Cgroups
from mvm.ports.clock import Clock
from mvm.ports.locks import Locks
from mvm.ports.network import HostNetwork
from mvm.ports.storage import NodeStorage
from mvm.ports.store import NodeStore
from mvm.ports.vmm import Snapshotting, VmmDriver
from mvm.services.jobs import Jobs
from mvm.services.ledger import Ledger
from mvm.services.networks import Networks
from mvm.services.runner import JobContext
from mvm.services.tenants import Tenants

log = structlog.get_logger("mvm.sweeps")

_LOST_S = 30.0
"""How long a job may wait in no queue: longer than sending it takes."""

_REPAIRED = 20  # lines of rules that a result names


@dataclass(frozen=True, slots=True)
class Orphan:
    """Something on the host without an owner in the store, and how to remove it; `why` it may not be, if it may not."""

    kind: str
    name: str
    remove: Callable[[], None]
    ref: InstanceRef | None = None
    why: str | None = None


class Orphans:
    """Jobs that wait in no queue, rules changed by hand, orphans, and what is missing."""

    def __init__(
        self, *, store: NodeStore, jobs: Jobs, locks: Locks, clock: Clock, vmm: VmmDriver, network: HostNetwork,
        networks: Networks, storage: NodeStorage, node_id: NodeId, grace_s: float, cgroups: Cgroups, tenants: Tenants,
    ) -> None:  # fmt: skip
        self._store = store
        self._jobs = jobs
        self._locks = locks
        self._clock = clock
        self._vmm = vmm
        self._network = network
        self._networks = networks
        self._storage = storage
        self._node_id = node_id
        self._grace_s = grace_s
        self._cgroups = cgroups
        self._tenants = tenants
        self._ledger = Ledger(store=store, network=network, storage=storage, vmm=vmm)
        self._first_seen: dict[str, float] = {}

    def sweep(self, context: JobContext) -> Mapping[str, Any]:
        """Compare, show, and put right what can be."""
        context.step("compare host and store", 0, 1)
        sent = self._send_lost(context.job)
        orphans = [self._judge(orphan) for _, orphan in sorted(self._seen().items())]
        repaired = list(self._networks.repair())
        if repaired:
            log.warning("rules repaired", lines=len(repaired), first=repaired[0])
        missing, made = self._ledger.check()
        given_back = [f"tenant {ghost} could not be made, and is given back" for ghost in self._ghosts()]
        return OrphanResult(orphans, missing, sent, [*made, *given_back, *repaired[:_REPAIRED]]).to_dict()

    def _ghosts(self) -> Sequence[TenantId]:
        try:
            return self._tenants.withdraw_ghosts()
        except Unreachable:
            return []

    def _seen(self) -> dict[str, Orphan]:
        found, now = self._find(), self._clock.monotonic()
        self._first_seen = {name: self._first_seen.get(name, now) for name in found}
        return found

    def _judge(self, orphan: Orphan) -> OrphanFound:
        age = self._clock.monotonic() - self._first_seen[orphan.name]
        removed = orphan.why is None and age >= self._grace_s and self._remove(orphan)
        if removed:
            log.warning("orphan removed", orphan=orphan.name, age_s=round(age, 1))
        return OrphanFound(orphan.kind, orphan.name, round(age, 1), removed, orphan.why)

    def _send_lost(self, own: Job) -> list[str]:
        """Jobs that wait in no queue, and those begun here that nobody works on and nobody will be told to."""
        try:
            lost = [*self._jobs.send_lost(self._node_id, older_than_s=_LOST_S), *self._left(own)]
        except Unreachable:
            return []
        return [str(job.job_id) for job in lost]

    def _left(self, own: Job) -> Sequence[Job]:
        """A message too many does no harm, so a job is sent again that may only just have lost its worker."""
        now = self._clock.now()
        due, ahead = now - timedelta(seconds=_LOST_S), now + timedelta(seconds=self._jobs.ahead_s)
        open_jobs = [
            job
            for job in self._store.unfinished_jobs()
            if job.job_id != own.job_id
            and not due < (job.retry_at or job.started_at or due) <= ahead
            and self._locks.wait_free(lock_names.job(job.job_id), deadline_s=0)
        ]
        if not open_jobs:
            return []
        queued = self._jobs.queued(self._node_id)
        left = [job for job in open_jobs if job.job_id not in queued]
        self._jobs.send_again(left)
        return left

    def _find(self) -> dict[str, Orphan]:
        # The host is read before the store: what is being created is written down first, so it has an owner by then.
        processes, taps, bridges = self._vmm.processes(), self._network.taps(), self._network.bridges()
        groups = self._cgroups.groups()
        directories, leftovers = self._storage.instances(), self._storage.leftovers()
        instances = {i.ref: i for i in self._store.instances()}
        networks = {t.id: t.network for t in self._store.tenants()}
        active = {ref: i for ref, i in instances.items() if i.may_have_vmm}
        used_taps = {networks[ref.tenant].tap(i.offset) for ref, i in active.items()}
        orphans = [
            Orphan("process", f"process {processes[ref][0].pid} of {ref}", partial(self._vmm.kill, ref, None), ref)
            for ref in processes.keys() - active.keys()
        ]
        orphans += [
            Orphan("tap", f"tap {tap}", partial(self._network.remove_taps, frozenset({tap})))
            for tap in taps.keys() - used_taps
        ]
        orphans += [
            Orphan("bridge", f"bridge {bridge}", partial(self._network.remove_bridges, frozenset({bridge})))
            for bridge in bridges - {network.bridge for network in networks.values()}
        ]
        orphans += [
            Orphan("directory", f"directory of {ref}", partial(self._storage.remove, ref), ref,
                   self._storage.not_ours(ref))
            for ref in directories - instances.keys()
        ]  # fmt: skip
        orphans += [
            Orphan("files", f"files of {ref}", partial(self._storage.clean_runtime, ref), ref)
            for ref, names in leftovers.items()
            if names and ref in instances and ref not in active and instances[ref].status is not Status.SLEEPING
        ]
        orphans += [
            Orphan("cgroup", f"control group of {ref}", partial(self._cgroups.remove, ref), ref)
            for ref in groups - active.keys() - processes.keys()  # else it goes with its process
        ]
        orphans += self._past_snapshots(instances.values())
        orphans += self._strangers()
        return {orphan.name: orphan for orphan in orphans}

    def _strangers(self) -> Iterator[Orphan]:
        """What only has the name of something of ours is told, and never touched."""
        strangers = {**{f"interface {name}": why for name, why in self._network.strangers().items()},
                     **self._vmm.strangers()}  # fmt: skip
        for name, why in strangers.items():
            yield Orphan("stranger", name, _nothing, why=f"not ours: {why}")

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
            yield Orphan("snapshot", f"snapshot of {instance.ref}", partial(vmm.discard, snapshot), instance.ref)

    def _remove(self, orphan: Orphan) -> bool:
        """Remove it if it still is an orphan once nobody else works on its instance."""
        with ExitStack() as held:
            if orphan.ref is not None:
                try:
                    held.enter_context(self._locks.hold(lock_names.instance(orphan.ref), deadline_s=0))
                except TimedOut:
                    return False
            again = self._find().get(orphan.name)
            if again is None or again.why is not None:
                return False
            orphan.remove()
            return True


def _nothing() -> None:
    """Strangers stay."""
