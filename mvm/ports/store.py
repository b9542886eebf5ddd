"""The node's durable state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from enum import StrEnum
from typing import Any, Protocol

from mvm.domain.audit import Link
from mvm.domain.ids import InstanceRef, JobId, PoolRef, TenantId
from mvm.domain.instance import Instance
from mvm.domain.job import Job, JobState
from mvm.domain.pool import WorkerPool
from mvm.domain.tenant import Tenant


class Note(StrEnum):
    """What is remembered of an instance beside its row; each is one JSON object, that of the last time."""

    HEALTH = "health"
    POLICY = "policy"
    SECRETS = "secrets"
    SLEEPLESS = "sleepless"
    SLEPT = "slept"
    WOKE = "woke"


class NodeStore(Protocol):
    """What this node knows; every write is durable when the call returns.

    Lookups raise `NotFound` (``tenant.not_found``, ``pool.not_found``, ``instance.not_found``). Threads and
    processes may share it.
    """

    def transaction(self, *, durable: bool = True) -> AbstractContextManager[None]:
        """All reads and writes of this thread within are one atomic step, seen by others whole or not at all.

        It begins with the write lock, so what it reads stays true until it ends. It does not nest. Its writes outlive
        every process; those that are not `durable` may be lost with the machine's power, until a durable one follows.
        """
        ...

    def tenants(self) -> Sequence[Tenant]:
        """All tenants, by id."""
        ...

    def tenant(self, tenant: TenantId) -> Tenant:
        """One tenant."""
        ...

    def put_tenant(self, tenant: Tenant) -> None:
        """Insert or replace. Its net id is remembered as given, for ever."""
        ...

    def delete_tenant(self, tenant: TenantId) -> None:
        """Forget it, but for its net id."""
        ...

    def given_net_ids(self) -> frozenset[int]:
        """Every net id a tenant on this node ever had."""
        ...

    def pools(self, tenant: TenantId | None = None) -> Sequence[WorkerPool]:
        """Pools by ref, of one tenant or all."""
        ...

    def pool(self, ref: PoolRef) -> WorkerPool:
        """One pool."""
        ...

    def put_pool(self, pool: WorkerPool) -> None:
        """Insert or replace."""
        ...

    def delete_pool(self, ref: PoolRef) -> None:
        """Forget it."""
        ...

    def instances(self, tenant: TenantId | None = None, pool: PoolRef | None = None) -> Sequence[Instance]:
        """Instances by ref, all or of one tenant or pool; destroyed ones are not kept."""
        ...

    def instance(self, ref: InstanceRef) -> Instance:
        """One instance."""
        ...

    def insert_instance(self, instance: Instance) -> None:
        """Raises `NotAllowed` (``instance.exists``)."""
        ...

    def save_instance(self, instance: Instance) -> Instance:
        """Replace the one with the same generation and return it with the next.

        Raises `NotAllowed` (``instance.changed``) when somebody else has written since it was read.
        """
        ...

    def lease(self, ref: InstanceRef) -> int | None:
        """The newest lease of an instance; None when there is no such instance. Cheap: asked before every act."""
        ...

    def delete_instance(self, ref: InstanceRef) -> None:
        """Forget it, and the notes on it."""
        ...

    def notes(self, kind: Note) -> Mapping[InstanceRef, Mapping[str, Any]]:
        """All notes of a kind."""
        ...

    def note(self, ref: InstanceRef, kind: Note) -> Mapping[str, Any] | None:
        """One instance's note, if there is one."""
        ...

    def put_note(self, ref: InstanceRef, kind: Note, note: Mapping[str, Any]) -> None:
        """Insert or replace; nothing happens if the instance is not known any more."""
        ...

    def desired(self) -> Mapping[str, Any] | None:
        """The desired-state document that this node accepted last, if it did."""
        ...

    def put_desired(self, document: Mapping[str, Any]) -> None:
        """Insert or replace."""
        ...

    def job(self, job_id: JobId) -> Job | None:
        """The node's record of a job it took, if it did."""
        ...

    def put_job(self, job: Job) -> None:
        """Insert or replace.

        Raises `Fenced` (``job.taken_over``) for a record that is final, or that somebody has begun anew since: the
        caller was taken for dead. A record that is not final outlives its writer's death at once, and the host's with
        the next write of another kind.
        """
        ...

    def last_job(self, subject: str, *, state: JobState | None = None) -> Job | None:
        """The newest job this node took of `subject`, if it remembers one; with `state`, of those that are so."""
        ...

    def unfinished_jobs(self) -> Sequence[Job]:
        """Jobs this node began and did not end, oldest first."""
        ...

    def audit_head(self, tenant: TenantId) -> Link | None:
        """The last entry of the tenant's audit trail, pending ones included; kept when the tenant is forgotten."""
        ...

    def put_audit(self, tenant: TenantId, line: str, head: Link) -> None:
        """Keep a line that is to be appended to the tenant's trail, whose head it becomes.

        For a transaction in which the head was read that it follows.
        """
        ...

    def pending_audit(self, tenant: TenantId) -> Sequence[str]:
        """Lines still to be appended, in their order."""
        ...

    def drop_audit(self, tenant: TenantId, count: int) -> None:
        """The first `count` of them are appended."""
        ...

    def unwritten_trails(self) -> Sequence[TenantId]:
        """The tenants with lines still to be appended."""
        ...

    def forget_jobs(self, *, keep: int) -> int:
        """Drop the oldest finished jobs beyond `keep`; returns how many."""
        ...
