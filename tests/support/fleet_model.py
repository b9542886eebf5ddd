"""A node's state as plain values, on which planned actions are done: what a planner's properties are tested with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from hashlib import sha256

from mvm.domain.actions import (
    Action,
    Build,
    Create,
    CreatePool,
    CreateTenant,
    DestroyPool,
    DestroyTenant,
    Request,
    UpdatePool,
    UpdateTenant,
)  # fmt: skip
from mvm.domain.desired import DesiredPool, DesiredState
from mvm.domain.ids import InstanceId, InstanceRef, JobId, PoolRef, Revision, TenantId
from mvm.domain.instance import InFlight, Instance
from mvm.domain.job import JobVerb
from mvm.domain.lifecycle import Status, Verb, landing
from mvm.domain.planner import Observed
from mvm.domain.pool import ImageSource, WorkerPool
from mvm.domain.room import usage_of
from mvm.domain.tenant import Tenant, Usage
from tests.support.make import NODE, START

NOW = START
JOB = JobId.make(0, b"00000")


def revision_of(source: ImageSource) -> Revision:
    return Revision(sha256(source.profile.encode()).hexdigest())


def observed_pool(wanted: DesiredPool, revision: Revision | None = None, **changes: object) -> WorkerPool:
    """The pool that `wanted` becomes."""
    pool = WorkerPool(
        ref=wanted.ref, source=wanted.source, resources=wanted.resources, node_id=NODE, created_at=START,
        desired=wanted.desired, compression=wanted.compression, sleep_policy=wanted.sleep_policy,
        pinned=wanted.pinned, critical=wanted.critical, revision=revision, built=wanted.source if revision else None,
    )  # fmt: skip
    for name in ("egress", "seccomp_policy", "metadata_enabled"):
        if hasattr(pool, name):
            pool = replace(pool, **{name: getattr(wanted, name)})
    return replace(pool, **changes)  # type: ignore[arg-type]


@dataclass
class World:
    """What exists, and what is under way. Starts at a revision in `bad` fail."""

    desired: DesiredState
    tenants: dict[TenantId, Tenant] = field(default_factory=dict)
    pools: dict[PoolRef, WorkerPool] = field(default_factory=dict)
    instances: dict[InstanceRef, Instance] = field(default_factory=dict)
    unhealthy: set[InstanceRef] = field(default_factory=set)
    under_way: list[Action] = field(default_factory=list)
    bad: frozenset[Revision] = frozenset()
    made: int = 0

    def observed(self) -> Observed:
        return Observed(
            now=NOW, tenants=tuple(self.tenants.values()), pools=tuple(self.pools.values()),
            instances=tuple(self.instances.values()), unhealthy=frozenset(self.unhealthy),
            jobs=frozenset(job for job in map(_job, self.under_way) if job),
        )  # fmt: skip

    def begin(self, actions: Iterable[Action]) -> None:
        """Submit: everything is in flight."""
        for action in actions:
            match action:
                case Request(ref, verb):
                    instance = self.instances[ref]
                    assert instance.in_flight is None
                    landing(instance.status, verb)
                    self.instances[ref] = replace(instance, in_flight=InFlight(JOB, verb))
                case Create(pool, count):
                    for _ in range(count):
                        self.made += 1
                        ref = pool.instance(InstanceId(f"i-{0xA0000000 + self.made:08x}"))
                        at = NOW + timedelta(seconds=self.made)
                        flight = InFlight(JOB, Verb.START)
                        self.instances[ref] = Instance(ref, NODE, 3, Status.CREATED, at, in_flight=flight)
                case _:
                    self.under_way.append(action)

    def settle(self) -> None:
        """Everything that was in flight has ended."""
        for action in self.under_way:
            self._do(action)
        self.under_way = []
        for ref, instance in list(self.instances.items()):
            if instance.in_flight:
                self._end(ref, instance, instance.in_flight.verb)

    def usage(self, tenant: TenantId) -> Usage:
        shapes = {ref: pool.resources for ref, pool in self.pools.items() if ref.tenant == tenant}
        return usage_of(shapes, [i for i in self.instances.values() if i.ref.tenant == tenant])

    def of(self, pool: PoolRef) -> list[Instance]:
        return [i for i in self.instances.values() if i.ref.pool_ref == pool]

    def _end(self, ref: InstanceRef, instance: Instance, verb: Verb) -> None:
        lands = instance.lands_on
        after = instance.moved(lands)
        if instance.status is not Status.RUNNING or lands is not Status.RUNNING:
            self.unhealthy.discard(ref)
        if verb is Verb.START and instance.status not in (Status.WARM, Status.SLEEPING, Status.RUNNING):
            revision = self.pools[ref.pool_ref].revision
            assert revision is not None, "started without an image"
            after = replace(after, revision=revision, last_error=None)
            if revision in self.bad:
                after = replace(after, status=Status.STOPPED, last_error="its guest panicked")
        if lands is Status.DESTROYED:
            del self.instances[ref]
        else:
            self.instances[ref] = after

    def _do(self, action: Action) -> None:
        match action:
            case CreateTenant(tenant):
                assert tenant.id not in self.tenants
                self.tenants[tenant.id] = Tenant(tenant.id, tenant.network, tenant.quota, START)
            case UpdateTenant(tenant, _, quota):
                self.tenants[tenant] = replace(self.tenants[tenant], quota=quota)
            case CreatePool(wanted):
                assert wanted.ref not in self.pools
                assert wanted.ref.tenant in self.tenants
                self.pools[wanted.ref] = observed_pool(wanted)
            case UpdatePool(pool, changes):
                wanted = next(p for t in self.desired.tenants for p in t.pools if p.ref == pool)
                values = {change.name: getattr(wanted, change.name) for change in changes}
                self.pools[pool] = replace(self.pools[pool], **values)
            case Build(pool, source):
                self.pools[pool] = replace(self.pools[pool], revision=revision_of(source), built=source)
            case DestroyPool(pool):
                assert not self.of(pool)
                del self.pools[pool]
            case DestroyTenant(tenant):
                assert not [ref for ref in self.pools if ref.tenant == tenant]
                del self.tenants[tenant]


def _job(action: Action) -> tuple[JobVerb, str] | None:
    match action:
        case CreateTenant(tenant):
            return JobVerb.TENANT_CREATE, tenant.id
        case UpdateTenant(tenant):
            return JobVerb.TENANT_UPDATE, tenant
        case DestroyTenant(tenant):
            return JobVerb.TENANT_DESTROY, tenant
        case CreatePool(pool):
            return JobVerb.POOL_CREATE, str(pool.ref)
        case UpdatePool(pool):
            return JobVerb.POOL_UPDATE, str(pool)
        case Build(pool):
            return JobVerb.POOL_BUILD, str(pool)
        case DestroyPool(pool):
            return JobVerb.POOL_DESTROY, str(pool)
    return None
