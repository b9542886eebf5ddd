from __future__ import annotations

from datetime import timedelta

import pytest

from mvm.domain.ids import NodeId
from mvm.domain.job import Job, Lane
from mvm.drivers.fake import ManualClock
from mvm.drivers.memory_queue import MemoryQueue
from mvm.errors import Unreachable
from tests.support.make import NODE, job

N2 = NodeId("n2")


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def queue(clock: ManualClock) -> MemoryQueue:
    return MemoryQueue(clock)


def test_jobs_are_delivered_in_the_order_they_were_sent(queue: MemoryQueue) -> None:
    jobs = [job() for _ in range(5)]
    queue.send(jobs[:3])
    queue.send(jobs[3:])
    assert list(queue.waiting("node.n1")) == jobs
    got: list[Job] = []
    assert queue.drain(got.append) == 5
    assert got == jobs
    assert queue.drain(got.append) == 0


def test_urgent_jobs_have_their_own_queue_and_bulk_gives_way(queue: MemoryQueue) -> None:
    bulk, normal, urgent = job(lane=Lane.BULK), job(), job(lane=Lane.URGENT)
    queue.send([bulk, normal, urgent])
    assert list(queue.waiting("node.n1")) == [normal, bulk]
    assert list(queue.waiting("node.n1.urgent")) == [urgent]
    got: list[Job] = []
    queue.drain(got.append)
    assert got == [urgent, normal, bulk]


def test_what_a_job_sends_is_delivered_too(queue: MemoryQueue) -> None:
    first, second = job(), job()
    queue.send([first])
    assert queue.drain(lambda each: queue.send([second]) if each == first else None) == 2


def test_another_nodes_jobs_wait(queue: MemoryQueue) -> None:
    here, there = job(), job(node_id=N2)
    queue.send([there, here])
    got: list[Job] = []
    assert queue.drain(got.append, node=NODE) == 1
    assert got == [here]
    assert list(queue.waiting("node.n2")) == [there]


def test_the_next_try_waits_for_its_time_and_holds_nobody_up(queue: MemoryQueue, clock: ManualClock) -> None:
    later, now = job(retry_at=clock.now() + timedelta(seconds=5)), job()
    queue.send([later, now])
    got: list[Job] = []
    assert queue.drain(got.append) == 1
    assert queue.next_due() == later.retry_at
    clock.advance(5)
    assert queue.drain(got.append) == 1
    assert got == [now, later]


def test_messages_can_be_taken_out(queue: MemoryQueue) -> None:
    dropped, kept = job(), job()
    queue.send([dropped, kept])
    queue.discard(N2, frozenset({dropped.job_id}))
    queue.discard(NODE, frozenset({dropped.job_id}))
    assert list(queue.waiting("node.n1")) == [kept]


def test_a_broker_that_is_down_says_so(queue: MemoryQueue) -> None:
    queue.down = True
    with pytest.raises(Unreachable) as refused:
        queue.send([job()])
    assert refused.value.code == "broker.unreachable"
    queue.down = False
    assert list(queue.waiting("node.n1")) == []
