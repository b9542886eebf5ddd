"""The cluster's shared knowledge: who exists, where, and how the jobs go."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from ipaddress import IPv4Network
from typing import Any, Protocol

from mvm.domain.ids import JobId, NodeId, PoolRef, TenantId
from mvm.domain.job import Job, JobState
from mvm.domain.tenant import Quota, Tenant
from mvm.errors import MvmError


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """A node's last heartbeat; `facts` are JSON values for people."""

    node_id: NodeId
    address: str
    last_seen_at: datetime
    facts: Mapping[str, Any]


class Registry(Protocol):
    """Raises `Unreachable` (``registry.unreachable``) within a second when it does not answer."""

    # --- nodes
    def heartbeat(self, record: NodeRecord) -> None:
        """The node lives, now."""
        ...

    def nodes(self) -> Sequence[NodeRecord]:
        """Every node ever seen and not removed, by id."""
        ...

    def live_nodes(self, since: datetime) -> Sequence[NodeId]:
        """Nodes whose worker was seen since then."""
        ...

    def forget_node(self, node: NodeId) -> None:
        """Forget a node that left in an orderly way."""
        ...

    # --- tenants and placement
    def reserve_tenant(
        self, tenant: TenantId, net_id: int | None, subnet: IPv4Network | None, quota: Quota, now: datetime
    ) -> Tenant:
        """Create a tenant, choosing what network is not given, atomically in the whole cluster.

        Raises `NotAllowed`: ``tenant.exists``, ``tenant.net_id_used``, ``tenant.subnet_overlap``.
        """
        ...

    def withdraw_tenant(self, reserved: Tenant) -> None:
        """`reserve_tenant`, which returned `reserved`, never was: its net id may be given again.

        For a tenant that could not be made and that no node has. Nothing happens when it has changed since.
        """
        ...

    def restore(self, tenants: Sequence[Tenant], pools: Mapping[PoolRef, NodeId], net_ids: frozenset[int]) -> None:
        """What a node knows is known here again (an emptied registry is rebuilt from its nodes)."""
        ...

    def rebuilding_s(self, *, used: bool, within_s: float) -> float:
        """How many seconds its nodes still have to put back what they know, since it has lost its data; 0: it has not.

        One that nobody has asked yet is new, or has lost all if the asker's store says that it was `used`: then the
        nodes have `within_s` from now on.
        """
        ...

    def tenant(self, tenant: TenantId) -> Tenant | None:
        """One tenant, if it exists."""
        ...

    def networks(self) -> tuple[Sequence[Tenant], frozenset[int]]:
        """All tenants of the cluster, and every net id ever given: what a new tenant's network has to differ from."""
        ...

    def put_tenant(self, tenant: Tenant) -> None:
        """Replace a tenant (its quota)."""
        ...

    def remove_tenant(self, tenant: TenantId, node: NodeId) -> None:
        """Forget it, for `node`; its net id stays given. One that has pools on another node stays."""
        ...

    def place_pool(self, pool: PoolRef, node: NodeId) -> None:
        """The pool and its instances live on that node."""
        ...

    def unplace_pool(self, pool: PoolRef, node: NodeId) -> None:
        """The pool is gone from `node`; one that lives on another stays there."""
        ...

    def pool_node(self, pool: PoolRef) -> NodeId | None:
        """Where a pool lives."""
        ...

    # --- jobs
    def record(self, jobs: Sequence[Job], *, hold: frozenset[JobId] = frozenset()) -> None:
        """Know these queued jobs before they are sent. Those in `hold` wait until `next_children` releases them."""
        ...

    def job(self, job_id: JobId) -> Job | None:
        """One job, if it is known."""
        ...

    def jobs(self, *, state: JobState | None = None, subject: str | None = None, limit: int = 200) -> Sequence[Job]:
        """The newest jobs first. A `subject` also matches what lies below it."""
        ...

    def children(self, parent: JobId) -> Sequence[Job]:
        """A bulk job's children, in order."""
        ...

    def open_jobs(self, node: NodeId) -> Sequence[Job]:
        """Jobs of this node that are queued or running, oldest first."""
        ...

    def update(self, job: Job) -> Job | None:
        """Publish a job's new state to those who follow it.

        A final state is never left again: the update is then dropped. Ending a child counts on its parent, which
        ends with its last child; the parent is returned in that case.
        """
        ...

    def update_and_ask(self, job: Job) -> bool:
        """`update`, and then whether somebody asked for its end (`cancel_requested`): in one exchange."""
        ...

    def next_children(self, parent: JobId) -> Sequence[Job]:
        """Held children that may be sent now that others ended, at most to the bulk job's ``parallel``."""
        ...

    def held_children(self, parent: JobId) -> frozenset[JobId]:
        """Children that `next_children` has not released yet."""
        ...

    def request_cancel(self, job_id: JobId) -> Job:
        """Ask a job (and a bulk job's children) to end: queued ones are cancelled, running ones are asked.

        Raises `NotFound` (``job.not_found``) and `NotAllowed` (``job.finished``).
        """
        ...

    def cancel_requested(self, job_id: JobId) -> bool:
        """Whether somebody asked; still true after its end, for a message of it may come later."""
        ...

    def expired_jobs(self, now: datetime) -> Sequence[Job]:
        """Queued jobs of any node whose ``expires_at`` has passed."""
        ...

    def expire(self, job: Job) -> None:
        """`job` ends so, cancelled; a message of it that comes later finds it so, as after `request_cancel`.

        Nothing happens if it is not queued any more.
        """
        ...

    def refuse(self, task_id: str, error: MvmError) -> None:
        """The Celery task of this id never becomes a job, and `error` is why: for whoever waits for its result."""
        ...

    def refusal(self, task_id: str) -> MvmError | None:
        """Why a task never became a job, if that was told within a week."""
        ...

    def follow(self, job_ids: Sequence[JobId], *, deadline_s: float | None) -> Iterator[Job]:
        """Each of these jobs as it is now, and again at every change, until all are final.

        A bulk job's changes carry its progress. Raises `TimedOut` (``job.wait_timeout``) past the deadline.
        """
        ...

    # --- sweeps
    def tick(self, every_s: float) -> int:
        """Which period of this length it is, by the registry's clock: the same for whoever asks."""
        ...

    def claim_sweep(self, verb: str, node: NodeId, job: JobId, *, tick: int, every_s: float, ttl_s: float) -> bool:
        """Whether `job` is the node's sweep of this kind in period `tick`; asked again, the answer is the same.

        It is not when that period is over or has had one, or when one is still queued or running, for `ttl_s` at most.
        """
        ...

    def release_sweep(self, verb: str, node: NodeId, job: JobId) -> None:
        """`job` has ended; another may be sent."""
        ...
