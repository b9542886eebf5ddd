"""Templates, clones, warm and sleeping instances on the fake host."""

from __future__ import annotations

from typing import Any

import pytest

from mvm.domain.ids import InstanceRef, NodeId, PoolRef
from mvm.domain.instance import ProcessIdentity
from mvm.domain.job import JobState, JobVerb
from mvm.domain.lifecycle import Status
from mvm.errors import Failed, GuestRefused, GuestSilent, MvmError, NotFound, TimedOut
from mvm.ports.store import Note
from tests.services.conftest import Node

V = JobVerb


def running(node: Node, count: int = 1, **resources: int) -> list[str]:
    node.pool(**resources)
    refs = node.create(count)
    for ref in refs:
        node.ok(V.INSTANCE_START, ref)
    return refs


def template(node: Node) -> str:
    pool = node.services.store.pool(PoolRef.parse("acme/web"))
    assert pool.revision is not None
    return str(node.host.vmm.manifest(node.host.storage.template(pool.ref, pool.revision)).id)


def test_instances_are_cloned_from_one_template(node: Node) -> None:
    refs = running(node, 3)
    assert all(node.instance(ref).cloned for ref in refs)
    assert len({str(node.host.vmm.processes()[InstanceRef.parse(ref)]) for ref in refs}) == 3
    assert set(node.host.vmm.processes()) == {InstanceRef.parse(ref) for ref in refs}, "the template's VMM has ended"
    assert node.host.storage.instances() == {InstanceRef.parse(ref) for ref in refs}


def test_where_a_template_cannot_be_restored_the_guest_is_booted(node: Node) -> None:
    node.pool()
    (ref,) = node.create()
    node.host.fail("vmm.clone", Failed("snapshot.damaged", "devices differs from its manifest"))
    (remark,) = node.ok(V.INSTANCE_START, ref)["remarks"]
    assert "devices differs" in remark
    assert "snapshot.damaged" in remark
    assert node.instance(ref).cloned is False
    assert not node.host.leaks()


@pytest.mark.parametrize("asleep", [True, False])
def test_a_damaged_template_is_made_anew_unless_somebody_sleeps_on_it(node: Node, asleep: bool) -> None:
    node.pool()
    first, second, third = node.create(3)
    node.ok(V.INSTANCE_START, first)
    made = template(node)
    if asleep:
        node.ok(V.INSTANCE_SLEEP, first)
    node.host.fail("vmm.clone", Failed("snapshot.damaged", "devices differs from its manifest"))
    node.ok(V.INSTANCE_START, second)
    node.ok(V.INSTANCE_START, third)
    assert (template(node) == made) is asleep


def test_a_clone_that_does_not_acknowledge_is_destroyed(node: Node) -> None:
    node.pool()
    (ref,) = node.create()
    node.host.fail("guest.configure", GuestRefused("guest.refused", "no clock", missing=["clock"]))
    job = node.fails("guest.refused", V.INSTANCE_START, ref)
    assert job.error is not None
    assert job.error["fields"]["missing"] == ["clock"]
    assert not node.host.vmm.processes()
    assert node.instance(ref).status is Status.READY


def test_warm_and_back(node: Node) -> None:
    (ref,) = running(node)
    pid = node.instance(ref).process
    assert node.ok(V.INSTANCE_WARM, ref)["status"] == "warm"
    node.fails("instance.invalid_transition", V.INSTANCE_WARM, ref)
    assert node.ok(V.INSTANCE_WAKE, ref)["status"] == "running"
    node.fails("instance.invalid_transition", V.INSTANCE_WAKE, ref)
    node.ok(V.INSTANCE_WARM, ref)
    assert node.ok(V.INSTANCE_START, ref)["status"] == "running"
    assert node.instance(ref).process == pid


@pytest.mark.parametrize("first", [None, V.INSTANCE_WARM])
def test_sleep_and_wake_for_generations(node: Node, first: JobVerb | None) -> None:
    (ref,) = running(node)
    for _ in range(3):
        if first:
            node.ok(first, ref)
        asleep = node.ok(V.INSTANCE_SLEEP, ref)
        assert asleep["status"] == "sleeping"
        assert asleep["snapshot_bytes"] > 0
        assert asleep["pid"] is None
        assert not node.host.vmm.processes()
        assert not node.host.network.taps()
        assert node.ok(V.INSTANCE_WAKE, ref)["status"] == "running"
        assert set(node.host.network.taps()) == {"tn0i3"}


def test_a_stopped_instance_cannot_sleep(node: Node) -> None:
    (ref,) = running(node)
    node.ok(V.INSTANCE_STOP, ref)
    node.fails("instance.invalid_transition", V.INSTANCE_SLEEP, ref)
    node.fails("instance.invalid_transition", V.INSTANCE_WAKE, ref)


def test_a_guest_that_does_not_get_ready_is_not_put_to_sleep_unless_forced(node: Node) -> None:
    (ref,) = running(node)
    node.host.fail("guest.prepare_sleep", GuestSilent("guest.silent", "no answer"), times=2)
    job = node.fails("guest.not_ready", V.INSTANCE_SLEEP, ref)
    assert job.error is not None
    assert "--force" in job.error["hint"]
    assert node.instance(ref).status is Status.RUNNING
    assert node.ok(V.INSTANCE_SLEEP, ref, force=True)["status"] == "sleeping"


def test_a_full_disk_leaves_the_guest_running(node: Node) -> None:
    (ref,) = running(node)
    node.host.fail("vmm.save", Failed("disk.full", "no space left"))
    node.fails("disk.full", V.INSTANCE_SLEEP, ref)
    assert node.instance(ref).status is Status.RUNNING
    assert len(node.host.vmm.processes()) == 1
    node.ok(V.INSTANCE_SLEEP, ref)


def test_a_full_disk_leaves_a_warm_guest_warm(node: Node) -> None:
    (ref,) = running(node)
    node.ok(V.INSTANCE_WARM, ref)
    node.host.fail("vmm.save", Failed("disk.full", "no space left"))
    node.fails("disk.full", V.INSTANCE_SLEEP, ref)
    instance = node.instance(ref)
    assert instance.status is Status.WARM
    assert instance.process is not None
    assert node.host.vmm.paused(instance.ref, instance.process)


def test_a_destroyed_pool_leaves_no_template(node: Node) -> None:
    (ref,) = running(node)
    pool = node.services.store.pool(PoolRef.parse("acme/web"))
    assert pool.revision is not None
    node.ok(V.INSTANCE_DESTROY, ref)
    node.ok(V.POOL_DESTROY, "acme/web")
    with pytest.raises(NotFound):
        node.host.vmm.manifest(node.host.storage.template(pool.ref, pool.revision))


def test_what_cannot_be_restored_is_refused_and_can_be_started_anew(node: Node) -> None:
    (ref,) = running(node)
    node.ok(V.INSTANCE_SLEEP, ref)
    node.host.fail("vmm.restore", Failed("snapshot.damaged", "memory differs from its manifest"), times=2)
    node.fails("snapshot.damaged", V.INSTANCE_WAKE, ref)
    node.fails("snapshot.damaged", V.INSTANCE_START, ref)
    assert node.instance(ref).status is Status.SLEEPING
    assert not node.host.network.taps()
    assert not node.host.vmm.processes()
    assert node.ok(V.INSTANCE_START, ref, force=True)["status"] == "running"


def test_a_forced_start_that_fails_before_it_begins_forgets_nothing(node: Node) -> None:
    (ref,) = running(node)
    node.ok(V.INSTANCE_SLEEP, ref)
    node.host.fail("storage.revision", Failed("revision.damaged", "rootfs is missing"))
    node.fails("revision.damaged", V.INSTANCE_START, ref, force=True)
    assert node.instance(ref).status is Status.SLEEPING
    node.ok(V.INSTANCE_WAKE, ref)


@pytest.mark.parametrize("status", [V.INSTANCE_WARM, V.INSTANCE_SLEEP])
@pytest.mark.parametrize("end", [V.INSTANCE_STOP, V.INSTANCE_DESTROY])
def test_warm_and_sleeping_ones_can_be_ended(node: Node, status: JobVerb, end: JobVerb) -> None:
    (ref,) = running(node)
    node.ok(status, ref)
    node.ok(end, ref)
    assert not node.host.leaks()
    assert not node.host.vmm.processes()


def test_quota_full_on_wake(node: Node) -> None:
    node.ok(V.TENANT_CREATE, "acme", quota={"max_running": 1})
    first, second = running(node, 1)[0], node.create()[0]
    node.ok(V.INSTANCE_SLEEP, first)
    node.ok(V.INSTANCE_START, second)
    job = node.fails("quota.exceeded", V.INSTANCE_WAKE, first)
    assert job.error is not None
    assert job.error["fields"]["field"] == "max_running"
    assert node.instance(first).status is Status.SLEEPING


def test_sweeps_leave_sleeping_and_warm_ones_alone(node: Node) -> None:
    asleep, warm = running(node, 2)
    node.ok(V.INSTANCE_SLEEP, asleep)
    node.ok(V.INSTANCE_WARM, warm)
    for _ in range(2):
        assert node.sweep(V.SWEEP_ORPHANS)["found"] == []
        assert node.sweep(V.SWEEP_STALE_PIDS)["changed"] is False
        node.clock.advance(120)
    node.ok(V.INSTANCE_WAKE, asleep)
    node.ok(V.INSTANCE_WAKE, warm)


class Killed(BaseException):
    """Stands for SIGKILL."""


@pytest.mark.parametrize(
    ("verb", "part", "point"),
    [(V.INSTANCE_SLEEP, p, n) for p, n in (("guest", "prepare_sleep"), ("vmm", "save"), ("network", "remove_taps"))]
    + [(V.INSTANCE_WAKE, p, n) for p, n in (("network", "ensure_tap"), ("vmm", "restore"), ("vmm", "resume"),
                                           ("guest", "wake"), ("vmm", "discard"))],
)  # fmt: skip
@pytest.mark.parametrize("also_vmm", [False, True])
def test_a_killed_worker_leaves_what_is_true_and_can_go_on(
    node: Node, verb: JobVerb, part: str, point: str, also_vmm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (ref,) = running(node)
    if verb is V.INSTANCE_WAKE:
        node.ok(V.INSTANCE_SLEEP, ref)
    holder = getattr(node.host, part)
    real = getattr(holder, point)

    def then_die(*args: object, **kwargs: object) -> None:
        real(*args, **kwargs)
        raise Killed

    job = node.submit(verb, ref)
    monkeypatch.setattr(holder, point, then_die)
    with pytest.raises(Killed):
        node.drain()
    monkeypatch.setattr(holder, point, real)
    if also_vmm:
        node.host.kill_process(InstanceRef.parse(ref))
    node.queue.send([job])
    node.drain()
    done = node.services.jobs.job(job.job_id)
    assert done.state.final
    node.sweep(V.SWEEP_STALE_PIDS)
    node.sweep(V.SWEEP_ORPHANS)
    node.clock.advance(61)
    node.sweep(V.SWEEP_ORPHANS)
    status = node.instance(ref).status
    runs = InstanceRef.parse(ref) in node.host.vmm.processes()
    assert runs == (status is Status.RUNNING), (status, done.error)
    if done.state is JobState.SUCCEEDED and not (also_vmm and status is Status.STOPPED):
        assert status is (Status.SLEEPING if verb is V.INSTANCE_SLEEP else Status.RUNNING)
    again = {Status.RUNNING: V.INSTANCE_SLEEP, Status.SLEEPING: V.INSTANCE_WAKE}.get(status, V.INSTANCE_START)
    node.ok(again, ref)
    node.ok(V.INSTANCE_DESTROY, ref)
    assert not node.host.leaks()


@pytest.mark.parametrize(
    ("part", "point"),
    [("network", "ensure_tap"), ("vmm", "restore"), ("vmm", "resume"), ("guest", "wake"), ("vmm", "discard")],
)
@pytest.mark.parametrize("also_vmm", [False, True])
def test_what_a_killed_agent_had_begun_is_finished_when_it_starts(
    node: Node, part: str, point: str, also_vmm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (ref,) = running(node)
    node.ok(V.INSTANCE_SLEEP, ref)
    holder = getattr(node.host, part)
    real = getattr(holder, point)

    def then_die(*args: object, **kwargs: object) -> None:
        real(*args, **kwargs)
        raise Killed

    monkeypatch.setattr(holder, point, then_die)
    with pytest.raises(Killed):
        node.services.urgent.wake(InstanceRef.parse(ref), "test")
    monkeypatch.setattr(holder, point, real)
    if also_vmm:
        node.host.kill_process(InstanceRef.parse(ref))
    node.services.urgent.take_up()
    assert node.instance(ref).in_flight is None
    assert not node.services.store.unfinished_jobs()
    node.sweep(V.SWEEP_STALE_PIDS)
    status = node.instance(ref).status
    assert (InstanceRef.parse(ref) in node.host.vmm.processes()) == (status is Status.RUNNING)
    if not also_vmm:
        assert status is Status.RUNNING
    elif status is not Status.RUNNING:
        node.ok(V.INSTANCE_START, ref, **({"force": True} if status is Status.SLEEPING else {}))
    node.ok(V.INSTANCE_DESTROY, ref)
    assert not node.host.leaks()


@pytest.mark.parametrize(("part", "point"), [("guest", "prepare_sleep"), ("vmm", "save")])
def test_an_urgent_wake_does_not_answer_from_what_a_killed_worker_left(
    node: Node, part: str, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (ref,) = running(node)
    holder = getattr(node.host, part)
    real = getattr(holder, point)

    def then_die(*args: object, **kwargs: object) -> None:
        real(*args, **kwargs)
        raise Killed

    job = node.submit(V.INSTANCE_SLEEP, ref)
    monkeypatch.setattr(holder, point, then_die)
    with pytest.raises(Killed):
        node.drain()
    monkeypatch.setattr(holder, point, real)
    answer = node.services.urgent.wake(InstanceRef.parse(ref), "test")
    assert answer["waited_for"] == job.job_id
    assert answer["job_id"] != job.job_id, "it slept, and was woken"
    assert InstanceRef.parse(ref) in node.host.vmm.processes()
    assert node.instance(ref).status is Status.RUNNING


def test_a_warm_guest_is_asked_too_before_it_sleeps(node: Node) -> None:
    (ref,) = running(node)
    node.ok(V.INSTANCE_WARM, ref)
    node.host.fail("guest.prepare_sleep", GuestSilent("guest.silent", "no answer"))
    node.fails("guest.not_ready", V.INSTANCE_SLEEP, ref)
    assert node.instance(ref).status is Status.WARM
    process = node.instance(ref).process
    assert process is not None
    assert node.host.vmm.paused(InstanceRef.parse(ref), process)
    assert node.ok(V.INSTANCE_SLEEP, ref)["status"] == "sleeping"


def test_quota_of_warm_ones(node: Node) -> None:
    node.ok(V.TENANT_CREATE, "acme", quota={"max_warm": 1})
    first, second = running(node, 2)
    node.ok(V.INSTANCE_WARM, first)
    job = node.fails("quota.exceeded", V.INSTANCE_WARM, second)
    assert job.error is not None
    assert job.error["fields"]["field"] == "max_warm"
    assert node.instance(second).status is Status.RUNNING


def test_a_wake_whose_guest_does_not_answer_sleeps_anew_and_can_be_woken(node: Node) -> None:
    (ref,) = running(node)
    node.ok(V.INSTANCE_SLEEP, ref)
    node.host.fail("guest.wake", GuestSilent("guest.silent", "it did not answer in time"))
    node.fails("guest.silent", V.INSTANCE_WAKE, ref)
    assert node.instance(ref).status is Status.SLEEPING
    assert not node.host.vmm.processes()
    node.ok(V.INSTANCE_WAKE, ref)
    assert not node.host.leaks()


@pytest.mark.parametrize("then", [V.INSTANCE_STOP, V.INSTANCE_START])
@pytest.mark.parametrize("hung", [True, False])
def test_who_drops_the_memory_of_one_that_slept_by_force_says_what_is_lost(
    node: Node, hung: bool, then: JobVerb
) -> None:
    (ref,) = running(node)
    if hung:
        node.host.hang_guest(InstanceRef.parse(ref))
    slept = node.ok(V.INSTANCE_SLEEP, ref, force=True)
    told = node.ok(then, ref, force=True)
    for result, words in ((slept, "only a wake keeps that"), (told, "that is lost")):
        assert any(words in remark for remark in result.get("remarks", ())) is hung, result


@pytest.mark.parametrize("fault", [GuestSilent("guest.silent", "no answer"), TimedOut("vmm.silent", "no answer")])
def test_a_woken_one_that_is_not_well_and_cannot_sleep_anew_runs_on(node: Node, fault: MvmError) -> None:
    """Its memory is nowhere else."""
    (ref,) = running(node)
    node.ok(V.INSTANCE_SLEEP, ref)
    node.host.fail("guest.wake", fault)
    node.host.fail("vmm.save", Failed("disk.full", "no space left on device"))
    node.fails(fault.code, V.INSTANCE_WAKE, ref)
    assert node.instance(ref).status is Status.RUNNING
    assert fault.code in str(node.instance(ref).last_error)
    assert not node.host.machines[InstanceRef.parse(ref)].paused
    assert node.host.layout.snapshot(InstanceRef.parse(ref)) not in node.host.saved, "it is of the past"
    node.ok(V.INSTANCE_SLEEP, ref)
    node.ok(V.INSTANCE_WAKE, ref)
    assert not node.host.leaks()


def test_a_wake_is_not_cancelled_once_its_guest_has_run(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would sleep on in a memory that its disks have outrun, and never wake."""
    (ref,) = running(node)
    node.ok(V.INSTANCE_SLEEP, ref)
    resume, asked = node.host.vmm.resume, []

    def and_somebody_cancels(instance: InstanceRef, process: ProcessIdentity) -> None:
        resume(instance, process)
        node.host.files[instance].writes += 1
        asked.extend(node.registry.open_jobs(NodeId("n1")))
        for job in asked:
            node.services.jobs.cancel(job.job_id)

    monkeypatch.setattr(node.host.vmm, "resume", and_somebody_cancels)
    assert node.ok(V.INSTANCE_WAKE, ref)["status"] == "running"
    assert [job.verb for job in asked] == [V.INSTANCE_WAKE]


def test_a_warm_one_whose_guest_does_not_answer_runs_all_the_same(node: Node) -> None:
    """And counts as running: so no more run than the quota gives, and the health sweep finds it."""
    (ref,) = running(node)
    node.ok(V.INSTANCE_WARM, ref)
    node.host.hang_guest(InstanceRef.parse(ref))
    node.fails("guest.silent", V.INSTANCE_WAKE, ref)
    assert node.instance(ref).status is Status.RUNNING
    assert "guest.silent" in str(node.instance(ref).last_error)
    assert not node.host.machines[InstanceRef.parse(ref)].paused
    node.ok(V.INSTANCE_STOP, ref)
    assert not node.host.leaks()


def test_a_warm_one_whose_vmm_does_not_resume_stays_warm(node: Node) -> None:
    (ref,) = running(node)
    node.ok(V.INSTANCE_WARM, ref)
    node.host.fail("vmm.resume", Failed("vmm.failed", "it does not"))
    node.fails("vmm.failed", V.INSTANCE_WAKE, ref)
    assert node.instance(ref).status is Status.WARM
    assert node.host.machines[InstanceRef.parse(ref)].paused


@pytest.mark.parametrize("verb", [V.INSTANCE_WAKE, V.INSTANCE_SLEEP])
def test_what_was_done_and_could_not_be_written_down_is_put_right(
    node: Node, verb: JobVerb, monkeypatch: pytest.MonkeyPatch
) -> None:
    (ref,) = running(node)
    instance = InstanceRef.parse(ref)
    node.ok(V.INSTANCE_WARM, ref)
    record_end, calls = node.services.runner.record_end, []

    def full_once(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 1:
            raise Failed("disk.full", "no space left")
        record_end(*args)

    monkeypatch.setattr(node.services.runner, "record_end", full_once)
    node.fails("disk.full", verb, ref)
    node.sweep(V.SWEEP_STALE_PIDS)
    if verb is V.INSTANCE_SLEEP:
        assert node.instance(ref).status is Status.SLEEPING
        node.ok(V.INSTANCE_WAKE, ref)
    else:
        assert node.instance(ref).status is Status.WARM
        assert node.host.machines[instance].paused
    assert node.instance(ref).in_flight is None
    assert not node.host.leaks()


def test_a_clone_whose_template_is_gone_is_not_asked_to_sleep_again_and_again(node: Node) -> None:
    (ref,) = running(node)
    node.host.fail("vmm.clone", Failed("snapshot.damaged", "devices differs from its manifest"))
    (other,) = node.create(1)
    node.ok(V.INSTANCE_START, other)  # which drops the template
    node.ok(V.INSTANCE_DESTROY, other)
    node.ok(V.POOL_SCALE, "acme/web", running=0, warm=0, sleeping=1)
    node.clock.advance(601)
    told = node.sweep(V.SWEEP_RECONCILE)
    assert not told["changed"]
    assert told["remarks"] == ["acme/web: 1 cannot sleep, and stay up: the template they were cloned from is gone"]
    asked = [job for job in node.registry.jobs(subject=ref) if job.verb is V.INSTANCE_SLEEP]
    assert [job.error and job.error["code"] for job in asked] == ["snapshot.not_found"]
    node.ok(V.INSTANCE_STOP, ref)  # and by its next start it is a clone of a new one
    node.clock.advance(601)
    for _ in range(3):
        node.sweep(V.SWEEP_RECONCILE)
    assert node.instance(ref).status is Status.SLEEPING


def test_another_one_sleeps_where_one_cannot(node: Node) -> None:
    first, second = running(node, 2)
    node.services.store.put_note(InstanceRef.parse(second), Note.SLEEPLESS, {"run": node.instance(second).run})
    node.ok(V.POOL_SCALE, "acme/web", running=1, warm=0, sleeping=1)
    assert (node.instance(first).status, node.instance(second).status) == (Status.SLEEPING, Status.RUNNING)


def test_a_guest_whose_vmm_ends_while_it_is_woken_is_stopped_and_can_be_started(node: Node) -> None:
    (ref,) = running(node)
    node.ok(V.INSTANCE_SLEEP, ref)
    ends = node.host.guest.wake

    def end(*args: Any, **words: Any) -> None:
        node.host.kill_process(InstanceRef.parse(ref))
        ends(*args, **words)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(node.host.guest, "wake", end)
        node.fails("guest.gone", V.INSTANCE_WAKE, ref)
    assert node.instance(ref).status is Status.STOPPED
    assert not node.host.leaks()
    assert node.ok(V.INSTANCE_START, ref)["status"] == "running"


def test_the_policy_does_not_ask_who_cannot_sleep_and_explain_says_so(node: Node) -> None:
    (ref,) = running(node)
    node.services.store.put_note(InstanceRef.parse(ref), Note.SLEEPLESS, {"run": node.instance(ref).run})
    node.sweep(V.SWEEP_IDLENESS)
    assert node.services.view.explain(InstanceRef.parse(ref))["next"]["verb"] == "warm"
    for _ in range(4):
        node.clock.advance(901)
        node.sweep(V.SWEEP_IDLENESS)
    assert node.instance(ref).status is Status.WARM
    told = node.services.view.explain(InstanceRef.parse(ref))["next"]
    assert (told["verb"], told["reason"]) == (
        None, "it cannot sleep in this run: the template that it was cloned from is gone",
    )  # fmt: skip
