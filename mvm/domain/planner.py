"""What to do so that a node has what was asked of it. Pure: values in, values out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import Any

from mvm.domain.actions import (
    Action,
    Build,
    Change,
    CreatePool,
    CreateTenant,
    DestroyPool,
    DestroyTenant,
    Errand,
    Request,
    UpdatePool,
    UpdateTenant,
    Why,
    ordered,
    plain,
)  # fmt: skip
from mvm.domain.desired import DesiredPool, DesiredState, DesiredTenant
from mvm.domain.document import Problem
from mvm.domain.egress import Egress
from mvm.domain.ids import InstanceRef, PoolRef, TenantId
from mvm.domain.instance import Instance
from mvm.domain.job import JobVerb
from mvm.domain.lifecycle import Status, Verb
from mvm.domain.passes import Rest, coming, without_rests
from mvm.domain.pool import DesiredCounts, InstanceResources, WorkerPool
from mvm.domain.remarks import Cause, Remark, told
from mvm.domain.room import Room
from mvm.domain.scaling import PoolNeed, revived, scale
from mvm.domain.tenant import Tenant
from mvm.domain.vmm import OnExit
from mvm.errors import NotAllowed

_CHANGEABLE = tuple(
    name for name in (f.name for f in fields(DesiredPool))
    if name in {f.name for f in fields(WorkerPool)} - {"ref", "resources"}
)  # fmt: skip
"""What a document says of a pool that a pool has, and that can be changed."""


@dataclass(frozen=True, slots=True)
class Observed:
    """What a node has. Instances have their queued jobs marked as in flight.

    `jobs` are those that are queued or run for tenants and pools: what is changing is left alone until it has changed.
    `unhealthy` are instances, running or warm, whose guests are not well; `sleepless` cannot
    be put to sleep in the run that they are in; `unproven` ones have a new revision, and no health check has found them
    well yet (see `scaling.proving`).

    The rest is what has to be there before some things can be done: an uplink for egress; `host_mib` of memory (None:
    not known) for one instance; room on the disk to build an image; and `reserved`, the tenants that the cluster knows,
    with `net_ids`, which were ever given, for a new tenant's network.

    `resting` is what has failed and is not to be asked for yet.
    """

    now: datetime
    tenants: tuple[Tenant, ...] = ()
    pools: tuple[WorkerPool, ...] = ()
    instances: tuple[Instance, ...] = ()
    jobs: frozenset[tuple[JobVerb, str]] = frozenset()
    unhealthy: frozenset[InstanceRef] = frozenset()
    sleepless: frozenset[InstanceRef] = frozenset()
    unproven: frozenset[InstanceRef] = frozenset()
    uplink: bool = True
    host_mib: int | None = None
    can_build: bool = True
    reserved: tuple[Tenant, ...] = ()
    net_ids: frozenset[int] = frozenset()
    resting: Mapping[Errand, Rest] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The actions, what keeps tenants and pools from what is asked of them, and how many a rollout (see
    `scaling.Scaled`) has still to come to.

    Every pool that is not at its counts has a remark, be it that the actions lead there.
    """

    actions: tuple[Action, ...] = ()
    remarks: tuple[Remark, ...] = ()
    rolling: int = 0

    @property
    def news(self) -> tuple[Remark, ...]:
        """What people should know: not that work takes its time."""
        return told(self.remarks)


def plan(desired: DesiredState, observed: Observed) -> tuple[Action, ...]:
    """Actions that move `observed` toward `desired`, in the order of `actions.rank`. Empty means converged."""
    return decide(desired, observed).actions


def decide(desired: DesiredState, observed: Observed) -> Outcome:
    """`plan`, with remarks.

    The whole way is told, though only `actions.ready` can be done at once. Pools that the document does not list
    keep the counts to which they were scaled by hand, unless it says that they be destroyed.
    """
    return _Planning(desired, observed).decide()


@dataclass(slots=True)
class _Planning:
    desired: DesiredState
    observed: Observed
    actions: list[Action] = field(default_factory=list)
    remarks: list[Remark] = field(default_factory=list)
    rolling: int = 0
    tenants: dict[TenantId, Tenant] = field(default_factory=dict)
    pools: dict[TenantId, dict[PoolRef, WorkerPool]] = field(default_factory=lambda: defaultdict(dict))
    instances: dict[PoolRef, list[Instance]] = field(default_factory=lambda: defaultdict(list))
    jobs: dict[str, set[JobVerb]] = field(default_factory=lambda: defaultdict(set))

    def decide(self) -> Outcome:
        self._index()
        listed = {tenant.id for tenant in self.desired.tenants}
        for wanted in self.desired.tenants:
            self._listed_tenant(wanted)
        for known in self.tenants.values():
            if known.id not in listed and self.jobs.get(known.id):
                self._wait_for(known.id, [(pool.ref, pool.desired) for pool in self.pools[known.id].values()])
            elif known.id not in listed:
                room = self._room(known, known)
                if self.desired.prune_unknown_tenants:
                    self._prune_tenant(known, room)
                else:
                    for pool in self.pools[known.id].values():
                        self._unlisted_pool(pool, room)
        actions, failed = without_rests(ordered(self.actions), self.observed.resting)
        return Outcome(actions, (*failed, *self.remarks, *coming(actions)), self.rolling)

    def _index(self) -> None:
        for tenant in sorted(self.observed.tenants, key=lambda t: t.id):
            self.tenants[tenant.id] = tenant
        for pool in sorted(self.observed.pools, key=lambda p: p.ref):
            self.pools[pool.ref.tenant][pool.ref] = pool
        for instance in sorted(self.observed.instances, key=lambda i: (i.created_at, i.ref)):
            self.instances[instance.ref.pool_ref].append(instance)
        for verb, subject in self.observed.jobs:
            self.jobs[subject].add(verb)

    def _room(self, tenant: Tenant | DesiredTenant, known: Tenant | None) -> Room:
        shapes = {ref: pool.resources for ref, pool in self.pools[tenant.id].items()} if known else {}
        there = [instance for ref in shapes for instance in self.instances[ref]]
        return Room.of(tenant.quota, tenant.network, shapes, there, host_mib=self.observed.host_mib)

    def _remark(self, subject: TenantId | PoolRef, cause: Cause, count: int = 0, detail: str = "") -> None:
        self.remarks.append(Remark(subject, cause, count, detail=detail))

    def _wait_for(self, tenant: TenantId, pools: Sequence[tuple[PoolRef, DesiredCounts | None]]) -> None:
        """A job of the tenant comes first."""
        self._remark(tenant, Cause.UNDER_WAY)
        for ref, counts in pools:
            if counts and counts.total:
                self._remark(ref, Cause.UNDER_WAY)

    def _listed_tenant(self, wanted: DesiredTenant) -> None:
        if self.jobs.get(wanted.id):
            self._wait_for(wanted.id, [(pool.ref, pool.desired) for pool in wanted.pools])
            return
        known = self.tenants.get(wanted.id)
        if known is None and (taken := self._network_taken(wanted)):
            self._remark(wanted.id, Cause.NETWORK, detail=taken)
            for pool in wanted.pools:
                self._remark(pool.ref, Cause.NETWORK, _total(pool.desired), detail=taken)
            return
        if known is None:
            self.actions.append(CreateTenant(wanted))
        elif known.quota != wanted.quota:
            self.actions.append(UpdateTenant(wanted.id, known.quota, wanted.quota))
        room = self._room(wanted, known)
        for pool in wanted.pools:
            self._listed_pool(pool, self.pools[wanted.id].get(pool.ref), room)
        listed = {pool.ref for pool in wanted.pools}
        for unlisted in [pool for ref, pool in self.pools[wanted.id].items() if ref not in listed]:
            if self.desired.prune_unknown_pools and not wanted.pinned:
                self._prune_pool(unlisted, room)
            else:
                self._unlisted_pool(unlisted, room)

    def _network_taken(self, wanted: DesiredTenant) -> str:
        """Why a tenant with this network cannot be made in this cluster; empty if it can."""
        network = wanted.network
        for other in self.observed.reserved:
            if other.id == wanted.id and other.network == network:
                return ""  # it is adopted
            if other.id == wanted.id:
                return f"tenant {other.id} has net id {other.network.net_id} and {other.network.subnet} elsewhere"
        for other in self.observed.reserved:
            if other.network.subnet.overlaps(network.subnet):
                return f"tenant {other.id} has {other.network.subnet}"
        if network.net_id in self.observed.net_ids:
            return f"net id {network.net_id} was given before, and none is given twice"
        return ""

    def _listed_pool(self, wanted: DesiredPool, known: WorkerPool | None, room: Room) -> None:
        jobs = self.jobs.get(str(wanted.ref), set())
        counts = wanted.desired or (known.desired if known else None)
        if jobs - {JobVerb.POOL_BUILD}:
            self._remark(wanted.ref, Cause.UNDER_WAY)
            return
        if known is None:
            if not self._can_be_created(wanted, room):
                return
            self.actions.append(CreatePool(wanted))
        else:
            self._change(wanted, known)
        first = known is None or known.revision is None
        outdated = known is None or first or (known.built or known.source) != wanted.source
        if jobs and first:
            self._remark(wanted.ref, Cause.UNDER_WAY)
        built = jobs or not outdated or self._can_be_built(wanted, first)
        if first and not built:
            return
        if first and jobs:
            return
        if counts is None:
            self._revive(known, wanted.on_exit, room)
            return
        most_down = 0 if outdated else wanted.max_unavailable  # nothing stops for an image not asked for
        self._scale(PoolNeed.of(wanted, counts, known, max_unavailable=most_down), room)

    def _can_be_created(self, wanted: DesiredPool, room: Room) -> bool:
        """Whether what has to be there for a new pool is; what is not is told."""
        if not self._has_uplink(wanted):
            self._remark(wanted.ref, Cause.NO_UPLINK, _total(wanted.desired), "not created")
            return False
        limit = room.too_large(wanted.resources) or (None if room.add_pool() else room.lack.limit)
        if limit:
            self.remarks.append(
                Remark(
                    wanted.ref,
                    Cause.POOL_QUOTA,
                    _total(wanted.desired),
                    limit=limit,
                )
            )
        return limit is None

    def _has_uplink(self, wanted: DesiredPool) -> bool:
        return self.observed.uplink or wanted.egress.kind is Egress.NONE

    def _change(self, wanted: DesiredPool, known: WorkerPool) -> None:
        changes = tuple(
            Change(name, plain(before), plain(after))
            for name in _CHANGEABLE
            if (before := getattr(known, name)) != (after := getattr(wanted, name))
            and not (name == "desired" and after is None)
        )
        if not self._has_uplink(wanted) and any(change.name == "egress" for change in changes):
            self._remark(wanted.ref, Cause.NO_UPLINK, detail="its egress is not changed")
            changes = tuple(change for change in changes if change.name != "egress")
        if changes:
            self.actions.append(UpdatePool(wanted.ref, changes))

    def _can_be_built(self, wanted: DesiredPool, first: bool) -> bool:
        """Whether its image is to be built; what is in the way is told."""
        if not self.observed.can_build:
            self._remark(wanted.ref, Cause.DISK, _total(wanted.desired) if first else 0)
            return False
        self.actions.append(Build(wanted.ref, wanted.source, first))
        self._announce(wanted)
        return True

    def _announce(self, wanted: DesiredPool) -> None:
        """What a new image will do to what is up."""
        up = sum(each.status.is_up for each in self.instances.get(wanted.ref, ()))
        if up and not (wanted.pinned or wanted.critical):
            self._remark(wanted.ref, Cause.RESTART, up, f"at most {wanted.max_unavailable} down at once")

    def _unlisted_pool(self, pool: WorkerPool, room: Room) -> None:
        """It was made by hand: it keeps to its count, and an image is built when somebody asks for it."""
        jobs = self.jobs.get(str(pool.ref), set())
        if pool.desired is None:
            if not jobs - {JobVerb.POOL_BUILD}:
                self._revive(pool, pool.on_exit, room)
            return
        if jobs - {JobVerb.POOL_BUILD} or (jobs and pool.revision is None):
            self._remark(pool.ref, Cause.UNDER_WAY)
            return
        if pool.revision is None:
            if pool.desired.total:
                self._remark(pool.ref, Cause.NO_IMAGE, pool.desired.total)
            return
        self._scale(PoolNeed.of(pool, pool.desired, pool), room)

    def _revive(self, pool: WorkerPool | None, on_exit: OnExit, room: Room) -> None:
        """Of a pool that was never scaled, only those start again that rebooted."""
        if pool is not None and on_exit is OnExit.RESTART:
            there = self.instances.get(pool.ref, ())
            self.actions += revived(there, pool.resources, room, now=self.observed.now)

    def _scale(self, need: PoolNeed, room: Room) -> None:
        scaled = scale(
            need, self.instances.get(need.ref, ()), room, now=self.observed.now, unhealthy=self.observed.unhealthy,
            sleepless=self.observed.sleepless, unproven=self.observed.unproven,
        )  # fmt: skip
        self.actions += scaled.actions
        self.rolling += scaled.rolling
        self.remarks += scaled.remarks

    def _prune_tenant(self, tenant: Tenant, room: Room) -> None:
        gone = [self._prune_pool(pool, room) for pool in self.pools[tenant.id].values()]
        if all(gone):
            self.actions.append(DestroyTenant(tenant.id))

    def _prune_pool(self, pool: WorkerPool, room: Room) -> bool:
        """Whether it goes with what is planned: not while something in it is under way.

        One that may not be touched stays, and is kept as any other pool that the document does not list.
        """
        if self.jobs.get(str(pool.ref)):
            self._remark(pool.ref, Cause.UNDER_WAY)
            return False
        there = self.instances.get(pool.ref, [])
        if why := self._kept_for(pool, there):
            self._remark(pool.ref, Cause.NOT_PRUNED, detail=why)
            self._unlisted_pool(pool, room)
            return False
        self.actions += [
            Request(i.ref, Verb.DESTROY, i.status, Why.UNLISTED)
            for i in sorted(there, key=lambda i: i.ref)
            if i.in_flight is None and i.status is not Status.DESTROYED
        ]
        if any(i.in_flight for i in there):
            self._remark(pool.ref, Cause.UNDER_WAY)
            return False
        self.actions.append(DestroyPool(pool.ref))
        return True

    def _kept_for(self, pool: WorkerPool, there: Sequence[Instance]) -> str | None:
        if pool.pinned or pool.critical:
            return f"it is {'pinned' if pool.pinned else 'critical'}"
        held = [i for i in there if i.held_until(self.observed.now, pool.scaled_at)]
        return f"a person has changed {held[0].ref}" if held else None


def _total(counts: DesiredCounts | None) -> int:
    return counts.total if counts else 0


def as_parameters(pool: DesiredPool) -> dict[str, Any]:
    """What can be changed of a pool, as JSON values."""
    return {name: plain(getattr(pool, name)) for name in _CHANGEABLE if name != "source"}


def check_possible(desired: DesiredState, observed: Observed) -> None:
    """Raises `NotAllowed` (``desired.conflict``) that tells everything in which the document asks what cannot be done.

    A tenant's network and a pool's shape are never changed, and no two tenants share a net id or an address.
    """
    problems: list[Problem] = []
    tenants = {tenant.id: tenant for tenant in observed.tenants}
    pools = {pool.ref: pool for pool in observed.pools}
    listed = {tenant.id for tenant in desired.tenants}
    others = [tenant for tenant in observed.tenants if tenant.id not in listed]
    for at, wanted in enumerate(desired.tenants):
        path, known = f"$.tenants[{at}]", tenants.get(wanted.id)
        if known and known.network != wanted.network:
            has = f"net id {known.network.net_id} and {known.network.subnet}"
            problems.append(Problem(f"{path}.network", f"tenant {wanted.id} has {has} already, and keeps them"))
        for other in [] if known else others:
            if other.network.net_id == wanted.network.net_id:
                problems.append(Problem(f"{path}.network.tenant_net_id", f"tenant {other.id} has it"))
            if other.network.subnet.overlaps(wanted.network.subnet):
                problems.append(Problem(f"{path}.network.ipv4_subnet", f"tenant {other.id} has {other.network.subnet}"))
        for place, pool in enumerate(wanted.pools):
            there = pools.get(pool.ref)
            if there and there.resources != pool.resources:
                problems.append(Problem(
                    f"{path}.pools[{place}].instance_resources",
                    f"pool {pool.ref} has {_shape(there.resources)} already, and keeps them: make another pool",
                ))  # fmt: skip
    if problems:
        raise NotAllowed(
            "desired.conflict", "\n  ".join(["the desired state cannot be had here:", *map(str, problems)]),
            hint="nothing was changed", errors=[{"path": p.path, "message": p.message} for p in problems],
        )  # fmt: skip


def _shape(shape: InstanceResources) -> str:
    disk = f" and a data disk of {shape.data_disk_mib} MiB" if shape.data_disk_mib else ""
    return f"{shape.vcpus} vCPUs, {shape.mem_mib} MiB{disk}"
