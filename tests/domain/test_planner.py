"""The plan of a whole node: properties over worlds in any condition, then examples."""

from __future__ import annotations

from dataclasses import asdict, replace
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvm.domain.actions import (
    Build,
    Change,
    Create,
    CreatePool,
    CreateTenant,
    DestroyPool,
    DestroyTenant,
    Request,
    UpdatePool,
    UpdateTenant,
    Why,
    errand,
    rank,
    ready,
    scope,
)  # fmt: skip
from mvm.domain.desired import DesiredPool, DesiredState, DesiredTenant
from mvm.domain.egress import NO_EGRESS, Egress, EgressPolicy
from mvm.domain.ids import PoolId, PoolRef, TenantId
from mvm.domain.instance import Instance
from mvm.domain.job import JobVerb
from mvm.domain.lifecycle import Status, Verb
from mvm.domain.passes import Rest, begun
from mvm.domain.planner import Outcome, check_possible, decide, plan
from mvm.domain.pool import DesiredCounts, InstanceResources, SeccompPolicy, SleepPolicy, WorkerPool
from mvm.domain.remarks import Cause, Failure, Remark
from mvm.domain.room import Room
from mvm.domain.tenant import Quota, Tenant
from mvm.errors import NotAllowed
from tests.support.fleet_model import World, observed_pool, revision_of
from tests.support.fleets import SOURCES, UP, network, worlds
from tests.support.make import ACME, NODE, START, WEB, instance_ref

S, V = Status, Verb
ROUNDS = 40


def settled(world: World, rounds: int = ROUNDS) -> int:
    """Plan, submit what is ready, let it end, until there is nothing to do; how many rounds that took."""
    for done in range(rounds):
        actions = plan(world.desired, world.observed())
        if not actions and not world.under_way and not any(i.in_flight for i in world.instances.values()):
            return done
        world.begin(ready(actions))
        world.settle()
    raise AssertionError(f"still to do: {plan(world.desired, world.observed())}")


@given(worlds())
def test_it_converges_in_bounded_rounds(world: World) -> None:
    settled(world)
    assert world.unhealthy <= {i.ref for i in world.instances.values() if _spared(world, i)}
    for tenant in world.desired.tenants:
        assert world.tenants[tenant.id].quota == tenant.quota
        for pool in tenant.pools:
            known, there = world.pools[pool.ref], world.of(pool.ref)
            assert known.source == known.built == pool.source
            if pool.desired and not (pool.pinned or pool.critical or any(_spared(world, i) for i in there)):
                assert _has_counts(pool.desired, there)
                if not any(i.last_error for i in there):
                    assert {i.revision for i in there if i.status in UP} <= {known.revision}
    listed = {pool.ref for tenant in world.desired.tenants for pool in tenant.pools}
    for ref, pool in world.pools.items():
        if ref not in listed and pool.desired and not any(_spared(world, i) for i in world.of(ref)):
            assert pool.revision is None or pool.pinned or pool.critical or _has_counts(pool.desired, world.of(ref))


def _spared(world: World, instance: Instance) -> bool:
    pool = world.pools[instance.ref.pool_ref]
    unscaled = pool.desired is None or pool.revision is None
    return unscaled or pool.pinned or pool.critical or instance.manual_override_until is not None


def _has_counts(wanted: DesiredCounts, there: list[Instance]) -> bool:
    found = [sum(i.status is status for i in there) for status in UP]
    return found == [wanted.running, wanted.warm, wanted.sleeping] if wanted.exact else sum(found) == wanted.running


@given(worlds())
def test_a_second_pass_with_everything_in_flight_adds_nothing(world: World) -> None:
    for _ in range(4):
        actions = plan(world.desired, world.observed())
        world.begin(ready(actions))
        assert plan(world.desired, world.observed()) == ()
        world.settle()


@given(worlds(), st.integers(0))
def test_what_rests_is_a_remark_and_nothing_that_needs_it_is_asked_for(world: World, number: int) -> None:
    seen = world.observed()
    whole = plan(world.desired, seen)
    fallible = [action for action in whole if not isinstance(action, Create)]
    resting = {errand(each): Rest("vmm.failed", seen.now) for n, each in enumerate(fallible) if number >> n & 1}
    outcome = decide(world.desired, replace(seen, resting=resting))
    assert set(map(errand, outcome.actions)).isdisjoint(resting)
    assert [action for action in whole if action in outcome.actions] == list(outcome.actions)
    assert set(map(errand, ready(outcome.actions))) <= set(map(errand, ready(whole)))
    failed = [remark for remark in outcome.remarks if remark.cause is Cause.FAILED]
    assert {(each.failure.verb, each.failure.subject) for each in failed if each.failure} == set(resting)
    named = {remark.subject for remark in outcome.remarks if remark.count}
    for action in whole:
        if isinstance(action, Create | Request):
            assert scope(action) in named, "it is told, whether it is asked for or not"
    if not resting:
        assert outcome == decide(world.desired, seen)


def test_nobody_is_asked_for_in_a_pool_whose_making_has_failed() -> None:
    empty, until = World(STATE).observed(), START + timedelta(seconds=30)
    failure = Failure(JobVerb.TENANT_CREATE, "acme", "network.failed")
    resting = {(JobVerb.TENANT_CREATE, "acme"): Rest("network.failed", until)}
    assert decide(STATE, replace(empty, resting=resting)) == Outcome(
        (),
        (
            Remark(ACME, Cause.FAILED, until=until, failure=failure),
            Remark(WEB, Cause.FAILED, 2, until=until, failure=failure),
        ),
    )


def test_what_a_pass_has_asked_for_is_under_way() -> None:
    one, two, three = (instance_ref(n) for n in range(3))
    remarks = (Remark(WEB, Cause.UNDER_WAY, 1, (three,)), Remark(WEB, Cause.NEXT_PASS, 3, (one,)))
    tried = (Request(one, V.START, S.STOPPED, Why.TOO_FEW), Create(WEB, 2))
    assert begun(remarks, tried, [one, two]) == (Remark(WEB, Cause.UNDER_WAY, 3, (one, two, three)),)
    assert begun(remarks[1:], tried[1:], []) == (), "what was refused has a remark of its own"
    assert begun(remarks, (), []) == remarks
    (gone,) = begun((Remark(WEB, Cause.NEXT_PASS),), (DestroyPool(WEB),), [])
    assert (str(gone), remarks[0].cause) == ("acme/web: a job is under way", gone.cause)
    assert Remark(WEB, Cause.NEXT_PASS).text == "the next pass destroys it"


@given(worlds())
def test_no_quota_is_breached_at_any_moment(world: World) -> None:
    for _ in range(6):
        before = {tenant: asdict(world.usage(tenant)) for tenant in world.tenants}
        world.begin(ready(plan(world.desired, world.observed())))
        for tenant in world.tenants.values():
            wanted = next((t.quota for t in world.desired.tenants if t.id == tenant.id), tenant.quota)
            assert_within(wanted, asdict(world.usage(tenant.id)), before[tenant.id])
        world.settle()


def assert_within(quota: Quota, used: dict[str, int], before: dict[str, int]) -> None:
    limits = {
        "running": quota.max_running, "warm": quota.max_warm, "vcpus": quota.max_vcpus, "mem_mib": quota.max_mem_mib,
        "disk_mib": quota.max_disk_gib * 1024,
    }  # fmt: skip
    for name, limit in limits.items():
        assert used[name] <= max(limit, before[name]), name


@given(worlds())
def test_what_is_protected_is_left_alone(world: World) -> None:
    wanted = {pool.ref: pool for tenant in world.desired.tenants for pool in tenant.pools}
    for action in plan(world.desired, world.observed()):
        if isinstance(action, Request):
            instance, pool = world.instances[action.ref], world.pools[action.ref.pool_ref]
            rules = wanted.get(pool.ref, pool)
            assert instance.manual_override_until is None
            assert instance.in_flight is None
            fallen = action.status in (S.CREATED, S.READY) or instance.last_error is not None
            assert not rules.critical or (action.verb is V.START and fallen)
            assert not rules.pinned or action.verb in (V.START, V.WAKE)
        if isinstance(action, DestroyPool):
            assert not world.pools[action.pool].pinned
            assert not world.pools[action.pool].critical


@given(worlds())
def test_the_order_holds_and_each_instance_is_asked_once(world: World) -> None:
    actions = plan(world.desired, world.observed())
    assert [rank(action) for action in actions] == sorted(rank(action) for action in actions)
    asked = [action.ref for action in actions if isinstance(action, Request)]
    assert len(asked) == len(set(asked))


@given(worlds())
def test_nothing_is_destroyed_unless_the_document_says_so(world: World) -> None:
    world.desired = replace(world.desired, prune_unknown_tenants=False, prune_unknown_pools=False)
    kept = {ref for ref, i in world.instances.items() if i.lands_on is not S.DESTROYED}
    settled(world)
    assert kept <= set(world.instances)


@given(worlds(busy=False, held=False))
def test_pruning_leaves_what_is_listed_and_what_is_protected(world: World) -> None:
    world.desired = replace(world.desired, prune_unknown_tenants=True, prune_unknown_pools=True)
    settled(world)
    listed = {pool.ref for tenant in world.desired.tenants for pool in tenant.pools}
    assert all(pool.pinned or pool.critical for ref, pool in world.pools.items() if ref not in listed)


@given(worlds())
def test_the_order_of_what_is_observed_does_not_matter(world: World) -> None:
    seen = world.observed()
    turned = replace(seen, tenants=seen.tenants[::-1], pools=seen.pools[::-1], instances=seen.instances[::-1])
    assert decide(world.desired, turned) == decide(world.desired, seen)


@given(worlds())
def test_what_is_ready_never_waits_for_another(world: World) -> None:
    actions = plan(world.desired, world.observed())
    now = ready(actions)
    assert bool(now) == bool(actions)
    made = {scope(action) for action in now if isinstance(action, CreateTenant | CreatePool)}
    for action in now:
        if isinstance(action, CreatePool | Build | Create | Request):
            pool = scope(action)
            assert isinstance(pool, PoolRef)
            assert pool.tenant in world.tenants
            assert isinstance(action, CreatePool) or pool not in made


# --- by example

POOL = DesiredPool(WEB, SOURCES[0], desired=DesiredCounts(2))
TENANT = DesiredTenant(ACME, network(1), pools=(POOL,))
STATE = DesiredState(NODE, (TENANT,))
REVISION = revision_of(SOURCES[0])


def world(state: DesiredState = STATE, running: int = 2) -> World:
    made = World(state, {ACME: Tenant(ACME, network(1), Quota(), START)}, {WEB: observed_pool(POOL, REVISION)})
    for number in range(running):
        ref = instance_ref(number)
        made.instances[ref] = Instance(ref, NODE, 3 + number, S.RUNNING, START, revision=REVISION)
    return made


def with_pool(**changes: object) -> DesiredState:
    return replace(STATE, tenants=(replace(TENANT, pools=(replace(POOL, **changes),)),))  # type: ignore[arg-type]


def test_all_the_way_from_nothing_is_told_and_only_the_beginning_is_ready() -> None:
    empty = World(STATE)
    actions = plan(STATE, empty.observed())
    assert actions == (CreateTenant(TENANT), CreatePool(POOL), Build(WEB, SOURCES[0], first=True), Create(WEB, 2))
    assert ready(actions) == actions[:1]
    assert settled(empty) == 4


def test_nothing_to_do() -> None:
    assert plan(STATE, world().observed()) == ()


def test_a_quota_is_updated_before_anything_else_of_its_tenant() -> None:
    state = replace(STATE, tenants=(replace(TENANT, quota=Quota(max_running=3)),))
    actions = plan(state, world(running=0).observed())
    assert actions == (UpdateTenant(ACME, Quota(), Quota(max_running=3)), Create(WEB, 2))
    assert ready(actions) == actions[:1]


def test_an_image_is_built_when_the_profile_changes_and_then_rolled_through_the_pool() -> None:
    state = with_pool(source=SOURCES[1])
    there = world(state)
    change = Change("source", asdict(SOURCES[0]), asdict(SOURCES[1]))
    actions = plan(state, there.observed())
    assert actions == (UpdatePool(WEB, (change,)), Build(WEB, SOURCES[1], first=False))
    there.begin(ready(actions))
    there.settle()
    assert plan(state, there.observed()) == (Build(WEB, SOURCES[1], first=False),)
    there.begin(plan(state, there.observed()))
    there.settle()
    down = []
    for _ in range(8):
        there.begin(ready(plan(state, there.observed())))
        down.append(sum(i.lands_on is not S.RUNNING for i in there.of(WEB)))
        there.settle()
    assert max(down) == 1
    assert {i.revision for i in there.of(WEB)} == {revision_of(SOURCES[1])}
    assert len(there.of(WEB)) == 2


def test_rules_that_change_are_updated_and_nothing_else_is_done() -> None:
    state = with_pool(seccomp_policy=SeccompPolicy.STRICT, sleep_policy=SleepPolicy(0, 0, 0))
    before, after = asdict(SleepPolicy()), {"warm_after_s": 0, "sleep_after_s": 0, "min_running_s": 0}
    changes = (Change("sleep_policy", before, after), Change("seccomp_policy", "baseline", "strict"))
    assert plan(state, world(state).observed()) == (UpdatePool(WEB, changes),)


def test_nothing_is_rolled_to_a_revision_that_is_not_asked_for_any_more() -> None:
    """The document goes back in the middle of a rollout, and its image takes its time."""
    there = world()
    python = SOURCES[1]
    there.pools[WEB] = replace(there.pools[WEB], revision=revision_of(python), built=python)
    assert [type(action) for action in plan(there.desired, there.observed())] == [Build]
    building = replace(there.observed(), jobs=frozenset({(JobVerb.POOL_BUILD, str(WEB))}))
    assert plan(there.desired, building) == ()


def test_a_rollout_halts_when_a_new_one_is_not_well() -> None:
    state = with_pool(source=SOURCES[1], desired=DesiredCounts(4))
    there = world(state, running=4)
    there.bad = frozenset({revision_of(SOURCES[1])})
    for _ in range(12):
        there.begin(ready(plan(state, there.observed())))
        there.settle()
    assert sum(i.status is S.RUNNING and i.revision == REVISION for i in there.of(WEB)) == 3
    assert decide(state, there.observed()).news == (Remark(WEB, Cause.NOT_WELL, 3, (instance_ref(0),)),)


def test_one_that_is_not_well_is_stopped_and_started_again() -> None:
    there = world()
    there.unhealthy.add(instance_ref(1))
    assert plan(STATE, there.observed()) == (Request(instance_ref(1), V.STOP, S.RUNNING, Why.UNHEALTHY),)
    there.begin(plan(STATE, there.observed()))
    there.settle()
    assert plan(STATE, there.observed()) == (Request(instance_ref(1), V.START, S.STOPPED, Why.TOO_FEW),)


def test_a_tenant_is_pruned_from_the_inside_out() -> None:
    state = DesiredState(NODE, prune_unknown_tenants=True)
    there = world(state)
    actions = plan(state, there.observed())
    assert actions == (
        *(Request(instance_ref(n), V.DESTROY, S.RUNNING, Why.UNLISTED) for n in range(2)),
        DestroyPool(WEB), DestroyTenant(ACME),
    )  # fmt: skip
    assert ready(actions) == actions[:2]
    settled(there)
    assert not there.tenants


@pytest.mark.parametrize("pinned", [True, False])
def test_what_is_not_pruned_after_all_is_kept_up(pinned: bool) -> None:
    """After a reboot a pinned pool that the document does not list comes back all the same."""
    state = DesiredState(NODE, prune_unknown_tenants=True)
    there = world(state)
    down, held = there.instances[instance_ref(0)], there.instances[instance_ref(1)]
    there.pools[WEB] = replace(there.pools[WEB], pinned=pinned)
    there.instances[down.ref] = replace(down, status=S.STOPPED)
    if not pinned:
        there.instances[held.ref] = replace(held, manual_override_until=START + timedelta(1))
    outcome = decide(state, there.observed())
    assert outcome.actions == (Request(down.ref, V.START, S.STOPPED, Why.TOO_FEW),)
    why = "it is pinned" if pinned else f"a person has changed {held.ref}"
    stays = Remark(WEB, Cause.NOT_PRUNED, detail=why)
    assert [remark for remark in outcome.news if remark.cause is not Cause.HELD] == [stays]


def test_more_than_the_quota_is_not_planned_and_told() -> None:
    there = world(running=0)
    quota = Quota(max_running=1)
    there.tenants[ACME] = replace(there.tenants[ACME], quota=quota)
    state = replace(STATE, tenants=(replace(TENANT, quota=quota),))
    outcome = decide(state, there.observed())
    assert outcome.actions == (Create(WEB, 1),)
    assert outcome.news == (Remark(WEB, Cause.QUOTA, 1, limit="max_running"),)
    assert str(outcome.news[0]) == "acme/web: 1 more cannot be had: no room in the tenant's quota (max_running)"


@given(worlds())
def test_a_pool_that_is_not_at_its_counts_says_why(world: World) -> None:
    for _ in range(6):
        outcome = decide(world.desired, world.observed())
        named = {remark.subject for remark in outcome.remarks if remark.cause.counts}
        listed = {pool.ref: pool for tenant in world.desired.tenants for pool in tenant.pools}
        for ref in (listed.keys() | world.pools.keys()) - named:
            known = world.pools.get(ref)
            counts = (listed[ref].desired if ref in listed else None) or (known.desired if known else None)
            there = world.of(ref)
            assert counts is None or _is_as_it_should(counts, there, known), f"{ref} has no reason"
        world.begin(ready(outcome.actions))
        world.settle()


def _is_as_it_should(counts: DesiredCounts, there: list[Instance], known: WorkerPool | None) -> bool:
    up = sum(i.status in UP and i.lands_on in UP for i in there)
    pruned = known is not None and any(i.lands_on is S.DESTROYED for i in there)
    return up == counts.total or pruned


NAT = EgressPolicy(Egress.NAT)


def test_what_a_pool_needs_of_the_node_is_looked_at_before_it_is_made() -> None:
    there = World(STATE, {ACME: Tenant(ACME, network(1), Quota(), START)})
    outside = with_pool(egress=NAT)
    nothing = replace(there.observed(), uplink=False)
    blocked = decide(outside, nothing)
    assert blocked == Outcome((), (Remark(WEB, Cause.NO_UPLINK, 2, detail="not created"),))
    assert blocked.news[0].text.startswith("not created: its egress needs an uplink")
    assert plan(outside, there.observed())[0] == CreatePool(outside.tenants[0].pools[0])
    assert plan(STATE, nothing) == plan(STATE, there.observed()), "others go on"


def test_an_egress_that_cannot_be_had_keeps_nothing_else_back() -> None:
    state = with_pool(egress=NAT, pinned=True)
    seen = replace(world(state).observed(), uplink=False)
    seen = replace(seen, pools=(replace(seen.pools[0], pinned=False, egress=NO_EGRESS),))
    outcome = decide(state, seen)
    assert outcome.actions == (UpdatePool(WEB, (Change("pinned", False, True),)),)
    assert outcome.remarks == (Remark(WEB, Cause.NO_UPLINK, detail="its egress is not changed"),)


def test_a_shape_that_the_host_or_the_quota_has_no_room_for() -> None:
    state = with_pool(resources=InstanceResources(mem_mib=2048))
    there = World(state, {ACME: Tenant(ACME, network(1), Quota(), START)})
    there.pools[WEB] = observed_pool(state.tenants[0].pools[0], REVISION)
    outcome = decide(state, replace(there.observed(), host_mib=1024))
    assert outcome == Outcome((), (Remark(WEB, Cause.HOST, 2),))
    small = replace(state, tenants=(replace(state.tenants[0], quota=Quota(max_mem_mib=1024)),))
    del there.pools[WEB]
    there.tenants[ACME] = Tenant(ACME, network(1), Quota(max_mem_mib=1024), START)
    assert decide(small, there.observed()) == Outcome((), (Remark(WEB, Cause.POOL_QUOTA, 2, limit="max_mem_mib"),))


def test_no_image_is_built_on_a_full_disk() -> None:
    there = world()
    there.pools[WEB] = replace(there.pools[WEB], revision=None, built=None)
    there.instances.clear()
    outcome = decide(STATE, replace(there.observed(), can_build=False))
    assert outcome == Outcome((), (Remark(WEB, Cause.DISK, 2),))
    newer = decide(with_pool(source=SOURCES[1]), replace(world().observed(), can_build=False))
    assert [type(action) for action in newer.actions] == [UpdatePool]
    assert newer.remarks == (Remark(WEB, Cause.DISK),)


def test_a_tenant_whose_network_is_not_to_be_had_is_not_made() -> None:
    empty, other = World(STATE).observed(), Tenant(TenantId("other"), network(1), Quota(), START)
    for seen, why in (
        (replace(empty, reserved=(other,)), "tenant other has 10.240.1.0/24"),
        (replace(empty, net_ids=frozenset({1})), "net id 1 was given before, and none is given twice"),
    ):
        blocked = tuple(Remark(subject, Cause.NETWORK, n, detail=why) for subject, n in ((ACME, 0), (WEB, 2)))
        assert decide(STATE, seen) == Outcome((), blocked)
    mine = Tenant(ACME, network(1), Quota(), START)
    adopted = replace(empty, reserved=(mine,), net_ids=frozenset({1}))
    assert plan(STATE, adopted)[0] == CreateTenant(TENANT)


def test_what_cannot_be_had_is_told_at_once() -> None:
    other = TenantId("other")
    pool = replace(POOL, ref=PoolRef(ACME, PoolId("web")), resources=InstanceResources(mem_mib=512))
    state = DesiredState(
        NODE, (DesiredTenant(ACME, network(2), pools=(pool,)), DesiredTenant(TenantId("x"), network(3)))
    )
    there = world(state)
    there.tenants[other] = Tenant(other, network(3), Quota(), START)
    with pytest.raises(NotAllowed) as caught:
        check_possible(state, there.observed())
    errors = caught.value.fields["errors"]
    assert isinstance(errors, list)
    assert [error["path"] for error in errors] == [
        "$.tenants[0].network", "$.tenants[0].pools[0].instance_resources",
        "$.tenants[1].network.tenant_net_id", "$.tenants[1].network.ipv4_subnet",
    ]  # fmt: skip
    check_possible(STATE, world().observed())


def test_room_is_what_the_quota_has_left() -> None:
    there = world()
    room = Room.of(Quota(max_running=3), network(1), {WEB: InstanceResources()}, there.of(WEB))
    assert room.run(InstanceResources())
    assert not room.run(InstanceResources())
