"""ports/registry.py: jobs and how they go."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import timedelta
from threading import Event, Thread

import pytest

from mvm.domain.ids import JobId, NodeId
from mvm.domain.job import Job, JobState, JobVerb, Lane, Progress
from mvm.drivers.redis_link import RedisLink
from mvm.drivers.redis_registry import RedisRegistry
from mvm.errors import NotAllowed, NotFound, TimedOut
from mvm.ports.registry import Registry
from tests.support.make import ACME, NODE, START, WEB, bulk, ended, job
from tests.support.redis_server import RedisServer

FINAL = [state for state in JobState if state.final]


def ids(jobs: Sequence[Job]) -> list[JobId]:
    return [each.job_id for each in jobs]


# --- one job


def test_a_recorded_job_is_known_whole(registry: Registry) -> None:
    made = job(params={"force": True, "refs": [], "n": {"deep": 1.5}}, lane=Lane.URGENT)
    registry.record([made])
    assert registry.job(made.job_id) == made
    assert registry.job(job().job_id) is None


def test_recording_twice_leaves_one(registry: Registry) -> None:
    made = job()
    registry.record([made])
    registry.record([made])
    assert list(registry.jobs()) == [made]
    assert list(registry.open_jobs(NODE)) == [made]


def test_jobs_are_sorted_by_the_time_they_were_asked_for_whatever_their_ids(registry: Registry) -> None:
    """A task that was called by Celery's ways keeps its UUID, which tells no time."""
    first, second, third = job(), job(), job()
    second = second.with_(job_id=JobId("0b7e8f3e-6c1d-4a59-9d3a-2f4f0d7e3a11"))
    times = [START + timedelta(seconds=n) for n in range(3)]
    made = [each.with_(submitted_at=at) for each, at in zip((first, second, third), times, strict=True)]
    registry.record([made[1], made[2], made[0]])
    assert ids(registry.open_jobs(NODE)) == ids(made)
    assert ids(registry.jobs()) == ids(made[::-1])


def test_why_a_task_never_became_a_job_is_kept(registry: Registry) -> None:
    assert registry.refusal("any id") is None
    registry.refuse("any id", NotAllowed("job.chain_broken", "what came before it failed", hint="look there", at=1))
    told = registry.refusal("any id")
    assert isinstance(told, NotAllowed)
    assert (told.code, told.hint, told.fields) == ("job.chain_broken", "look there", {"at": 1})


def test_an_update_is_seen_whole(registry: Registry) -> None:
    made = job()
    registry.record([made])
    running = made.with_(state=JobState.RUNNING, step="boot", progress=Progress(2, 5), started_at=START)
    assert registry.update(running) is None
    assert registry.job(made.job_id) == running
    done = ended(running).with_(result={"refs": [], "ip": "10.240.0.3"})
    registry.update(done)
    assert registry.job(made.job_id) == done


@pytest.mark.parametrize("state", FINAL)
def test_a_final_state_is_never_left(registry: Registry, state: JobState) -> None:
    made = job()
    registry.record([made])
    done = ended(made, state)
    registry.update(done)
    for late in (made, made.with_(state=JobState.RUNNING), *(ended(made, other) for other in FINAL)):
        assert registry.update(late) is None
        assert registry.job(made.job_id) == done


def test_a_job_nobody_recorded_is_known_by_its_update(registry: Registry) -> None:
    """As after the registry was emptied: the node's word counts."""
    running = job(state=JobState.RUNNING)
    registry.update(running)
    assert registry.job(running.job_id) == running
    assert list(registry.open_jobs(NODE)) == [running]
    child = ended(job(parent=job().job_id))
    assert registry.update(child) is None
    assert registry.job(child.job_id) == child


# --- lists


def test_jobs_are_listed_newest_first(registry: Registry) -> None:
    made = [job() for _ in range(5)]
    registry.record(made)
    assert list(registry.jobs()) == made[::-1]
    assert list(registry.jobs(limit=2)) == [made[4], made[3]]


def test_jobs_are_filtered_by_state(registry: Registry) -> None:
    queued, running, failed = job(), job(), job()
    registry.record([queued, running, failed])
    registry.update(running.with_(state=JobState.RUNNING))
    registry.update(ended(failed, JobState.FAILED))
    assert ids(registry.jobs(state=JobState.QUEUED)) == [queued.job_id]
    assert ids(registry.jobs(state=JobState.RUNNING)) == [running.job_id]
    assert ids(registry.jobs(state=JobState.FAILED)) == [failed.job_id]
    assert ids(registry.jobs(state=JobState.CANCELLED)) == []


def test_a_subject_matches_what_lies_below_it(registry: Registry) -> None:
    acme, web, one, webby, acme2 = (
        job(subject=s) for s in ("acme", "acme/web", "acme/web/i-00000001", "acme/webby", "acme2/web")
    )
    registry.record([acme, web, one, webby, acme2])
    assert list(registry.jobs(subject="acme")) == [webby, one, web, acme]
    assert list(registry.jobs(subject="acme/web")) == [one, web]
    assert list(registry.jobs(subject="acme/web/i-00000001")) == [one]
    assert list(registry.jobs(subject="acme", limit=1)) == [webby]
    assert list(registry.jobs(subject="acme*")) == []


def test_many_jobs_are_filtered_before_they_are_limited(registry: Registry) -> None:
    rare = job(subject="rare")
    registry.record([rare, *(job() for _ in range(1200))])
    assert list(registry.jobs(subject="rare", limit=3)) == [rare]
    assert len(registry.jobs(limit=700)) == 700


def test_open_jobs_are_the_nodes_own_unfinished_ones(registry: Registry) -> None:
    first, second, third = job(), job(), job()
    other = job(node_id=NodeId("n10"))
    registry.record([second, first, third, other])
    registry.update(second.with_(state=JobState.RUNNING))
    assert ids(registry.open_jobs(NODE)) == ids([first, second, third])
    registry.update(ended(first))
    registry.update(ended(third, JobState.FAILED))
    assert ids(registry.open_jobs(NODE)) == [second.job_id]
    assert ids(registry.open_jobs(NodeId("n10"))) == [other.job_id]
    assert list(registry.open_jobs(NodeId("n3"))) == []


# --- bulk jobs


def test_children_keep_their_order(registry: Registry) -> None:
    parent, children = bulk(4)
    shuffled = [children[i] for i in (2, 0, 3, 1)]
    registry.record([parent, *shuffled])
    assert list(registry.children(parent.job_id)) == shuffled
    assert list(registry.children(job().job_id)) == []


def test_a_parent_ends_with_its_last_child(registry: Registry) -> None:
    parent, (first, second) = bulk(2, params={"verb": "instance.start", "parallel": 2, "n": 12345})
    registry.record([parent, first, second])
    assert registry.update(first.with_(state=JobState.RUNNING)) is None
    assert registry.update(ended(first)) is None
    assert registry.job(parent.job_id) == parent.with_(progress=Progress(1, 2))
    done = registry.update(ended(second))
    assert done is not None
    assert done == registry.job(parent.job_id)
    assert done.finished_at is not None
    assert done == parent.with_(state=JobState.SUCCEEDED, progress=Progress(2, 2), finished_at=done.finished_at)
    assert list(registry.open_jobs(NODE)) == []


@pytest.mark.parametrize("state", [JobState.FAILED, JobState.CANCELLED])
def test_one_bad_child_does_not_stop_the_others_but_fails_the_parent(registry: Registry, state: JobState) -> None:
    parent, (first, second, third) = bulk(3)
    registry.record([parent, first, second, third])
    assert registry.update(ended(first, state)) is None
    assert registry.update(ended(second)) is None
    done = registry.update(ended(third))
    assert done is not None
    assert (done.state, done.progress) == (JobState.FAILED, Progress(3, 3, 1))
    assert done.error is not None
    assert done.error["code"] == "bulk.failed"


def test_a_child_counts_once(registry: Registry) -> None:
    parent, (first, second) = bulk(2)
    registry.record([parent, first, second])
    for _ in range(3):
        assert registry.update(ended(first)) is None
    registered = registry.job(parent.job_id)
    assert registered is not None
    assert registered.progress == Progress(1, 2)
    assert registry.update(ended(second)) is not None
    assert registry.update(ended(second)) is None


def test_children_that_end_at_once_end_the_parent_once(registry: Registry) -> None:
    parent, children = bulk(24)
    registry.record([parent, *children])
    with ThreadPoolExecutor(6) as pool:
        said = list(pool.map(lambda child: registry.update(ended(child)), children))
    (done,) = [each for each in said if each is not None]
    assert (done.state, done.progress) == (JobState.SUCCEEDED, Progress(24, 24))


def test_held_children_are_released_as_others_end(registry: Registry) -> None:
    parent, children = bulk(5, parallel=2)
    registry.record([parent, *children], hold=frozenset(ids(children[2:])))
    assert list(registry.next_children(parent.job_id)) == []
    registry.update(children[0].with_(state=JobState.RUNNING))
    assert list(registry.next_children(parent.job_id)) == []
    registry.update(ended(children[0], JobState.FAILED))
    assert list(registry.next_children(parent.job_id)) == [children[2]]
    assert list(registry.next_children(parent.job_id)) == []
    registry.update(ended(children[1]))
    registry.update(ended(children[2]))
    assert list(registry.next_children(parent.job_id)) == [children[3], children[4]]
    assert list(registry.next_children(parent.job_id)) == []


def test_all_held_children_may_be_released_from_the_start(registry: Registry) -> None:
    parent, children = bulk(5, parallel=3)
    registry.record([parent, *children], hold=frozenset(ids(children)))
    assert list(registry.next_children(parent.job_id)) == list(children[:3])


def test_nothing_is_held_for_an_unknown_parent(registry: Registry) -> None:
    assert list(registry.next_children(job().job_id)) == []


def test_children_are_released_once_however_many_ask(registry: Registry) -> None:
    parent, children = bulk(20, parallel=4)
    registry.record([parent, *children], hold=frozenset(ids(children[4:])))
    released: list[JobId] = list(ids(children[:4]))

    def finish(child: JobId) -> None:
        known = registry.job(child)
        assert known is not None
        registry.update(ended(known))
        released.extend(ids(registry.next_children(parent.job_id)))

    with ThreadPoolExecutor(6) as pool:
        while batch := [child for child in released if _state(registry, child) is JobState.QUEUED]:
            assert len(batch) <= 4
            list(pool.map(finish, batch))
    assert sorted(released) == sorted(ids(children))
    assert _state(registry, parent.job_id) is JobState.SUCCEEDED


def _state(registry: Registry, job_id: JobId) -> JobState:
    known = registry.job(job_id)
    assert known is not None
    return known.state


# --- cancelling


def test_a_queued_job_is_cancelled_at_once(registry: Registry) -> None:
    made = job()
    registry.record([made])
    said = registry.request_cancel(made.job_id)
    assert said == registry.job(made.job_id)
    assert said.state is JobState.CANCELLED
    assert said.finished_at is not None
    assert registry.cancel_requested(made.job_id)
    assert registry.update(made.with_(state=JobState.RUNNING)) is None
    assert _state(registry, made.job_id) is JobState.CANCELLED


def test_a_running_job_is_asked_to_end(registry: Registry) -> None:
    made = job(state=JobState.RUNNING)
    registry.record([made.with_(state=JobState.QUEUED)])
    assert not registry.update_and_ask(made)
    assert not registry.cancel_requested(made.job_id)
    assert registry.request_cancel(made.job_id) == made
    assert registry.request_cancel(made.job_id) == made
    assert registry.cancel_requested(made.job_id)
    assert registry.update_and_ask(made.with_(step="undo"))
    assert registry.job(made.job_id) == made.with_(step="undo")
    registry.update(ended(made, JobState.CANCELLED))
    assert _state(registry, made.job_id) is JobState.CANCELLED
    assert registry.cancel_requested(made.job_id), "a message of it may come later"


def test_an_unknown_job_is_not_cancelled(registry: Registry) -> None:
    made = job()
    with pytest.raises(NotFound) as refused:
        registry.request_cancel(made.job_id)
    assert refused.value.code == "job.not_found"
    assert not registry.cancel_requested(made.job_id)


@pytest.mark.parametrize("state", FINAL)
def test_a_finished_job_is_not_cancelled(registry: Registry, state: JobState) -> None:
    made = job()
    registry.record([made])
    registry.update(ended(made, state))
    with pytest.raises(NotAllowed) as refused:
        registry.request_cancel(made.job_id)
    assert refused.value.code == "job.finished"
    assert not registry.cancel_requested(made.job_id)


def test_cancelling_a_bulk_job_reaches_its_children(registry: Registry) -> None:
    parent, children = bulk(4, parallel=3)
    registry.record([parent, *children], hold=frozenset(ids(children[3:])))
    registry.update(ended(children[0]))
    running = children[1].with_(state=JobState.RUNNING)
    registry.update(running)
    said = registry.request_cancel(parent.job_id)
    assert not said.state.final
    assert [each.state for each in registry.children(parent.job_id)] == [
        JobState.SUCCEEDED, JobState.RUNNING, JobState.CANCELLED, JobState.CANCELLED,
    ]  # fmt: skip
    assert registry.cancel_requested(running.job_id)
    assert list(registry.next_children(parent.job_id)) == []
    done = registry.update(ended(running, JobState.CANCELLED))
    assert done is not None
    assert done.progress == Progress(4, 4, 3)
    assert list(registry.open_jobs(NODE)) == []


def test_cancelling_a_bulk_job_that_nobody_took_ends_it(registry: Registry) -> None:
    parent, children = bulk(3, parallel=1)
    registry.record([parent, *children], hold=frozenset(ids(children[1:])))
    assert registry.request_cancel(parent.job_id).state.final
    assert [each.state for each in registry.children(parent.job_id)] == [JobState.CANCELLED] * 3
    with pytest.raises(NotAllowed):
        registry.request_cancel(parent.job_id)


def test_a_held_child_that_was_cancelled_is_passed_over(registry: Registry) -> None:
    parent, children = bulk(4, parallel=1)
    registry.record([parent, *children], hold=frozenset(ids(children[1:])))
    registry.request_cancel(children[1].job_id)
    assert list(registry.next_children(parent.job_id)) == [], "the first child is still under way"
    registry.update(ended(children[0]))
    assert list(registry.next_children(parent.job_id)) == [children[2]]


def test_a_job_that_was_taken_meanwhile_does_not_expire(registry: Registry) -> None:
    made = job()
    registry.record([made])
    registry.update(made.with_(state=JobState.RUNNING))
    registry.expire(ended(made, JobState.CANCELLED))
    assert _state(registry, made.job_id) is JobState.RUNNING
    assert not registry.cancel_requested(made.job_id)


@pytest.mark.redis
@pytest.mark.parametrize("alone", [True, False])
def test_a_job_that_is_taken_while_it_is_cancelled_is_its_workers_to_end(
    redis_server: RedisServer, alone: bool
) -> None:
    """Else it would be told cancelled, and be done: who cancels many jobs has looked at them a while ago."""

    class Slow(RedisRegistry):
        def job(self, job_id: JobId) -> Job | None:
            return self._and_then_taken([super().job(job_id)])[0]

        def children(self, parent: JobId) -> Sequence[Job]:
            return [each for each in self._and_then_taken(super().children(parent)) if each]

        def _and_then_taken(self, seen: Sequence[Job | None]) -> Sequence[Job | None]:
            for each in seen:
                if each and each.verb is not JobVerb.BULK and each.state is JobState.QUEUED:
                    self.update(each.with_(state=JobState.RUNNING))
            return seen

    with closing(RedisLink(redis_server.url, code="registry.unreachable")) as link:
        registry = Slow(link)
        parent, children = bulk(2)
        registry.record([parent, *children])
        registry.request_cancel(children[0].job_id if alone else parent.job_id)
        assert registry.cancel_requested(children[0].job_id), "the worker ends it at its next step"
        assert _state(registry, children[0].job_id) is JobState.RUNNING
        registry.update(ended(children[0]))
        assert _state(registry, children[0].job_id) is JobState.SUCCEEDED, "there was no next step"


# --- following


def test_a_finished_job_is_followed_at_once(registry: Registry) -> None:
    made = job()
    registry.record([made])
    registry.update(ended(made))
    assert list(registry.follow([made.job_id], deadline_s=0)) == [ended(made)]


def test_nothing_is_followed_of_no_jobs(registry: Registry) -> None:
    assert list(registry.follow([], deadline_s=None)) == []


def test_a_follower_sees_a_job_as_it_is_and_every_change(registry: Registry) -> None:
    made = job()
    registry.record([made])
    changes = [
        made.with_(state=JobState.RUNNING, step="network"),
        made.with_(state=JobState.RUNNING, step="boot"),
        ended(made, JobState.FAILED),
    ]
    seen = []
    for each in registry.follow([made.job_id], deadline_s=30):
        seen.append(each)
        if changes:
            registry.update(changes.pop(0))
    assert seen == [
        made, made.with_(state=JobState.RUNNING, step="network"), made.with_(state=JobState.RUNNING, step="boot"),
        ended(made, JobState.FAILED),
    ]  # fmt: skip


def test_a_follower_waits_for_changes_of_others(registry: Registry) -> None:
    made = [job() for _ in range(3)]
    registry.record(made)
    following = Event()

    def work() -> None:
        assert following.wait(30)
        for each in made:
            registry.update(each.with_(state=JobState.RUNNING))
        for each in reversed(made):
            registry.update(ended(each))

    worker = Thread(target=work)
    worker.start()
    last: dict[JobId, Job] = {}
    try:
        for each in registry.follow(ids(made), deadline_s=30):
            last[each.job_id] = each
            following.set()
    finally:
        following.set()
        worker.join()
    assert last == {each.job_id: ended(each) for each in made}


def test_a_bulk_jobs_changes_carry_its_progress(registry: Registry) -> None:
    parent, children = bulk(3)
    registry.record([parent, *children])
    left = list(children)
    seen = []
    for each in registry.follow([parent.job_id], deadline_s=30):
        seen.append((each.state, each.progress))
        if left:
            registry.update(ended(left.pop(0)))
    assert seen == [
        (JobState.RUNNING, Progress(0, 3)),
        (JobState.RUNNING, Progress(1, 3)),
        (JobState.RUNNING, Progress(2, 3)),
        (JobState.SUCCEEDED, Progress(3, 3)),
    ]


def test_following_ends_at_its_deadline(registry: Registry) -> None:
    made, done = job(), job()
    registry.record([made, done])
    registry.update(ended(done))
    following = registry.follow([made.job_id, done.job_id], deadline_s=0.05)
    assert [next(following), next(following)] == [made, ended(done)]
    with pytest.raises(TimedOut) as late:
        next(following)
    assert late.value.code == "job.wait_timeout"
    assert made.job_id in late.value.message
    assert done.job_id not in late.value.message


def test_an_unknown_job_is_not_followed(registry: Registry) -> None:
    with pytest.raises(NotFound) as refused:
        list(registry.follow([job().job_id], deadline_s=5))
    assert refused.value.code == "job.not_found"


def test_following_a_job_that_is_cancelled_ends(registry: Registry) -> None:
    made = job()
    registry.record([made])
    seen = []
    for each in registry.follow([made.job_id, made.job_id], deadline_s=30):
        seen.append(each.state)
        if len(seen) == 1:
            registry.request_cancel(made.job_id)
    assert seen == [JobState.QUEUED, JobState.CANCELLED]


# --- what is not there


def test_an_empty_registry_knows_nothing(registry: Registry) -> None:
    assert list(registry.nodes()) == []
    assert list(registry.jobs()) == []
    assert list(registry.open_jobs(NODE)) == []
    assert registry.tenant(ACME) is None
    assert registry.pool_node(WEB) is None
