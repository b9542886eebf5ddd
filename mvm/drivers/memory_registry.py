"""The registry of one process, in memory: for tests and the fake driver."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from ipaddress import IPv4Network
from threading import Condition
from time import monotonic

from mvm.domain.addressing import allocate
from mvm.domain.ids import JobId, NodeId, PoolRef, TenantId
from mvm.domain.job import Job, JobState, JobVerb, Progress, by_age
from mvm.domain.refusals import job_not_found, tenant_exists
from mvm.domain.tenant import Quota, Tenant
from mvm.errors import Cancelled, Failed, MvmError, NotAllowed, TimedOut
from mvm.ports.clock import Clock
from mvm.ports.registry import NodeRecord


@dataclass
class _Bulk:
    """What a bulk job knows of its children: all in order, and those not yet sent."""

    children: list[JobId] = field(default_factory=list)
    held: deque[JobId] = field(default_factory=deque)


@dataclass(frozen=True, slots=True)
class _Sweep:
    """The newest of its kind on a node: in which period it was asked for, and `job` while it is queued or runs."""

    tick: int
    job: JobId | None
    until: float


class MemoryRegistry:
    """ports/registry.py for threads of one process. `clock` times what ends here and what expires."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._changed = Condition()
        self._nodes: dict[NodeId, NodeRecord] = {}
        self._tenants: dict[TenantId, Tenant] = {}
        self._net_ids: set[int] = set()
        self._rebuilt_at: float | None = None
        self._pools: dict[PoolRef, NodeId] = {}
        self._jobs: dict[JobId, Job] = {}
        self._bulks: dict[JobId, _Bulk] = {}
        self._cancels: set[JobId] = set()
        self._refused: dict[str, MvmError] = {}
        self._followers: list[deque[Job]] = []
        self._sweeps: dict[tuple[str, NodeId], _Sweep] = {}

    # --- nodes
    def heartbeat(self, record: NodeRecord) -> None:
        """See ports/registry.py."""
        with self._changed:
            self._nodes[record.node_id] = record

    def nodes(self) -> Sequence[NodeRecord]:
        """See ports/registry.py."""
        with self._changed:
            return [self._nodes[node] for node in sorted(self._nodes)]

    def live_nodes(self, since: datetime) -> Sequence[NodeId]:
        """See ports/registry.py."""
        return [record.node_id for record in self.nodes() if record.last_seen_at >= since]

    def forget_node(self, node: NodeId) -> None:
        """See ports/registry.py."""
        with self._changed:
            self._nodes.pop(node, None)

    # --- tenants and placement
    def reserve_tenant(
        self, tenant: TenantId, net_id: int | None, subnet: IPv4Network | None, quota: Quota, now: datetime
    ) -> Tenant:
        """See ports/registry.py."""
        with self._changed:
            if tenant in self._tenants:
                raise tenant_exists(tenant)
            taken = [t.network.subnet for t in self._tenants.values()]
            network = allocate(net_id, subnet, used_ids=self._net_ids, taken=taken)
            self._net_ids.add(network.net_id)
            self._tenants[tenant] = Tenant(tenant, network, quota, now)
            return self._tenants[tenant]

    def restore(self, tenants: Sequence[Tenant], pools: Mapping[PoolRef, NodeId], net_ids: frozenset[int]) -> None:
        """See ports/registry.py."""
        with self._changed:
            for tenant in tenants:
                self._tenants.setdefault(tenant.id, tenant)
                self._net_ids.add(tenant.network.net_id)
            for ref, node in pools.items():
                self._pools.setdefault(ref, node)
            self._net_ids |= net_ids

    def rebuilding_s(self, *, used: bool, within_s: float) -> float:
        """See ports/registry.py."""
        with self._changed:
            now = self._clock.monotonic()
            if self._rebuilt_at is None:
                self._rebuilt_at = now + within_s if used else now
            return max(0.0, self._rebuilt_at - now)

    def tenant(self, tenant: TenantId) -> Tenant | None:
        """See ports/registry.py."""
        with self._changed:
            return self._tenants.get(tenant)

    def networks(self) -> tuple[Sequence[Tenant], frozenset[int]]:
        """See ports/registry.py."""
        with self._changed:
            return [self._tenants[tenant] for tenant in sorted(self._tenants)], frozenset(self._net_ids)

    def withdraw_tenant(self, reserved: Tenant) -> None:
        """See ports/registry.py."""
        with self._changed:
            if self._tenants.get(reserved.id) == reserved:
                del self._tenants[reserved.id]
                self._net_ids.discard(reserved.network.net_id)

    def put_tenant(self, tenant: Tenant) -> None:
        """See ports/registry.py."""
        with self._changed:
            self._tenants[tenant.id] = tenant
            self._net_ids.add(tenant.network.net_id)

    def remove_tenant(self, tenant: TenantId, node: NodeId) -> None:
        """See ports/registry.py."""
        with self._changed:
            if all(where == node for ref, where in self._pools.items() if ref.tenant == tenant):
                self._tenants.pop(tenant, None)

    def place_pool(self, pool: PoolRef, node: NodeId) -> None:
        """See ports/registry.py."""
        with self._changed:
            self._pools[pool] = node

    def unplace_pool(self, pool: PoolRef, node: NodeId) -> None:
        """See ports/registry.py."""
        with self._changed:
            if self._pools.get(pool) == node:
                del self._pools[pool]

    def pool_node(self, pool: PoolRef) -> NodeId | None:
        """See ports/registry.py."""
        with self._changed:
            return self._pools.get(pool)

    # --- jobs
    def record(self, jobs: Sequence[Job], *, hold: frozenset[JobId] = frozenset()) -> None:
        """See ports/registry.py."""
        with self._changed:
            for job in jobs:
                self._jobs[job.job_id] = job
                if job.verb is JobVerb.BULK:
                    self._bulks[job.job_id] = _Bulk()
                elif job.parent in self._bulks:
                    bulk = self._bulks[job.parent]
                    bulk.children.append(job.job_id)
                    if job.job_id in hold:
                        bulk.held.append(job.job_id)

    def job(self, job_id: JobId) -> Job | None:
        """See ports/registry.py."""
        with self._changed:
            return self._jobs.get(job_id)

    def jobs(self, *, state: JobState | None = None, subject: str | None = None, limit: int = 200) -> Sequence[Job]:
        """See ports/registry.py."""
        with self._changed:
            newest = sorted(self._jobs.values(), key=by_age, reverse=True)
        found = [
            job for job in newest
            if (state is None or job.state is state)
            and (subject is None or job.subject == subject or job.subject.startswith(subject + "/"))
        ]  # fmt: skip
        return found[:limit]

    def children(self, parent: JobId) -> Sequence[Job]:
        """See ports/registry.py."""
        with self._changed:
            bulk = self._bulks.get(parent)
            return [self._jobs[child] for child in bulk.children] if bulk else []

    def open_jobs(self, node: NodeId) -> Sequence[Job]:
        """See ports/registry.py."""
        with self._changed:
            found = [job for job in self._jobs.values() if job.node_id == node and not job.state.final]
        return sorted(found, key=by_age)

    def update(self, job: Job) -> Job | None:
        """See ports/registry.py."""
        with self._changed:
            known = self._jobs.get(job.job_id)
            if known is not None and known.state.final:
                return None
            self._publish(job)
            if job.parent in self._bulks and job.state.final:
                return self._count_child(job.parent)
            return None

    def _publish(self, job: Job) -> None:
        self._jobs[job.job_id] = job
        if job.state.final and job.parent in self._bulks and job.job_id in self._bulks[job.parent].held:
            self._bulks[job.parent].held.remove(job.job_id)
        for inbox in self._followers:
            inbox.append(job)
        self._changed.notify_all()

    def _count_child(self, parent_id: JobId) -> Job | None:
        """Publish the parent's new progress; returns the parent if this ended it."""
        parent, bulk = self._jobs[parent_id], self._bulks[parent_id]
        if parent.state.final:
            return None
        states = [self._jobs[child].state for child in bulk.children]
        ended = [state for state in states if state.final]
        failed = sum(state is not JobState.SUCCEEDED for state in ended)
        total = parent.progress.total
        parent = replace(parent, progress=Progress(len(ended), total, failed))
        done = len(ended) >= total
        if done:
            cancelled = parent_id in self._cancels
            parent = replace(
                parent,
                state=(JobState.CANCELLED if cancelled else JobState.FAILED) if failed else JobState.SUCCEEDED,
                error=_bulk_ended(parent_id, failed, total, cancelled=cancelled).to_dict() if failed else None,
                finished_at=self._clock.now(),
            )
        self._publish(parent)
        return parent if done else None

    def next_children(self, parent: JobId) -> Sequence[Job]:
        """See ports/registry.py."""
        with self._changed:
            bulk = self._bulks.get(parent)
            if bulk is None:
                return []
            parallel = self._jobs[parent].params.get("parallel") or len(bulk.children)
            under_way = sum(not self._jobs[child].state.final for child in bulk.children) - len(bulk.held)
            count = max(0, min(parallel - under_way, len(bulk.held)))
            return [self._jobs[bulk.held.popleft()] for _ in range(count)]

    def held_children(self, parent: JobId) -> frozenset[JobId]:
        """See ports/registry.py."""
        with self._changed:
            return frozenset(self._bulks[parent].held) if parent in self._bulks else frozenset()

    def request_cancel(self, job_id: JobId) -> Job:
        """See ports/registry.py."""
        with self._changed:
            job = self._jobs.get(job_id)
            if job is None:
                raise job_not_found(job_id)
            if job.state.final:
                raise NotAllowed(
                    "job.finished", f"job {job_id} is {job.state} already", hint=f"see: mvm job show {job_id}",
                    subject=job_id, state=job.state.value,
                )  # fmt: skip
            asked = [job]
            if (bulk := self._bulks.get(job_id)) is not None:
                self._cancels.add(job_id)
                asked = [self._jobs[child] for child in bulk.children]  # held ones too: none of them is sent any more
            for each in asked:
                if not each.state.final:
                    self._cancels.add(each.job_id)
                if each.state is JobState.QUEUED:
                    self.update(replace(each, state=JobState.CANCELLED, finished_at=self._clock.now()))
            return self._jobs[job_id]

    def update_and_ask(self, job: Job) -> bool:
        """See ports/registry.py."""
        self.update(job)
        return self.cancel_requested(job.job_id)

    def cancel_requested(self, job_id: JobId) -> bool:
        """See ports/registry.py."""
        with self._changed:
            return job_id in self._cancels

    def expired_jobs(self, now: datetime) -> Sequence[Job]:
        """See ports/registry.py."""
        with self._changed:
            queued = [job for job in self._jobs.values() if job.state is JobState.QUEUED]
            return sorted((j for j in queued if j.expires_at and j.expires_at <= now), key=by_age)

    def expire(self, job: Job) -> None:
        """See ports/registry.py."""
        with self._changed:
            known = self._jobs.get(job.job_id)
            if known is None or known.state is JobState.QUEUED:
                self._cancels.add(job.job_id)
                self.update(job)

    def refuse(self, task_id: str, error: MvmError) -> None:
        """See ports/registry.py."""
        with self._changed:
            self._refused[task_id] = error

    def refusal(self, task_id: str) -> MvmError | None:
        """See ports/registry.py."""
        with self._changed:
            return self._refused.get(task_id)

    def follow(self, job_ids: Sequence[JobId], *, deadline_s: float | None) -> Iterator[Job]:
        """See ports/registry.py."""
        end = None if deadline_s is None else monotonic() + deadline_s
        with self._subscribed(job_ids) as inbox:
            open_ids = set(job_ids)
            while open_ids:
                with self._changed:
                    left = None if end is None else end - monotonic()
                    if not self._changed.wait_for(lambda: inbox, left):
                        raise TimedOut(
                            "job.wait_timeout", f"not finished after {deadline_s:g} s: {', '.join(sorted(open_ids))}",
                            hint=f"the job goes on; wait again with: mvm job wait {min(open_ids)}",
                        )  # fmt: skip
                    job = inbox.popleft()
                if job.job_id in open_ids:
                    if job.state.final:
                        open_ids.discard(job.job_id)
                    yield job

    @contextmanager
    def _subscribed(self, job_ids: Sequence[JobId]) -> Iterator[deque[Job]]:
        """An inbox that holds each job as it is now and then every change of any job."""
        inbox: deque[Job] = deque()
        with self._changed:
            for job_id in dict.fromkeys(job_ids):
                if job_id not in self._jobs:
                    raise job_not_found(job_id)
                inbox.append(self._jobs[job_id])
            self._followers.append(inbox)
        try:
            yield inbox
        finally:
            with self._changed:
                self._followers[:] = [other for other in self._followers if other is not inbox]

    # --- sweeps
    def tick(self, every_s: float) -> int:
        """See ports/registry.py."""
        return int(self._clock.now().timestamp() * 1000) // int(every_s * 1000)

    def claim_sweep(self, verb: str, node: NodeId, job: JobId, *, tick: int, every_s: float, ttl_s: float) -> bool:
        """See ports/registry.py."""
        with self._changed:
            now = self._clock.monotonic()
            claimed = self._sweeps.get((verb, node))
            if claimed is not None and claimed.job == job:
                return True
            if tick != self.tick(every_s):
                return False
            if claimed is not None and (claimed.tick == tick or (claimed.job is not None and now < claimed.until)):
                return False
            self._sweeps[verb, node] = _Sweep(tick, job, now + ttl_s)
            return True

    def release_sweep(self, verb: str, node: NodeId, job: JobId) -> None:
        """See ports/registry.py."""
        with self._changed:
            claimed = self._sweeps.get((verb, node))
            if claimed is not None and claimed.job == job:
                self._sweeps[verb, node] = replace(claimed, job=None)


def _bulk_ended(parent: JobId, failed: int, total: int, *, cancelled: bool) -> Failed:
    hint = f"see: mvm job show {parent}"
    if cancelled:
        message = f"{failed} of {total} were cancelled or failed"
        return Cancelled("job.cancelled", message, hint=hint, failed=failed, total=total)
    return Failed("bulk.failed", f"{failed} of {total} failed", hint=hint, failed=failed, total=total)
