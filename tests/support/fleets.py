"""Hypothesis strategies for desired states, and for worlds that meet them in any condition."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from ipaddress import IPv4Network

from hypothesis import strategies as st

from mvm.domain.addressing import TenantNetwork
from mvm.domain.desired import DesiredPool, DesiredState, DesiredTenant
from mvm.domain.ids import InstanceId, PoolId, PoolRef, Revision, TenantId
from mvm.domain.instance import InFlight, Instance
from mvm.domain.lifecycle import Status, allowed_verbs
from mvm.domain.pool import DesiredCounts, ImageSource, InstanceResources, SleepPolicy
from mvm.domain.tenant import Quota, Tenant
from tests.support.fleet_model import JOB, NOW, World, observed_pool, revision_of
from tests.support.make import NODE, START

SOURCES = [ImageSource("builtin:", profile) for profile in ("minimal", "python")]
OTHER = Revision("f" * 64)
UP = (Status.RUNNING, Status.WARM, Status.SLEEPING)
DOWN = (Status.CREATED, Status.READY, Status.STOPPED)

few = st.integers(0, 3)
counts = st.builds(DesiredCounts, st.integers(0, 5)) | st.builds(DesiredCounts, few, few, few)


@st.composite
def desired_pools(draw: st.DrawFn, ref: PoolRef) -> DesiredPool:
    return DesiredPool(
        ref, draw(st.sampled_from(SOURCES)), InstanceResources(data_disk_mib=draw(st.sampled_from([0, 8]))),
        desired=draw(st.none() | counts), sleep_policy=draw(st.sampled_from([SleepPolicy(), SleepPolicy(0, 0, 0)])),
        pinned=draw(st.integers(0, 5)) == 0, critical=draw(st.integers(0, 5)) == 0,
        max_unavailable=draw(st.integers(1, 3)),
    )  # fmt: skip


def network(net_id: int) -> TenantNetwork:
    return TenantNetwork(net_id, IPv4Network((0x0AF00000 + (net_id << 8), 24)))


@st.composite
def desired_states(draw: st.DrawFn) -> DesiredState:
    """Of tenants ``a`` and ``b`` with pools ``p`` and ``q``."""
    tenants = []
    for net_id, name in enumerate(draw(st.sets(st.sampled_from("ab")))):
        tenant = TenantId(name)
        refs = [PoolRef(tenant, PoolId(pool)) for pool in sorted(draw(st.sets(st.sampled_from("pq"))))]
        pools = tuple(draw(desired_pools(ref)) for ref in refs)
        tenants.append(DesiredTenant(tenant, network(net_id), Quota(max_running=draw(st.integers(20, 30))), pools))
    prune = st.booleans()
    return DesiredState(NODE, tuple(tenants), prune_unknown_tenants=draw(prune), prune_unknown_pools=draw(prune))


@st.composite
def worlds(draw: st.DrawFn, *, busy: bool = True, held: bool = True) -> World:
    """A node in any condition, and a document for it; `busy`: jobs are under way, `held`: persons have changed some."""
    desired = draw(desired_states())
    world = World(desired)
    unlisted = DesiredTenant(TenantId("zed"), network(9))
    for wanted in (*desired.tenants, unlisted):
        if draw(st.integers(0, 3)) == 0:
            continue
        quota = draw(st.sampled_from([wanted.quota, Quota()]))
        world.tenants[wanted.id] = Tenant(wanted.id, wanted.network, quota, START)
        extra = draw(desired_pools(PoolRef(wanted.id, PoolId("extra"))))
        for pool in (*wanted.pools, extra):
            if draw(st.integers(0, 3)):
                draw(_fill(world, pool, busy, held))
    return world


@st.composite
def _fill(draw: st.DrawFn, world: World, wanted: DesiredPool, busy: bool, held: bool) -> None:
    source = draw(st.sampled_from([wanted.source, *SOURCES]))
    revision = draw(st.sampled_from([None, revision_of(source), revision_of(source)]))
    known = observed_pool(wanted, revision, source=source, built=source if revision else None)
    if draw(st.booleans()):
        known = replace(known, desired=draw(counts))
    world.pools[known.ref] = known
    for number in range(draw(st.integers(0, 6))):
        status = draw(st.sampled_from(UP if revision and draw(st.booleans()) else DOWN))
        ref = known.ref.instance(InstanceId(f"i-{number:08x}"))
        flight = draw(st.sampled_from(allowed_verbs(status))) if busy and draw(st.integers(0, 3)) == 0 else None
        world.instances[ref] = Instance(
            ref, NODE, 3 + number, status, START - timedelta(seconds=draw(st.integers(0, 9))),
            revision=draw(st.sampled_from([revision, revision, OTHER])) if revision else None,
            in_flight=InFlight(JOB, flight) if flight and (revision or flight == "destroy") else None,
            last_error="it crashed" if status in DOWN and draw(st.integers(0, 9)) == 0 else None,
            manual_override_until=NOW + timedelta(1) if held and draw(st.integers(0, 7)) == 0 else None,
        )  # fmt: skip
        if status is Status.RUNNING and draw(st.integers(0, 5)) == 0:
            world.unhealthy.add(ref)
