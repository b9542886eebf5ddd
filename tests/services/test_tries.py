"""Tries, deadlines, poison, expiry and what is left in the middle: over the fake host."""

from __future__ import annotations

import os
import sqlite3
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from mvm.domain.ids import InstanceRef, NodeId
from mvm.domain.instance import InFlight, Instance
from mvm.domain.job import Job, JobState, JobVerb
from mvm.domain.lifecycle import Status, Verb
from mvm.drivers import sqlite_store
from mvm.drivers.processes import goes_on, name_of
from mvm.errors import Fenced, NotAllowed, TimedOut, Unreachable
from mvm.services.runner import Workers
from tests.services.conftest import NODE, Node
from tests.support.command_line import CommandLine
from tests.support.make import job as make_job

V = JobVerb
BUSY = TimedOut("cgroup.busy", "busy")


class Killed(BaseException):
    """Stands for SIGKILL: no handler runs after it."""


def kill_at(monkeypatch: pytest.MonkeyPatch, part: object, method: str) -> None:
    """The worker dies after `method` of a part of the host has done its work."""
    real = getattr(part, method)

    def then_die(*args: object, **kwargs: object) -> None:
        real(*args, **kwargs)
        raise Killed

    monkeypatch.setattr(part, method, then_die)


def deliver(node: Node, job: Job) -> Job | None:
    """One delivery of `job`; None when its worker died of it."""
    try:
        return node.services.runner.run(job)
    except Killed:
        return None


def test_a_transient_failure_is_undone_and_tried_again_later(node: Node) -> None:
    node.pool()
    (ref,) = node.create()
    node.host.fail("network.ensure_tap", BUSY)
    job = node.submit(V.INSTANCE_START, ref)
    assert node.queue.drain(node.services.runner.run) == 1
    between = node.services.jobs.job(job.job_id)
    assert (between.state, between.attempt, between.attempts) == (JobState.QUEUED, 1, 3)
    assert [s["code"] for s in between.setbacks] == ["cgroup.busy"]
    assert between.retry_at is not None
    assert timedelta(seconds=0.5) <= between.retry_at - node.clock.now() <= timedelta(seconds=1)
    assert node.instance(ref).in_flight is None
    assert not node.host.leaks()
    assert node.services.runner.run(job).state is JobState.QUEUED, "a message too many does not hurry it"
    node.drain()
    done = node.services.jobs.job(job.job_id)
    assert (done.state, done.attempt, done.error, done.retry_at) == (JobState.SUCCEEDED, 2, None, None)
    assert node.instance(ref).status is Status.RUNNING


def test_a_store_that_another_program_has_locked_fails_no_job(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is locked for longer than a write waits, in the middle of a job."""
    monkeypatch.setattr(sqlite_store, "_BUSY_MS", 50)
    node.pool()
    (ref,) = node.create()
    node.services.store.close()  # type: ignore[attr-defined]
    other = sqlite3.connect(tmp_path / "node.db", isolation_level=None)
    real, times = node.services.store.save_instance, [1]

    def lock(instance: Instance) -> Instance:
        if not times:
            return real(instance)
        times.clear()
        other.execute("BEGIN IMMEDIATE")
        try:
            return real(instance)
        finally:
            other.execute("ROLLBACK")

    monkeypatch.setattr(node.services.store, "save_instance", lock)
    job = node.submit(V.INSTANCE_START, ref)
    node.drain()
    done = node.services.jobs.job(job.job_id)
    assert (done.state, [s["code"] for s in done.setbacks]) == (JobState.SUCCEEDED, ["store.busy"])
    other.close()


def test_a_clock_set_back_while_a_next_try_waits_does_not_strand_it(node: Node) -> None:
    node.host.fail("network.ensure_bridge", BUSY)
    job = node.submit(V.TENANT_CREATE, "temp")
    node.queue.drain(node.services.runner.run)
    (only,) = node.queue.waiting(f"node.{NODE}")
    node.queue.discard(NODE, frozenset({job.job_id}))
    assert node.services.runner.run(only).state is JobState.QUEUED, "its time has not come by this clock"
    assert [again.retry_at for again in node.queue.waiting(f"node.{NODE}")] == [only.retry_at], "one for one"
    node.drain()
    assert node.services.jobs.job(job.job_id).state is JobState.SUCCEEDED


def test_tries_are_bounded_and_their_errors_told(node: Node) -> None:
    node.pool()
    (ref,) = node.create()
    node.host.fail("network.ensure_tap", BUSY, times=3)
    job = node.fails("cgroup.busy", V.INSTANCE_START, ref)
    assert (job.attempt, len(job.setbacks)) == (3, 2)
    assert not node.host.leaks()
    node.ok(V.INSTANCE_START, ref)


def test_one_that_waits_for_its_next_try_can_be_cancelled(node: Node) -> None:
    node.pool()
    (ref,) = node.create()
    node.host.fail("network.ensure_tap", BUSY, times=9)
    job = node.submit(V.INSTANCE_START, ref)
    node.queue.drain(node.services.runner.run)
    assert node.services.jobs.cancel(job.job_id).state is JobState.CANCELLED
    node.drain()
    assert node.services.store.unfinished_jobs() == []
    assert not node.host.leaks()


def test_job_show_tells_of_tries(node: Node, mvm: CommandLine) -> None:
    node.pool()
    (ref,) = node.create()
    node.services.heartbeat.beat()
    node.host.fail("network.ensure_tap", BUSY, times=9)
    job = node.submit(V.INSTANCE_START, ref)
    node.queue.drain(node.services.runner.run)
    shown = mvm.json("job", "show", str(job.job_id))
    assert (shown["attempt"], shown["attempts"], shown["state"]) == (1, 3, "queued")
    assert shown["note"].startswith("try 2 of 3 comes at ")
    text = mvm("job", "show", str(job.job_id)).stdout
    assert "busy [cgroup.busy]" in text
    node.drain()
    told = mvm("job", "show", str(job.job_id)).stdout
    assert told.count("busy [cgroup.busy]") == 2
    assert "deadline_at" not in told


def test_a_next_try_whose_message_was_lost_is_sent_by_a_sweep(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.pool()
    (ref,) = node.create()
    node.host.fail("network.ensure_tap", BUSY)
    job = node.submit(V.INSTANCE_START, ref)

    def away(*_: object) -> None:
        raise Unreachable("broker.unreachable", "away")

    with monkeypatch.context() as patch:
        patch.setattr(node.queue, "send", away)
        patch.setattr(node.registry, "update", away)
        node.queue.drain(node.services.runner.run)
    assert node.services.jobs.job(job.job_id).state is JobState.QUEUED
    node.clock.advance(40)
    node.sweep(V.SWEEP_ORPHANS)
    assert node.services.jobs.job(job.job_id).state is JobState.SUCCEEDED


def test_a_running_job_whose_worker_and_message_are_gone_is_sent_by_a_sweep(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.pool()
    (ref,) = node.create()
    job = node.submit(V.INSTANCE_START, ref)
    with monkeypatch.context() as patch:
        kill_at(patch, node.host.network, "ensure_tap")
        with pytest.raises(Killed):
            node.drain()
    assert node.services.jobs.job(job.job_id).state is JobState.RUNNING
    node.clock.advance(31)
    assert str(job.job_id) in node.sweep(V.SWEEP_ORPHANS)["sent_again"]
    done = node.services.jobs.job(job.job_id)
    assert (done.state, done.deaths) == (JobState.SUCCEEDED, 1)
    assert len(node.host.vmm.processes()) == 1


@pytest.mark.parametrize("verb", [V.INSTANCE_START, V.INSTANCE_WAKE, V.INSTANCE_SLEEP, V.INSTANCE_WARM])
def test_a_job_that_workers_die_of_is_given_up_and_undone(
    node: Node, monkeypatch: pytest.MonkeyPatch, verb: JobVerb
) -> None:
    node.pool()
    (ref,) = node.create()
    if verb is not V.INSTANCE_START:
        node.ok(V.INSTANCE_START, ref)
    if verb is V.INSTANCE_WAKE:
        node.ok(V.INSTANCE_SLEEP, ref)
    before = node.instance(ref).status
    where: tuple[object, str] = {
        V.INSTANCE_START: (node.host.guest, "configure"),
        V.INSTANCE_WAKE: (node.host.vmm, "restore"),
        V.INSTANCE_SLEEP: (node.host.guest, "prepare_sleep"),
        V.INSTANCE_WARM: (node.host.vmm, "pause"),
    }[verb]
    job = node.submit(verb, ref)
    with monkeypatch.context() as patch:
        kill_at(patch, *where)
        for _ in range(5):
            assert deliver(node, job) is None
        final = deliver(node, job)
    assert final is not None
    assert final.error is not None
    assert (final.state, final.error["code"], final.deaths) == (JobState.FAILED, "job.poison", 5)
    assert len(final.setbacks) == 5
    rests = node.instance(ref)
    assert rests.in_flight is None
    assert rests.status is before
    assert not node.host.leaks()
    assert (InstanceRef.parse(ref) in node.host.vmm.processes()) == (rests.status is Status.RUNNING)
    assert deliver(node, job) == final, "delivered again it stays so"
    node.drain()
    node.ok(V.INSTANCE_DESTROY, ref)
    assert not node.host.leaks()


def test_workers_that_die_of_undoing_a_job_end_that_too(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.pool()
    (ref,) = node.create()
    job = node.submit(V.INSTANCE_START, ref)
    with monkeypatch.context() as patch:
        kill_at(patch, node.host.network, "ensure_tap")
        kill_at(patch, node.host.vmm, "kill")
        outcomes = [deliver(node, job) for _ in range(7)]
    assert outcomes[:6] == [None] * 6
    assert outcomes[6] is not None
    assert (outcomes[6].error or {})["code"] == "job.poison"
    assert node.instance(ref).in_flight is not None
    assert node.sweep(V.SWEEP_STALE_PIDS)["settled"] == [ref], "the mark goes with the next sweep"
    assert node.instance(ref).status is Status.READY
    assert not node.host.leaks()


def test_a_create_that_workers_die_of_leaves_nothing(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.pool(data_disk_mib=16)
    job = node.submit(V.INSTANCE_CREATE, "acme/web", count=3)
    with monkeypatch.context() as patch:
        kill_at(patch, node.host.storage, "prepare")
        while (final := deliver(node, job)) is None:
            pass
    assert (final.error or {})["code"] == "job.poison"
    assert node.services.store.instances() == []
    assert not node.host.storage.instances()


def test_past_its_deadline_a_job_is_undone(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.pool()
    (ref,) = node.create()
    real = node.host.network.ensure_tap

    def slow(*args: Any, **kwargs: Any) -> None:
        real(*args, **kwargs)
        node.clock.advance(901)

    monkeypatch.setattr(node.host.network, "ensure_tap", slow)
    job = node.fails("job.deadline", V.INSTANCE_START, ref)
    assert job.error is not None
    assert (job.error["kind"], job.attempt, job.error["fields"]["deadline_s"]) == ("overdue", 1, 900.0)
    assert node.instance(ref).in_flight is None
    assert not node.host.leaks()
    assert not node.host.vmm.processes()
    monkeypatch.undo()
    node.ok(V.INSTANCE_START, ref)


def test_what_failed_can_be_asked_for_again(node: Node, mvm: CommandLine) -> None:
    node.pool()
    (ref,) = node.create()
    failed = node.fails("instance.invalid_transition", V.INSTANCE_STOP, ref)
    node.ok(V.INSTANCE_START, ref)
    shown = mvm.json("job", "retry", str(failed.job_id))
    assert (shown["verb"], shown["subject"], shown["state"]) == ("instance.stop", ref, "succeeded")
    assert shown["retry_of"] == failed.job_id != shown["job_id"]
    with pytest.raises(NotAllowed) as refused:
        node.services.jobs.retry(shown["job_id"], actor="test")
    assert refused.value.code == "job.not_failed"


def test_of_a_bulk_job_the_children_that_failed_are_asked_for_again(node: Node) -> None:
    node.pool()
    refs = node.create(3)
    node.ok(V.INSTANCE_START, refs[0])
    parent = node.services.jobs.submit_bulk(V.INSTANCE_STOP, refs, lambda _: NODE, parallel=2, actor="test")
    node.drain()
    assert node.services.jobs.job(parent.job_id).state is JobState.FAILED
    for ref in refs[1:]:
        node.ok(V.INSTANCE_START, ref)
    again = node.services.jobs.retry(parent.job_id, actor="test")
    node.drain()
    done = node.services.jobs.job(again.job_id)
    assert (done.state, done.progress.total, done.retry_of) == (JobState.SUCCEEDED, 2, parent.job_id)
    assert {child.subject for child in node.services.jobs.children(again.job_id)} == set(refs[1:])


def test_what_nobody_takes_expires_and_says_so(node: Node) -> None:
    dead = NodeId("n2")
    job = node.services.jobs.submit(V.TENANT_CREATE, "late", dead, actor="test", expires_s=60)
    begun = node.submit(V.TENANT_CREATE, "acme")
    node.queue.drain(node.services.runner.run, node=NODE)
    node.clock.advance(59)
    assert node.services.jobs.expire() == []
    node.clock.advance(1)
    node.services.jobs.sweep(V.SWEEP_ORPHANS, every_s=60)
    told = node.services.jobs.job(job.job_id)
    assert told.error is not None
    assert (told.state, told.error["code"]) == (JobState.CANCELLED, "job.expired")
    assert node.queue.queued(dead) == frozenset(), "its message is gone, too"
    assert node.services.jobs.job(begun.job_id).state is JobState.SUCCEEDED
    again = node.services.jobs.retry(job.job_id, actor="test")
    assert node.queue.queued(dead) == {again.job_id}


def test_what_is_taken_too_late_is_dropped_unless_it_had_begun(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    late = node.services.jobs.submit(V.TENANT_CREATE, "late", NODE, actor="test", expires_s=60)
    begun = node.services.jobs.submit(V.TENANT_CREATE, "begun", NODE, actor="test", expires_s=60)
    with monkeypatch.context() as patch:
        kill_at(patch, node.services.store, "put_tenant")
        assert deliver(node, begun) is None
    node.clock.advance(60)
    node.drain()
    told = node.services.jobs.job(late.job_id)
    assert (told.state, (told.error or {})["code"]) == (JobState.CANCELLED, "job.expired")
    assert node.services.store.job(late.job_id) == told
    assert node.services.runner.run(late) == told, "whatever message of it still comes"
    node.services.runner.run(begun)
    assert node.services.jobs.job(begun.job_id).state is JobState.SUCCEEDED


@pytest.mark.parametrize("known", [False, True])
def test_a_mark_whose_job_is_over_goes(node: Node, known: bool) -> None:
    node.pool()
    (ref,) = node.create()
    node.ok(V.INSTANCE_START, ref)
    over = node.services.store.last_job(ref) if known else make_job()
    assert over is not None
    instance = node.instance(ref)
    marked = instance.moved(instance.status)
    node.services.store.save_instance(
        type(marked)(
            **{**{f: getattr(marked, f) for f in marked.__slots__}, "in_flight": InFlight(over.job_id, Verb.WARM)}
        )
    )
    node.host.vmm.pause(InstanceRef.parse(ref), instance.process)  # type: ignore[arg-type]
    assert node.sweep(V.SWEEP_STALE_PIDS)["settled"] == [ref]
    rests = node.instance(ref)
    assert (rests.status, rests.in_flight) == (Status.RUNNING, None)
    assert not node.host.machines[InstanceRef.parse(ref)].paused


def test_a_job_of_which_another_run_has_begun_writes_nothing_any_more(node: Node) -> None:
    store, job = node.services.store, make_job(state=JobState.RUNNING, attempt=1)
    store.put_job(job)
    store.put_job(job.with_(step="boot"))
    store.put_job(job.with_(deaths=1))
    with pytest.raises(Fenced) as late:
        store.put_job(job.with_(step="late"))
    assert late.value.code == "job.taken_over"
    store.put_job(job.with_(deaths=1, state=JobState.SUCCEEDED))
    with pytest.raises(Fenced):
        store.put_job(job.with_(deaths=2))
    assert store.job(job.job_id) == job.with_(deaths=1, state=JobState.SUCCEEDED)


@pytest.mark.parametrize("then", ["goes on", "fails"])
def test_a_worker_that_comes_back_late_neither_acts_nor_undoes(
    node: Node, monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    """While its TAP was made another job took the instance over, as if its lock had been broken."""
    node.pool()
    (ref,) = node.create()
    real, job = node.host.network.ensure_tap, node.submit(V.INSTANCE_START, ref)

    def overtaken(*args: Any, **kwargs: Any) -> None:
        monkeypatch.setattr(node.host.network, "ensure_tap", real)
        mine = frozenset(node.host.held)
        node.host.held.clear()
        node.ok(V.INSTANCE_START, ref)
        node.host.held.update(mine)
        if then == "fails":
            raise BUSY

    monkeypatch.setattr(node.host.network, "ensure_tap", overtaken)
    node.drain()
    late = node.services.jobs.job(job.job_id)
    assert (late.error or {})["code"] == "job.fenced"
    runs = node.instance(ref)
    assert (runs.status, runs.in_flight, runs.last_error) == (Status.RUNNING, None, None)
    assert len(node.host.vmm.processes()[InstanceRef.parse(ref)]) == 1
    assert not node.host.leaks()


@pytest.mark.parametrize(("alive", "deaths", "attempt"), [(True, 0, 2), (False, 1, 1)])
def test_a_death_is_counted_only_for_a_worker_that_is_dead(node: Node, alive: bool, deaths: int, attempt: int) -> None:
    """A job is left in the middle by a worker whose store did not answer, too: that one lives."""
    runner = node.services.runner
    runner._workers = Workers(name_of(os.getpid()), goes_on)
    job = node.services.jobs.new(JobVerb.TENANT_CREATE, "acme", NODE, actor="test")
    worker = name_of(os.getpid()) if alive else f"{os.getpid()}:1"
    left = job.with_(state=JobState.RUNNING, attempt=1, attempts=3, started_at=job.submitted_at, worker=worker)
    node.services.store.put_job(left)
    done = runner.run(job)
    assert (done.state, done.deaths, done.attempt) == (JobState.SUCCEEDED, deaths, attempt)
    assert done.worker == name_of(os.getpid())
    assert [setback["code"] for setback in done.setbacks] == ["job.worker_died"] * deaths
