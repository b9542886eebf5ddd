from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta

from hypothesis import given
from hypothesis import strategies as st

from mvm.domain.instance import InFlight, Instance
from mvm.domain.lifecycle import Status, Verb, landing
from mvm.domain.planner import Action, Create, Request, plan
from mvm.domain.pool import DesiredCounts, ImageSource, InstanceResources, WorkerPool
from tests.support import make
from tests.support.make import NODE, START, WEB
from tests.support.strategies import in_flights

S, V = Status, Verb


def pool(running: int | None) -> WorkerPool:
    desired = None if running is None else DesiredCounts(running=running)
    return WorkerPool(WEB, ImageSource("builtin:", "minimal"), InstanceResources(), NODE, START, desired)


def instance(number: int, status: Status, in_flight: InFlight | None = None, age: int = 0) -> Instance:
    at = START - timedelta(seconds=age)
    return Instance(make.instance_ref(number), NODE, number + 3, status, at, in_flight=in_flight)


@st.composite
def pools(draw: st.DrawFn, *, busy: bool = True) -> list[Instance]:
    """Instances of one pool as they may be found; destroyed ones are not kept."""
    alive = st.sampled_from([status for status in Status if status is not S.DESTROYED])
    flights = st.none() | in_flights if busy else st.none()
    found = draw(st.lists(st.tuples(alive, flights, st.integers(0, 9)), max_size=12))
    return [instance(n, status, flight, age) for n, (status, flight, age) in enumerate(found)]


wanted = st.integers(0, 14)


def begun(actions: Sequence[Action], observed: Sequence[Instance]) -> list[Instance]:
    """What is observed once the jobs of `actions` are in flight."""
    asked = {action.ref: action.verb for action in actions if isinstance(action, Request)}
    after = [
        replace(each, in_flight=InFlight(make.job().job_id, asked[each.ref])) if each.ref in asked else each
        for each in observed
    ]
    created = sum(action.count for action in actions if isinstance(action, Create))
    start = InFlight(make.job().job_id, V.START)
    return after + [instance(1000 + n, S.CREATED, start) for n in range(created)]


def finished(observed: Sequence[Instance]) -> list[Instance]:
    """The same once all jobs have succeeded."""
    return [each.moved(each.lands_on) for each in observed if each.lands_on is not S.DESTROYED]


UP = (S.RUNNING, S.WARM, S.SLEEPING)


def up(observed: Sequence[Instance]) -> int:
    return sum(each.status in UP for each in observed)


@given(pools(), wanted)
def test_a_second_pass_with_everything_in_flight_adds_nothing(observed: list[Instance], count: int) -> None:
    assert plan(pool(count), begun(plan(pool(count), observed), observed)) == ()


@given(pools(busy=False), wanted)
def test_what_is_planned_converges(observed: list[Instance], count: int) -> None:
    after = finished(begun(plan(pool(count), observed), observed))
    assert up(after) == count
    assert plan(pool(count), after) == ()


@given(pools(), wanted)
def test_it_converges_whatever_was_in_flight(observed: list[Instance], count: int) -> None:
    for _ in range(3):
        observed = finished(begun(plan(pool(count), observed), observed))
    assert up(observed) == count
    assert plan(pool(count), observed) == ()


@given(pools(), wanted)
def test_only_what_is_free_is_asked_and_only_what_it_may_do(observed: list[Instance], count: int) -> None:
    free = {each.ref: each for each in observed if each.in_flight is None}
    asked = [action for action in plan(pool(count), observed) if isinstance(action, Request)]
    assert len({action.ref for action in asked}) == len(asked)
    for action in asked:
        landing(free[action.ref].status, action.verb)


@given(pools(), wanted)
def test_nothing_is_stopped_while_too_few_run_and_nothing_made_while_too_many(
    observed: list[Instance], count: int
) -> None:
    actions = plan(pool(count), observed)
    will_run = sum(each.lands_on in UP for each in observed)
    stops = [action for action in actions if isinstance(action, Request) and action.verb is V.STOP]
    if will_run <= count:
        assert stops == []
    else:
        assert stops == list(actions)
        assert len(stops) <= will_run - count


@given(pools(), wanted)
def test_nothing_is_created_while_something_could_be_started(observed: list[Instance], count: int) -> None:
    actions = plan(pool(count), observed)
    if any(isinstance(action, Create) for action in actions):
        started = {action.ref for action in actions if isinstance(action, Request)}
        idle = {e.ref for e in observed if e.in_flight is None and e.status in (S.CREATED, S.READY, S.STOPPED)}
        assert idle <= started
    assert all(action.count > 0 for action in actions if isinstance(action, Create))


@given(pools())
def test_a_pool_that_nobody_scaled_is_left_alone(observed: list[Instance]) -> None:
    assert plan(pool(None), observed) == ()


@given(pools(), wanted, st.randoms())
def test_the_order_of_what_is_observed_does_not_matter(observed: list[Instance], count: int, random: object) -> None:
    shuffled = list(observed)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert plan(pool(count), shuffled) == plan(pool(count), observed)


# --- by example


def test_what_stopped_is_started_before_more_is_created() -> None:
    stopped, created = instance(1, S.STOPPED), instance(2, S.CREATED)
    assert plan(pool(3), [created, stopped]) == (
        Request(stopped.ref, V.START), Request(created.ref, V.START), Create(WEB, 1),
    )  # fmt: skip


def test_the_oldest_is_started_and_the_newest_stopped() -> None:
    old, new = instance(1, S.STOPPED, age=9), instance(2, S.STOPPED)
    assert plan(pool(1), [new, old]) == (Request(old.ref, V.START),)
    old, new = instance(1, S.RUNNING, age=9), instance(2, S.RUNNING)
    assert plan(pool(1), [new, old]) == (Request(new.ref, V.STOP),)


def test_one_that_is_starting_counts_as_running() -> None:
    starting = instance(1, S.STOPPED, InFlight(make.job().job_id, V.START))
    assert plan(pool(1), [starting]) == ()
    stopping = instance(2, S.RUNNING, InFlight(make.job().job_id, V.STOP))
    assert plan(pool(1), [stopping]) == (Create(WEB, 1),)


def test_warm_and_sleeping_ones_count_and_the_coldest_are_stopped_first() -> None:
    asleep, old, new = instance(1, S.SLEEPING, age=5), instance(2, S.RUNNING, age=9), instance(3, S.RUNNING)
    warm, going = instance(4, S.WARM), instance(5, S.RUNNING, InFlight(make.job().job_id, V.SLEEP))
    assert plan(pool(5), [asleep, old, new, warm, going]) == ()
    assert plan(pool(2), [asleep, old, new, warm, going]) == (
        Request(asleep.ref, V.STOP), Request(warm.ref, V.STOP), Request(new.ref, V.STOP),
    )  # fmt: skip
