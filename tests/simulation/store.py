"""The node's store without a disk: values as they are, transactions by copying. A test compares it with SQLite."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from mvm.domain.audit import Link
from mvm.domain.ids import InstanceRef, JobId, PoolRef, TenantId
from mvm.domain.instance import Instance
from mvm.domain.job import Job, JobState, by_age
from mvm.domain.pool import WorkerPool
from mvm.domain.refusals import not_found
from mvm.domain.tenant import Tenant
from mvm.errors import Fenced, NotAllowed
from mvm.ports.store import Note

_K = TypeVar("_K")
_V = TypeVar("_V")

_TABLES = ("_tenants", "_net_ids", "_pools", "_instances", "_notes", "_jobs", "_heads", "_pending")


class MemoryStore:
    """ports/store.py. `call` is told of every read and write, by name, before it is done."""

    def __init__(self, call: Callable[[str], None] = lambda name: None) -> None:
        self.call = call
        self.inserted: Callable[[Instance], None] = lambda instance: None
        self.in_transaction = False
        self._tenants: dict[TenantId, Tenant] = {}
        self._net_ids: dict[int, None] = {}
        self._pools: dict[PoolRef, WorkerPool] = {}
        self._instances: dict[InstanceRef, Instance] = {}
        self._notes: dict[tuple[InstanceRef, Note], Mapping[str, Any]] = {}
        self._jobs: dict[JobId, Job] = {}
        self._heads: dict[TenantId, Link] = {}
        self._pending: dict[tuple[TenantId, int], str] = {}
        self._desired: Mapping[str, Any] | None = None

    def copy(self, call: Callable[[str], None]) -> MemoryStore:
        """Another one with the same in it."""
        other = MemoryStore(call)
        other.become(self)
        return other

    def become(self, other: MemoryStore) -> None:
        """It has what the other one has."""
        for name in _TABLES:
            setattr(self, name, dict(getattr(other, name)))
        self._desired = other._desired

    @contextmanager
    def transaction(self, *, durable: bool = True) -> Iterator[None]:
        """See ports/store.py."""
        self.call("store.transaction")
        assert not self.in_transaction, "transactions do not nest"
        before = {name: dict(getattr(self, name)) for name in _TABLES}, self._desired
        self.in_transaction = True
        try:
            yield
        except BaseException:
            for name, table in before[0].items():
                setattr(self, name, table)
            self._desired = before[1]
            raise
        finally:
            self.in_transaction = False

    # --- tenants
    def tenants(self) -> Sequence[Tenant]:
        """See ports/store.py."""
        self.call("store.tenants")
        return list(self._tenants.values())

    def tenant(self, tenant: TenantId) -> Tenant:
        """See ports/store.py."""
        self.call("store.tenant")
        if tenant not in self._tenants:
            raise not_found("tenant", tenant)
        return self._tenants[tenant]

    def put_tenant(self, tenant: Tenant) -> None:
        """See ports/store.py."""
        self.call("store.put_tenant")
        self._net_ids[tenant.network.net_id] = None
        _put(self._tenants, tenant.id, tenant)

    def delete_tenant(self, tenant: TenantId) -> None:
        """See ports/store.py."""
        self.call("store.delete_tenant")
        self._tenants.pop(tenant, None)

    def given_net_ids(self) -> frozenset[int]:
        """See ports/store.py."""
        return frozenset(self._net_ids)

    # --- pools
    def pools(self, tenant: TenantId | None = None) -> Sequence[WorkerPool]:
        """See ports/store.py."""
        self.call("store.pools")
        return [pool for ref, pool in self._pools.items() if tenant in (None, ref.tenant)]

    def pool(self, ref: PoolRef) -> WorkerPool:
        """See ports/store.py."""
        self.call("store.pool")
        if ref not in self._pools:
            raise not_found("pool", ref)
        return self._pools[ref]

    def put_pool(self, pool: WorkerPool) -> None:
        """See ports/store.py."""
        self.call("store.put_pool")
        _put(self._pools, pool.ref, pool)

    def delete_pool(self, ref: PoolRef) -> None:
        """See ports/store.py."""
        self.call("store.delete_pool")
        self._pools.pop(ref, None)

    # --- instances
    def instances(self, tenant: TenantId | None = None, pool: PoolRef | None = None) -> Sequence[Instance]:
        """See ports/store.py."""
        self.call("store.instances")
        if pool is not None:
            return [i for ref, i in self._instances.items() if ref.pool_ref == pool]
        return [i for ref, i in self._instances.items() if tenant in (None, ref.tenant)]

    def instance(self, ref: InstanceRef) -> Instance:
        """See ports/store.py."""
        self.call("store.instance")
        if ref not in self._instances:
            raise not_found("instance", ref)
        return self._instances[ref]

    def insert_instance(self, instance: Instance) -> None:
        """See ports/store.py."""
        self.call("store.insert_instance")
        if instance.ref in self._instances:
            raise NotAllowed("instance.exists", f"instance {instance.ref} exists already", subject=str(instance.ref))
        self.inserted(instance)
        _put(self._instances, instance.ref, instance)

    def save_instance(self, instance: Instance) -> Instance:
        """See ports/store.py."""
        self.call("store.save_instance")
        known = self._instances.get(instance.ref)
        if known is None:
            raise not_found("instance", instance.ref)
        if known.generation != instance.generation:
            raise NotAllowed(
                "instance.changed", f"instance {instance.ref} was changed by somebody else meanwhile",
                hint="try again", subject=str(instance.ref), generation=instance.generation,
            )  # fmt: skip
        saved = self._instances[instance.ref] = replace(instance, generation=instance.generation + 1)
        return saved

    def lease(self, ref: InstanceRef) -> int | None:
        """See ports/store.py."""
        self.call("store.lease")
        return self._instances[ref].lease if ref in self._instances else None

    def delete_instance(self, ref: InstanceRef) -> None:
        """See ports/store.py."""
        self.call("store.delete_instance")
        self._instances.pop(ref, None)
        self._notes = {key: note for key, note in self._notes.items() if key[0] != ref}

    def notes(self, kind: Note) -> Mapping[InstanceRef, Mapping[str, Any]]:
        """See ports/store.py."""
        self.call("store.notes")
        return {ref: note for (ref, of), note in self._notes.items() if of is kind}

    def note(self, ref: InstanceRef, kind: Note) -> Mapping[str, Any] | None:
        """See ports/store.py."""
        self.call("store.note")
        return self._notes.get((ref, kind))

    def put_note(self, ref: InstanceRef, kind: Note, note: Mapping[str, Any]) -> None:
        """See ports/store.py."""
        self.call("store.put_note")
        if ref in self._instances:
            self._notes[ref, kind] = note

    # --- the desired state
    def desired(self) -> Mapping[str, Any] | None:
        """See ports/store.py."""
        self.call("store.desired")
        return self._desired

    def put_desired(self, document: Mapping[str, Any]) -> None:
        """See ports/store.py."""
        self.call("store.put_desired")
        self._desired = document

    # --- jobs
    def job(self, job_id: JobId) -> Job | None:
        """See ports/store.py."""
        self.call("store.job")
        return self._jobs.get(job_id)

    def put_job(self, job: Job) -> None:
        """See ports/store.py."""
        self.call("store.put_job")
        known = self._jobs.get(job.job_id)
        if known is not None and (known.state.final or known.run > job.run):
            raise Fenced("job.taken_over", f"job {job.job_id} was taken over by another worker",
                         hint=f"see: mvm job show {job.job_id}", subject=job.job_id)  # fmt: skip
        self._jobs[job.job_id] = job

    def last_job(self, subject: str, *, state: JobState | None = None) -> Job | None:
        """See ports/store.py."""
        self.call("store.last_job")
        found = [j for j in self._jobs.values() if j.subject == subject and state in (None, j.state)]
        return max(found, key=by_age, default=None)

    def unfinished_jobs(self) -> Sequence[Job]:
        """See ports/store.py."""
        self.call("store.unfinished_jobs")
        return sorted((job for job in self._jobs.values() if not job.state.final), key=lambda job: job.job_id)

    # --- audit trails
    def audit_head(self, tenant: TenantId) -> Link | None:
        """See ports/store.py."""
        self.call("store.audit_head")
        return self._heads.get(tenant)

    def put_audit(self, tenant: TenantId, line: str, head: Link) -> None:
        """See ports/store.py."""
        self.call("store.put_audit")
        self._heads[tenant] = head
        self._pending[tenant, head.seq] = line

    def pending_audit(self, tenant: TenantId) -> Sequence[str]:
        """See ports/store.py."""
        self.call("store.pending_audit")
        return [self._pending[key] for key in self._waiting(tenant)]

    def drop_audit(self, tenant: TenantId, count: int) -> None:
        """See ports/store.py."""
        self.call("store.drop_audit")
        for key in self._waiting(tenant)[:count]:
            del self._pending[key]

    def unwritten_trails(self) -> Sequence[TenantId]:
        """See ports/store.py."""
        self.call("store.unwritten_trails")
        return sorted({tenant for tenant, _ in self._pending})

    def _waiting(self, tenant: TenantId) -> list[tuple[TenantId, int]]:
        return sorted(key for key in self._pending if key[0] == tenant)

    def forget_jobs(self, *, keep: int) -> int:
        """See ports/store.py."""
        self.call("store.forget_jobs")
        newest = sorted(self._jobs.values(), key=by_age, reverse=True)
        kept = {job.job_id for job in newest[:keep]}
        gone = [job_id for job_id, job in self._jobs.items() if job.state.final and job_id not in kept]
        for job_id in gone:
            del self._jobs[job_id]
        return len(gone)


def _put(table: dict[_K, _V], key: _K, value: _V) -> None:
    """Tables are kept in the order of their keys' names: they are read far more often than they grow."""
    grows = key not in table
    table[key] = value
    if grows:
        items = sorted(table.items(), key=lambda item: str(item[0]))
        table.clear()
        table.update(items)
