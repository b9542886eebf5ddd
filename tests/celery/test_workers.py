"""Real workers, a real broker: routing, redelivery, duplicates, restarts."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from time import monotonic
from typing import Any

import pytest

from mvm.domain.ids import JobId, NodeId
from mvm.domain.job import Job, JobState, JobVerb
from mvm.drivers.locks import FileLocks
from mvm.drivers.sqlite_store import SqliteStore
from mvm.errors import MvmError
from mvm.services.jobs import Jobs
from tests.celery.conftest import NODES
from tests.support.waiting import until

POOL: list[tuple[JobVerb, str, dict[str, Any]]] = [
    (JobVerb.TENANT_CREATE, "acme", {}),
    (JobVerb.POOL_CREATE, "acme/web", {"flake_ref": "builtin:", "profile": "minimal", "start": "cold"}),
    (JobVerb.POOL_BUILD, "acme/web", {}),
    (JobVerb.INSTANCE_CREATE, "acme/web", {}),
]
pytestmark = [pytest.mark.redis, pytest.mark.timeout(180)]


def ended(fleet: Jobs, *ids: JobId, deadline_s: float = 60) -> dict[JobId, Job]:
    """The jobs once all are final."""
    return {job.job_id: job for job in fleet.follow(ids, deadline_s=deadline_s)}


def live(fleet: Jobs) -> None:
    until(lambda: all(fleet.is_node_live(node) for node in NODES), 60, "both workers' heartbeats")


def answers(fleet: Jobs) -> bool:
    try:
        fleet.list()
    except MvmError:
        return False
    return True


def test_each_job_runs_on_its_own_node(celery_setup: Any, fleet: Jobs) -> None:
    assert celery_setup.ready(ping=False, control=True, docker=True)
    live(fleet)
    jobs = [fleet.submit(JobVerb.TENANT_CREATE, f"t{n}", node, actor="test") for n, node in enumerate(NODES)]
    done = ended(fleet, *(job.job_id for job in jobs))
    assert {job.state for job in done.values()} == {JobState.SUCCEEDED}
    for job, worker in zip(jobs, celery_setup.worker_cluster, strict=True):
        with sqlite3.connect(worker.container.state_dir / "node.db") as db:
            assert db.execute("SELECT id FROM jobs WHERE final = 1").fetchall() == [(job.job_id,)]
        db.close()


def test_killed_workers_lose_and_repeat_nothing(celery_setup: Any, fleet: Jobs) -> None:
    """60 jobs while their worker is killed with -9 twice: each tenant exists once, none failed."""
    live(fleet)
    worker = celery_setup.worker_cluster[0]
    jobs = [fleet.submit(JobVerb.TENANT_CREATE, f"t{n}", NODES[0], actor="test") for n in range(60)]
    for threshold in (10, 30):
        until(
            lambda threshold=threshold: sum(fleet.job(j.job_id).state.final for j in jobs) >= threshold, 60, "progress"
        )
        worker.container._container.kill()
        worker.container._container.start()
    done = ended(fleet, *(job.job_id for job in jobs), deadline_s=90)
    assert {job.state for job in done.values()} == {JobState.SUCCEEDED}
    net_ids = [job.result["net_id"] for job in done.values() if job.result]
    assert len(set(net_ids)) == 60


def test_what_a_killed_worker_had_taken_comes_first(celery_setup: Any, fleet: Jobs) -> None:
    live(fleet)
    worker = celery_setup.worker_cluster[0]
    taken = fleet.new(JobVerb.TENANT_CREATE, "taken", NODES[0], actor="test")
    with locked(worker, f"job {taken.job_id}"):
        fleet._registry.record([taken])
        fleet.send_again([taken])
        until(lambda: fleet._queue._link.command("HLEN", "mvm:unacked:n1:main"), 20, "it is taken")  # type: ignore[attr-defined]
        worker.container._container.kill()
    others = [fleet.submit(JobVerb.TENANT_CREATE, f"t{n}", NODES[0], actor="test") for n in range(60)]
    worker.container._container.start()
    done = ended(fleet, taken.job_id, *(job.job_id for job in others), deadline_s=90)
    order = sorted(done.values(), key=lambda job: job.finished_at or job.submitted_at)
    assert taken.job_id in [job.job_id for job in order[:30]], "not behind all that wait"


def test_a_message_that_was_lost_is_sent_again_by_the_next_worker(celery_setup: Any, fleet: Jobs) -> None:
    live(fleet)
    lost = fleet.new(JobVerb.TENANT_CREATE, "lost", NODES[0], actor="test")
    fleet._registry.record([lost])  # as a kill between taking and noting a message leaves it
    worker = celery_setup.worker_cluster[0]
    worker.container._container.kill()
    worker.container._container.start()
    assert ended(fleet, lost.job_id)[lost.job_id].state is JobState.SUCCEEDED


def test_a_message_delivered_twice_runs_once(celery_setup: Any, fleet: Jobs) -> None:
    """50 jobs, each message sent twice: one tenant each, and every job succeeded."""
    live(fleet)
    jobs = [fleet.submit(JobVerb.TENANT_CREATE, f"t{n}", NODES[0], actor="test") for n in range(50)]
    fleet._queue.send(jobs)
    done = ended(fleet, *(job.job_id for job in jobs))
    assert {job.state for job in done.values()} == {JobState.SUCCEEDED}
    worker = celery_setup.worker_cluster[0]
    until(lambda: worker.logs().count("delivered again") == 50, 60, "all second deliveries seen")


def test_a_broker_restart_is_survived(celery_setup: Any, fleet: Jobs) -> None:
    live(fleet)
    before = fleet.submit(JobVerb.TENANT_CREATE, "before", NODES[1], actor="test")
    assert ended(fleet, before.job_id)[before.job_id].state is JobState.SUCCEEDED
    celery_setup.broker.restart()

    until(lambda: answers(fleet), 60, "the broker is back")
    after = fleet.submit(JobVerb.TENANT_CREATE, "after", NODES[1], actor="test")
    assert ended(fleet, after.job_id)[after.job_id].state is JobState.SUCCEEDED


def test_a_job_for_a_dead_worker_waits_and_says_why(celery_setup: Any, fleet: Jobs) -> None:
    live(fleet)
    celery_setup.worker_cluster[1].container._container.kill()
    until(lambda: not fleet.is_node_live(NODES[1]), 60, "the node is seen as gone")
    job = fleet.submit(JobVerb.TENANT_CREATE, "late", NODES[1], actor="test")
    assert fleet.job(job.job_id).state is JobState.QUEUED
    assert "no worker has taken it" in (fleet.diagnosis(job) or "")
    celery_setup.worker_cluster[1].container._container.start()
    assert ended(fleet, job.job_id)[job.job_id].state is JobState.SUCCEEDED


@contextmanager
def locked(worker: Any, name: str) -> Iterator[None]:
    """Keeps a job of `worker` waiting in its middle for as long as this lasts."""
    with FileLocks(worker.container.state_dir / "locks").hold(name, deadline_s=10):
        yield


def test_a_job_longer_than_the_visibility_timeout_is_delivered_once(celery_setup: Any, fleet: Jobs) -> None:
    live(fleet)
    worker = celery_setup.worker_cluster[0]
    for verb, subject, params in POOL:
        job = fleet.submit(verb, subject, NODES[0], params=params, actor="test")
        done = ended(fleet, job.job_id)[job.job_id]
        assert done.state is JobState.SUCCEEDED, done.error
    ref = (done.result or {})["instances"][0]["ref"]
    with locked(worker, f"instance {ref}"):
        long = fleet.submit(JobVerb.INSTANCE_START, ref, NODES[0], actor="test")
        until(lambda: fleet.job(long.job_id).state is JobState.RUNNING, 20, "it has begun")
        began = monotonic()  # the timeout is 6 s, and looked at every 2
        until(lambda: monotonic() - began > 14, 60, "twice the timeout has passed")
    done = ended(fleet, long.job_id)[long.job_id]
    assert (done.state, done.attempt, done.deaths) == (JobState.SUCCEEDED, 1, 0)
    assert worker.logs().count(f"Task mvm.instance.start[{long.job_id}] received") == 1


def test_a_partly_busy_worker_outlives_a_broker_restart(celery_setup: Any, fleet: Jobs) -> None:
    """In kombu 5.7.0 it ends (see `guard_detached_channels`)."""
    live(fleet)
    worker = celery_setup.worker_cluster[0]
    for verb, subject, params in POOL:
        job = fleet.submit(verb, subject, NODES[0], params=params, actor="test")
        done = ended(fleet, job.job_id)[job.job_id]
    ref = (done.result or {})["instances"][0]["ref"]
    with locked(worker, f"instance {ref}"):
        busy = fleet.submit(JobVerb.INSTANCE_START, ref, NODES[0], actor="test")
        until(lambda: fleet.job(busy.job_id).state is JobState.RUNNING, 20, "it has begun")
        celery_setup.broker.restart()
        until(lambda: answers(fleet), 60, "the broker is back")
    done = ended(fleet, busy.job_id)[busy.job_id]
    assert (done.state, done.deaths) == (JobState.SUCCEEDED, 0), "the same process, and once"
    after = fleet.submit(JobVerb.TENANT_CREATE, "after", NODES[0], actor="test")
    assert ended(fleet, after.job_id)[after.job_id].state is JobState.SUCCEEDED
    assert worker.container._container.status == "running"


def test_the_next_try_is_delivered_in_its_time(celery_setup: Any, fleet: Jobs) -> None:
    live(fleet)
    later = fleet.new(JobVerb.TENANT_CREATE, "later", NODES[0], actor="test")
    later = later.with_(retry_at=later.submitted_at + timedelta(seconds=3))
    fleet._registry.record([later])
    fleet.send_again([later])
    done = ended(fleet, later.job_id)[later.job_id]
    assert done.state is JobState.SUCCEEDED
    assert done.started_at is not None
    assert done.started_at >= later.retry_at


def test_a_message_before_its_time_is_sent_again_for_what_is_left(celery_setup: Any, fleet: Jobs) -> None:
    """As when the clock is set back while the worker's timer waits. Ten of them end as one job, and do not spin."""
    live(fleet)
    worker = celery_setup.worker_cluster[0]
    job = fleet.new(JobVerb.TENANT_CREATE, "early", NODES[0], actor="test")
    later = job.with_(attempt=1, attempts=3, retry_at=job.submitted_at + timedelta(seconds=3))
    fleet._registry.record([later])
    with closing(SqliteStore(worker.container.state_dir / "node.db")) as store:
        store.put_job(later)
    fleet.send_again([job] * 10)  # without the time that it is to wait for
    done = ended(fleet, job.job_id)[job.job_id]
    assert (done.state, done.attempt) == (JobState.SUCCEEDED, 2)
    assert done.finished_at is not None
    assert done.finished_at >= later.retry_at
    until(lambda: worker.logs().count("delivered again") == 9, 20, "every message has found the job ended")
    assert worker.logs().count("delivered before its time") < 20, "each once, unless a clock differs by a moment"
    assert fleet.queued(NODES[0]) == frozenset()


def test_what_is_taken_too_late_is_ended(celery_setup: Any, fleet: Jobs) -> None:
    live(fleet)
    late = fleet.new(JobVerb.TENANT_CREATE, "late", NODES[0], actor="test", expires_s=-1)
    fleet._registry.record([late])
    fleet.send_again([late])
    done = ended(fleet, late.job_id)[late.job_id]
    assert (done.state, (done.error or {})["code"]) == (JobState.CANCELLED, "job.expired")
    other = fleet.submit(JobVerb.TENANT_CREATE, "late", NODES[0], actor="test")
    assert ended(fleet, other.job_id)[other.job_id].state is JobState.SUCCEEDED, "nothing was made"


def test_what_a_dead_node_never_takes_expires_and_leaves_its_queue(celery_setup: Any, fleet: Jobs) -> None:
    live(fleet)
    dead = NodeId("n9")
    job = fleet.submit(JobVerb.TENANT_CREATE, "late", dead, actor="test", expires_s=0.5)
    kept = fleet.submit(JobVerb.TENANT_CREATE, "kept", dead, actor="test")
    until(lambda: [late.job_id for late in fleet.expire()] == [job.job_id], 10, "it is late")
    told = fleet.job(job.job_id)
    assert (told.state, (told.error or {})["code"]) == (JobState.CANCELLED, "job.expired")
    assert fleet.queued(dead) == {kept.job_id}
