"""One pool's instances: properties, then examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta

from hypothesis import given
from hypothesis import strategies as st

from mvm.domain.actions import Action, Create, Request, Why
from mvm.domain.addressing import TenantNetwork, parse_subnet
from mvm.domain.ids import InstanceRef, JobId, Revision
from mvm.domain.instance import InFlight, Instance
from mvm.domain.lifecycle import Status, Verb, landing
from mvm.domain.passes import coming
from mvm.domain.pool import DesiredCounts, InstanceResources
from mvm.domain.remarks import Cause, Remark, told
from mvm.domain.room import Room, usage_of
from mvm.domain.scaling import PoolNeed, Scaled, at_counts, proving, scale
from mvm.domain.tenant import Quota
from tests.support import make
from tests.support.fleets import UP, counts
from tests.support.make import NODE, START, WEB
from tests.support.strategies import in_flights

S, V = Status, Verb
OLD, NEW = Revision("0" * 64), Revision("1" * 64)
SHAPE = InstanceResources()
NETWORK = TenantNetwork(1, parse_subnet("10.240.0.0/16"))
STARTABLE = (S.CREATED, S.READY, S.STOPPED)


def need(*numbers: int, **rules: object) -> PoolNeed:
    return PoolNeed(WEB, DesiredCounts(*numbers), SHAPE, NEW, **rules)  # type: ignore[arg-type]


def instance(number: int, status: Status, in_flight: InFlight | None = None, age: int = 0) -> Instance:
    at = START - timedelta(seconds=age)
    return Instance(make.instance_ref(number), NODE, number + 3, status, at, revision=NEW, in_flight=in_flight)


@st.composite
def pools(draw: st.DrawFn, *, busy: bool = True) -> list[Instance]:
    """Instances of one pool as they may be found; destroyed ones are not kept."""
    alive = st.sampled_from([status for status in Status if status is not S.DESTROYED])
    flights = st.none() | in_flights if busy else st.none()
    found = draw(st.lists(st.tuples(alive, flights, st.integers(0, 9)), max_size=12))
    return [instance(n, status, flight, age) for n, (status, flight, age) in enumerate(found)]


def decide(wanted: PoolNeed, observed: Sequence[Instance], quota: Quota | None = None) -> tuple[Action, ...]:
    room = Room.of(quota or Quota(), NETWORK, {WEB: SHAPE}, observed)
    return scale(wanted, observed, room, now=START).actions


def begun(actions: Sequence[Action], observed: Sequence[Instance]) -> list[Instance]:
    """What is observed once the jobs of `actions` are in flight."""
    asked = {action.ref: action.verb for action in actions if isinstance(action, Request)}
    after = [
        replace(each, in_flight=InFlight(make.job().job_id, asked[each.ref])) if each.ref in asked else each
        for each in observed
    ]
    created = sum(action.count for action in actions if isinstance(action, Create))
    start = InFlight(make.job().job_id, V.START)
    first = 1000 + len(observed)
    return after + [instance(first + n, S.CREATED, start) for n in range(created)]


def finished(observed: Sequence[Instance]) -> list[Instance]:
    """The same once all jobs have succeeded."""
    return [
        each.moved(each.lands_on, revision=NEW) if each.in_flight else each
        for each in observed
        if each.lands_on is not S.DESTROYED
    ]


def places(observed: Sequence[Instance]) -> list[int]:
    return [sum(each.status is status for each in observed) for status in UP]


@given(pools(), counts)
def test_a_second_pass_with_everything_in_flight_adds_nothing(observed: list[Instance], wanted: DesiredCounts) -> None:
    pool = replace(need(), counts=wanted)
    assert decide(pool, begun(decide(pool, observed), observed)) == ()


@given(pools(), counts)
def test_it_converges_whatever_was_in_flight(observed: list[Instance], wanted: DesiredCounts) -> None:
    pool = replace(need(), counts=wanted)
    for _ in range(6):
        observed = finished(begun(decide(pool, observed), observed))
    assert decide(pool, observed) == ()
    if wanted.exact:
        assert places(observed) == [wanted.running, wanted.warm, wanted.sleeping]
    else:
        assert sum(places(observed)) == wanted.running


@given(pools(busy=False), counts.filter(lambda wanted: wanted.running > 0))
def test_it_converges_within_a_quota_that_gives_just_enough(observed: list[Instance], wanted: DesiredCounts) -> None:
    """What ran beyond the quota has been stopped first: it is at rest and within it."""
    pool = replace(need(), counts=wanted)
    in_memory = wanted.running + (wanted.warm or 0)
    quota = Quota(
        max_running=wanted.running,
        max_warm=wanted.warm or 0,
        max_vcpus=in_memory,
        max_mem_mib=in_memory * SHAPE.mem_mib,
    )
    observed = [replace(each, status=S.STOPPED) if each.status in UP else each for each in observed]
    for _ in range(30):
        observed = begun(decide(pool, observed, quota), observed)
        used = usage_of({WEB: SHAPE}, observed)
        assert used.running <= quota.max_running
        assert used.warm <= quota.max_warm
        assert used.vcpus <= quota.max_vcpus
        assert used.mem_mib <= quota.max_mem_mib
        observed = finished(observed)
    assert places(observed)[0] == wanted.running
    if wanted.exact:
        assert places(observed) == [wanted.running, wanted.warm, wanted.sleeping]


@given(pools(), counts)
def test_only_what_is_free_is_asked_and_only_what_it_may_do(observed: list[Instance], wanted: DesiredCounts) -> None:
    free = {each.ref: each for each in observed if each.in_flight is None}
    asked = [action for action in decide(replace(need(), counts=wanted), observed) if isinstance(action, Request)]
    assert len({action.ref for action in asked}) == len(asked)
    for action in asked:
        assert free[action.ref].status is action.status
        landing(action.status, action.verb)


@given(pools(), st.integers(0, 14))
def test_nothing_is_stopped_while_too_few_are_up_and_nothing_made_while_too_many(
    observed: list[Instance], count: int
) -> None:
    actions = decide(need(count), observed)
    will_run = sum(each.lands_on in UP for each in observed)
    stops = [action for action in actions if isinstance(action, Request) and action.verb is V.STOP]
    if will_run <= count:
        assert stops == []
    else:
        assert stops == list(actions)
        assert len(stops) <= will_run - count


@given(pools(), counts)
def test_nothing_is_created_while_something_could_be_started(observed: list[Instance], wanted: DesiredCounts) -> None:
    actions = decide(replace(need(), counts=wanted), observed)
    created = sum(action.count for action in actions if isinstance(action, Create))
    if created:
        started = {action.ref for action in actions if isinstance(action, Request)}
        assert {e.ref for e in observed if e.in_flight is None and e.status in STARTABLE} <= started
        alive = [each for each in observed if each.lands_on is not S.DESTROYED]
        assert created + len(alive) <= max(wanted.total, len(alive) + created)


@given(pools(), counts, st.randoms())
def test_the_order_of_what_is_observed_does_not_matter(
    observed: list[Instance], wanted: DesiredCounts, random: object
) -> None:
    pool, shuffled = replace(need(), counts=wanted), list(observed)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert decide(pool, shuffled) == decide(pool, observed)


# --- by example


def start(one: Instance) -> Request:
    return Request(one.ref, V.START, one.status, Why.TOO_FEW)


def stop(one: Instance, why: Why = Why.TOO_MANY) -> Request:
    return Request(one.ref, V.STOP, one.status, why)


def test_what_stopped_is_started_before_more_is_created() -> None:
    stopped, created = instance(1, S.STOPPED), instance(2, S.CREATED)
    assert decide(need(3), [created, stopped]) == (start(stopped), start(created), Create(WEB, 1))


def test_ready_ones_exist() -> None:
    ready = [instance(n, S.READY) for n in range(2)]
    assert decide(need(2), ready) == (start(ready[0]), start(ready[1]))
    preparing = instance(1, S.CREATED, InFlight(make.job().job_id, V.PREPARE))
    assert decide(need(1), [preparing]) == ()


def test_the_oldest_is_started_and_the_newest_stopped() -> None:
    old, new = instance(1, S.STOPPED, age=9), instance(2, S.STOPPED)
    assert decide(need(1), [new, old]) == (start(old),)
    old, new = instance(1, S.RUNNING, age=9), instance(2, S.RUNNING)
    assert decide(need(1), [new, old]) == (stop(new),)


def test_one_that_is_starting_counts_as_running_and_one_that_is_stopping_is_waited_for() -> None:
    starting = instance(1, S.STOPPED, InFlight(make.job().job_id, V.START))
    assert decide(need(1), [starting]) == ()
    stopping = instance(2, S.RUNNING, InFlight(make.job().job_id, V.STOP))
    assert decide(need(1), [stopping]) == ()
    assert decide(need(2), [stopping]) == (Create(WEB, 1),)


def test_warm_and_sleeping_ones_count_and_the_coldest_are_stopped_first() -> None:
    asleep, old, new = instance(1, S.SLEEPING, age=5), instance(2, S.RUNNING, age=9), instance(3, S.RUNNING)
    warm, going = instance(4, S.WARM), instance(5, S.RUNNING, InFlight(make.job().job_id, V.SLEEP))
    assert decide(need(5), [asleep, old, new, warm, going]) == ()
    assert decide(need(2), [asleep, old, new, warm, going]) == (stop(asleep), stop(warm), stop(new))


def test_exact_counts_move_what_is_there() -> None:
    asleep, warm, running = instance(1, S.SLEEPING), instance(2, S.WARM), instance(3, S.RUNNING)
    assert decide(need(3, 0, 0), [asleep, warm, running]) == (
        Request(asleep.ref, V.WAKE, S.SLEEPING, Why.TOO_FEW), Request(warm.ref, V.WAKE, S.WARM, Why.TOO_FEW),
    )  # fmt: skip
    more = [running, instance(4, S.RUNNING), instance(5, S.RUNNING)]
    assert decide(need(1, 1, 1), more) == (
        Request(more[2].ref, V.WARM, S.RUNNING, Why.PLACE), Request(more[1].ref, V.SLEEP, S.RUNNING, Why.PLACE),
    )  # fmt: skip


def test_nothing_is_put_away_before_enough_others_run() -> None:
    running = instance(1, S.RUNNING)
    assert decide(need(1, 1), [running]) == (Create(WEB, 1),)
    assert decide(need(1, 1), [running], Quota(max_running=1)) == (Request(running.ref, V.WARM, S.RUNNING, Why.PLACE),)


def test_no_more_become_warm_than_the_quota_gives() -> None:
    running = [instance(n, S.RUNNING) for n in range(3)]
    (put_away,) = decide(need(1, 2), running, Quota(max_warm=1))
    assert put_away == Request(running[2].ref, V.WARM, S.RUNNING, Why.PLACE)


def test_one_with_a_job_counts_where_it_is_and_where_it_will_land() -> None:
    flights = [instance(1, S.STOPPED, InFlight(make.job().job_id, V.START)),
               instance(2, S.RUNNING, InFlight(make.job().job_id, V.WARM))]  # fmt: skip
    used = usage_of({WEB: SHAPE}, flights)
    assert (used.running, used.warm, used.vcpus) == (2, 1, 2)


@given(pools(), counts, st.booleans(), st.booleans(), st.integers(0, 4), st.sets(st.integers(0, 11)))
def test_a_pool_that_is_not_at_its_counts_says_why(
    observed: list[Instance], wanted: DesiredCounts, pinned: bool, critical: bool, most: int, held: set[int]
) -> None:
    observed = [
        replace(each, manual_override_until=START + timedelta(1)) if n in held else each
        for n, each in enumerate(observed)
    ]
    quota = Quota(max_running=most, max_warm=most // 2, max_instances_per_pool=6)
    room = Room.of(quota, NETWORK, {WEB: SHAPE}, observed)
    scaled = scale(replace(need(pinned=pinned, critical=critical), counts=wanted), observed, room, now=START)
    remarks = [*scaled.remarks, *coming(scaled.actions)]
    causes = [remark for remark in remarks if remark.cause.counts]
    there = [each for each in observed if each.lands_on is not S.DESTROYED]
    if not critical and at_counts(wanted, there):
        return
    up = sum(each.status in UP and each.lands_on in UP for each in there)
    assert sum(remark.count for remark in causes) >= max(0, wanted.total - up)
    if up != wanted.total:
        assert causes
    assert all(remark.count > 0 for remark in causes)


def test_whoever_scales_a_pool_ends_what_others_have_said_before() -> None:
    spoke = START - timedelta(seconds=9)
    held = replace(
        instance(1, S.STOPPED), manual_override_at=spoke, manual_override_until=START + timedelta(seconds=591)
    )
    room = Room.of(Quota(), NETWORK, {WEB: SHAPE}, [held])
    scaled = scale(need(1), [held], room, now=START)
    assert scaled.actions == ()
    until = held.manual_override_until
    assert scaled.remarks == (Remark(WEB, Cause.HELD, 1, (held.ref,), until, detail="--running 1"),)
    assert decide(need(1, scaled_at=spoke), [held]) == (start(held),)
    assert decide(need(1, scaled_at=spoke - timedelta(seconds=1)), [held]) == ()
    older = replace(held, manual_override_at=None)  # written before that was written down
    assert decide(need(1, scaled_at=spoke), [older]) == (start(older),)


def test_what_lacks_is_named() -> None:
    stopped = instance(1, S.STOPPED)
    for quota, host_mib, remark in (
        (Quota(max_running=0), None, Remark(WEB, Cause.QUOTA, 2, limit="max_running")),
        (Quota(max_mem_mib=255), None, Remark(WEB, Cause.QUOTA, 2, limit="max_mem_mib")),
        (Quota(max_instances_per_pool=1), None, Remark(WEB, Cause.QUOTA, 1, limit="max_instances_per_pool")),
        (Quota(), 255, Remark(WEB, Cause.HOST, 2)),
    ):
        room = Room.of(quota, NETWORK, {WEB: SHAPE}, [stopped], host_mib=host_mib)
        assert told(scale(need(2), [stopped], room, now=START).remarks) == (remark,)
    small = TenantNetwork(1, parse_subnet("10.240.0.0/29"))
    there = [instance(n, S.RUNNING) for n in range(len(small.offsets))]
    room = Room.of(Quota(), small, {WEB: SHAPE}, there)
    assert scale(need(len(there) + 2), there, room, now=START).remarks == (Remark(WEB, Cause.SUBNET, 2),)


def test_a_full_max_warm_is_named() -> None:
    running = [instance(n, S.RUNNING) for n in range(3)]
    room = Room.of(Quota(max_warm=1), NETWORK, {WEB: SHAPE}, running)
    scaled = scale(need(1, 2), running, room, now=START)
    assert told(scaled.remarks) == (Remark(WEB, Cause.QUOTA, 1, limit="max_warm"),)


def test_a_held_one_takes_a_place_and_is_left_alone() -> None:
    held = replace(instance(1, S.STOPPED), manual_override_until=START + timedelta(seconds=1))
    running = instance(2, S.RUNNING)
    assert decide(need(2), [held, running]) == ()
    assert decide(need(3), [held, running]) == (Create(WEB, 1),)
    over = replace(held, manual_override_until=START)
    assert decide(need(2), [over, running]) == (start(over),)


def test_pinned_ones_are_started_and_never_put_away() -> None:
    stopped, running = instance(1, S.STOPPED), instance(2, S.RUNNING)
    assert decide(need(2, pinned=True), [stopped, running]) == (start(stopped),)
    assert decide(need(0, pinned=True), [stopped, running]) == ()
    assert decide(need(0, 1, 0, pinned=True), [running]) == ()


def test_critical_ones_are_made_and_then_not_touched() -> None:
    assert decide(need(2, critical=True), []) == (Create(WEB, 2),)
    stopped, running = instance(1, S.STOPPED), instance(2, S.RUNNING)
    assert decide(need(2, critical=True), [stopped, running]) == ()
    assert decide(need(1, critical=True), [stopped, running]) == ()


def test_a_critical_one_that_never_ran_is_started() -> None:
    """Its first start failed, was cancelled, or its job was lost with Redis."""
    new, ready, running = instance(1, S.CREATED), instance(2, S.READY), instance(3, S.RUNNING)
    assert decide(need(3, critical=True), [new, ready, running]) == (start(new), start(ready))
    assert decide(need(2, critical=True), [new, ready, running]) == (start(new),)
    assert decide(need(1, critical=True), [new, ready, running]) == ()
    held = replace(new, manual_override_until=START + timedelta(seconds=1))
    flying = replace(ready, in_flight=InFlight(make.job().job_id, V.START))
    assert decide(need(3, critical=True), [held, flying, running]) == ()


def test_a_critical_one_that_fell_is_started_and_one_that_was_stopped_is_not() -> None:
    fallen = replace(instance(1, S.STOPPED), last_error="VMM process 7 is gone [vmm.gone]")
    stopped, running = instance(2, S.STOPPED), instance(3, S.RUNNING)
    assert decide(need(3, critical=True), [fallen, stopped, running]) == (start(fallen),)
    assert decide(need(1, critical=True), [fallen, running]) == ()


def test_it_is_told_when_a_critical_one_is_stopped() -> None:
    stopped, running = instance(1, S.STOPPED), instance(2, S.RUNNING)
    room = Room.of(Quota(), NETWORK, {WEB: SHAPE}, [stopped, running])
    scaled = scale(need(2, critical=True), [stopped, running], room, now=START)
    assert scaled.actions == ()
    assert scaled.remarks == (Remark(WEB, Cause.CRITICAL, 1, (stopped.ref,)),)
    assert str(scaled.remarks[0]) == "acme/web: 1 are stopped, and stay: the pool is critical"


def test_a_revision_comes_with_the_next_start_unless_it_is_rolled() -> None:
    old = [replace(instance(n, S.RUNNING, age=n), revision=OLD) for n in range(3)]
    assert decide(need(3), old) == ()
    assert decide(need(3, max_unavailable=2), old) == (stop(old[2], Why.ROLLOUT), stop(old[1], Why.ROLLOUT))
    one_down = [replace(old[0], status=S.STOPPED), *old[1:]]
    assert decide(need(3, max_unavailable=1), one_down) == (start(one_down[0]),)


def test_a_rollout_waits_until_a_new_one_has_passed_a_health_check() -> None:
    old = [replace(instance(n, S.RUNNING, age=n), revision=OLD) for n in (1, 2)]
    there = [*old, instance(3, S.RUNNING)]
    revisions = {WEB: NEW}
    assert proving(revisions, there) == (there[2],)
    assert proving(revisions, [there[2]]) == proving(revisions, old) == (), "nothing is rolled"
    room = Room.of(Quota(), NETWORK, {WEB: SHAPE}, there)
    waits = scale(need(3, max_unavailable=1), there, room, now=START, unproven={there[2].ref})
    assert (waits.actions, waits.rolling) == ((), 2)
    assert waits.remarks == (Remark(WEB, Cause.HEALTH_CHECK, 2, (there[2].ref,)),)
    assert waits.remarks[0].text == (
        f"2 keep another revision until {there[2].ref.instance} with the new one has passed a health check"
    )
    goes_on = scale(need(3, max_unavailable=1), there, room, now=START)
    assert (goes_on.actions, goes_on.rolling) == ((stop(old[1], Why.ROLLOUT),), 0)
    two = scale(need(3, max_unavailable=2), there, room, now=START, unproven={there[2].ref})
    assert (two.actions, two.rolling) == ((stop(old[1], Why.ROLLOUT),), 0)


def test_a_spare_one_that_failed_long_ago_does_not_halt_a_rollout() -> None:
    old = [replace(instance(n, S.RUNNING, age=n), revision=OLD) for n in (1, 2)]
    spare = replace(instance(3, S.STOPPED), last_error="it was out of memory")
    assert decide(need(2, max_unavailable=1), [*old, spare]) == (stop(old[1], Why.ROLLOUT), start(spare))


def test_a_rollout_waits_while_one_with_the_new_revision_is_not_well() -> None:
    old, new = replace(instance(1, S.RUNNING), revision=OLD), instance(2, S.RUNNING)
    failed = replace(new, status=S.STOPPED, last_error="its guest panicked")
    assert decide(need(2, max_unavailable=2), [old, failed]) == (start(failed),)
    room = Room.of(Quota(), NETWORK, {WEB: SHAPE}, [old, new])
    scaled = scale(need(2, max_unavailable=2), [old, new], room, now=START, unhealthy={new.ref})
    assert scaled.actions == (stop(new, Why.UNHEALTHY),)
    (halted,) = told(scaled.remarks)
    assert halted == Remark(WEB, Cause.NOT_WELL, 1, (new.ref,))
    assert halted.text == f"1 keep another revision: {new.ref.instance} with the new revision is not well"


def test_what_keeps_a_pinned_pools_revision_is_that_it_is_pinned() -> None:
    """Programs go by the cause: nothing of it is ill, and it does not end by itself."""
    old, new = replace(instance(1, S.RUNNING), revision=OLD), instance(2, S.RUNNING)
    room = Room.of(Quota(), NETWORK, {WEB: SHAPE}, [old, new])
    for unhealthy in (frozenset[InstanceRef](), frozenset({new.ref})):
        scaled = scale(need(2, max_unavailable=1, pinned=True), [old, new], room, now=START, unhealthy=unhealthy)
        assert scaled == Scaled((), (Remark(WEB, Cause.PINNED_REVISION, 1),))
        (remark,) = scaled.remarks
        assert (remark.text, remark.cause.counts) == ("1 keep another revision: the pool is pinned", False)


def test_too_many_in_a_critical_pool_are_no_stopped_ones() -> None:
    up, stopped = [instance(n, S.RUNNING) for n in (1, 2)], instance(3, S.STOPPED)
    room = Room.of(Quota(), NETWORK, {WEB: SHAPE}, [*up, stopped])
    assert scale(need(1, critical=True), [*up, stopped], room, now=START).remarks == (
        Remark(WEB, Cause.CRITICAL_SURPLUS, 1),
    )
    assert scale(need(3, critical=True), [*up, stopped], room, now=START).remarks == (
        Remark(WEB, Cause.CRITICAL, 1, (stopped.ref,)),
    )
    assert Remark(WEB, Cause.CRITICAL_SURPLUS, 1).text == "1 too many are up, and stay: the pool is critical"
    assert Remark(WEB, Cause.CRITICAL, 1).text == "1 are stopped, and stay: the pool is critical"


def test_one_too_many_that_is_on_its_way_between_two_states_is_under_way() -> None:
    held = replace(instance(1, S.SLEEPING), manual_override_until=START + timedelta(1))
    going = instance(2, S.RUNNING, InFlight(JobId("j-000000000000-3030303030"), Verb.WARM))
    exact = replace(need(0), counts=DesiredCounts(running=0, warm=0, sleeping=1))
    scaled = scale(exact, [held, going], Room.of(Quota(), NETWORK, {WEB: SHAPE}, [held, going]), now=START)
    assert scaled == Scaled((), (Remark(WEB, Cause.UNDER_WAY, 1, (going.ref,)),))


def test_a_critical_pool_whose_instances_are_in_other_states_says_so() -> None:
    """As many are up as are wanted, and none is touched; nobody would know why it is not at its counts."""
    up = [instance(1, S.RUNNING), instance(2, S.RUNNING), instance(3, S.SLEEPING)]
    room = Room.of(Quota(), NETWORK, {WEB: SHAPE}, up)
    exact = replace(need(1, critical=True), counts=DesiredCounts(running=1, warm=1, sleeping=1))
    scaled = scale(exact, up, room, now=START)
    assert scaled == Scaled((), (Remark(WEB, Cause.CRITICAL_STATES, 1),))
    one_place = replace(exact, counts=DesiredCounts(running=3))
    assert scale(one_place, up, room, now=START) == Scaled((), ())
