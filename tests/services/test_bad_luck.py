"""Bad input and bad luck on the fake host: the right error, and nothing left behind."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from mvm.cli import stop_all
from mvm.domain.ids import InstanceRef, NodeId, PoolRef
from mvm.domain.job import Job, JobState, JobVerb
from mvm.domain.lifecycle import Status
from mvm.domain.pool import SeccompPolicy
from mvm.errors import Failed, GuestSilent, Unreachable
from mvm.ports.guest import GuestHello
from mvm.services.jobs import Jobs
from tests.services.conftest import NODE, Node

V = JobVerb


@pytest.mark.parametrize(
    ("code", "verb", "subject", "params"),
    [
        ("pool.not_found", V.POOL_BUILD, "acme/none", {}),
        ("pool.not_found", V.INSTANCE_CREATE, "acme/none", {}),
        ("tenant.not_found", V.TENANT_DESTROY, "nobody", {}),
        ("tenant.not_found", V.POOL_CREATE, "nobody/p", {"flake_ref": "builtin:", "profile": "minimal"}),
        ("instance.not_found", V.INSTANCE_START, "acme/web/i-00000000", {}),
        ("instance.invalid_id", V.INSTANCE_START, "acme/web/x", {}),
        ("instance.invalid_ref", V.INSTANCE_STOP, "acme", {}),
        ("tenant.exists", V.TENANT_CREATE, "acme", {}),
        ("tenant.invalid_id", V.TENANT_CREATE, "Acme!", {}),
        ("tenant.net_id_used", V.TENANT_CREATE, "b", {"net_id": 0}),
        ("tenant.invalid_net_id", V.TENANT_CREATE, "b", {"net_id": 4096}),
        ("tenant.subnet_overlap", V.TENANT_CREATE, "b", {"subnet": "10.240.0.0/25"}),
        ("tenant.invalid_subnet", V.TENANT_CREATE, "b", {"subnet": "192.168.0.0/24"}),
        ("tenant.invalid_subnet", V.TENANT_CREATE, "b", {"subnet": "10.240.9.1/24"}),
        ("tenant.invalid_quota", V.TENANT_CREATE, "b", {"quota": {"max_running": -1}}),
        ("tenant.invalid_quota", V.TENANT_UPDATE, "acme", {"quota": {"max_ruining": 1}}),
        ("pool.exists", V.POOL_CREATE, "acme/web", {"flake_ref": "builtin:", "profile": "minimal"}),
        ("pool.unknown_profile", V.POOL_CREATE, "acme/p", {"flake_ref": "builtin:", "profile": "none"}),
        ("pool.unsupported_flake", V.POOL_CREATE, "acme/p", {"flake_ref": "github:x/y", "profile": "minimal"}),
        ("pool.invalid_seccomp", V.POOL_UPDATE, "acme/web", {"seccomp_policy": "none"}),
        ("pool.not_empty", V.POOL_DESTROY, "acme/web", {}),
        ("tenant.not_empty", V.TENANT_DESTROY, "acme", {}),
        ("instance.invalid_count", V.INSTANCE_CREATE, "acme/web", {"count": 0}),
        ("instance.invalid_count", V.INSTANCE_CREATE, "acme/web", {"count": "two"}),
        ("pool.invalid_count", V.POOL_SCALE, "acme/web", {"running": -1}),
    ],
)
def test_bad_input_is_named_and_changes_nothing(
    node: Node, code: str, verb: JobVerb, subject: str, params: dict[str, object]
) -> None:
    node.pool()
    node.create()
    before = (node.services.view.tenants(), node.services.view.pools(None),
              node.services.view.instances(None, None, None))  # fmt: skip
    job = node.fails(code, verb, subject, **params)
    assert job.error is not None
    assert job.error["hint"] or code.endswith("internal")
    after = (node.services.view.tenants(), node.services.view.pools(None),
             node.services.view.instances(None, None, None))  # fmt: skip
    assert before == after


@pytest.mark.parametrize("resources", [{"vcpus": 0}, {"mem_mib": 0}, {"mem_mib": 10**9}, {"data_disk_mib": -1}])
def test_absurd_resources(node: Node, resources: dict[str, int]) -> None:
    node.ok(V.TENANT_CREATE, "acme")
    job = node.fails("pool.invalid_resources", V.POOL_CREATE, "acme/p", flake_ref="builtin:", profile="minimal",
                     resources=resources)  # fmt: skip
    assert job.error is not None
    assert job.error["fields"]["field"] == next(iter(resources))


def test_not_in_this_state(node: Node) -> None:
    node.pool()
    (ref,) = node.create()
    node.fails("instance.invalid_transition", V.INSTANCE_STOP, ref)
    node.ok(V.INSTANCE_START, ref)
    job = node.fails("instance.invalid_transition", V.INSTANCE_START, ref)
    assert job.error is not None
    assert job.error["hint"] == "allowed now: warm, sleep, stop, destroy"
    node.ok(V.INSTANCE_STOP, ref)
    node.fails("instance.invalid_transition", V.INSTANCE_STOP, ref)


@pytest.mark.parametrize(
    ("quota", "resources", "count", "verb"),
    [
        ({"max_running": 1}, {}, 2, V.INSTANCE_START),
        ({"max_vcpus": 3}, {"vcpus": 2}, 2, V.INSTANCE_START),
        ({"max_mem_mib": 300}, {"mem_mib": 256}, 2, V.INSTANCE_START),
        ({"max_instances_per_pool": 2}, {}, 3, V.INSTANCE_CREATE),
        ({"max_disk_gib": 1}, {"data_disk_mib": 600}, 2, V.INSTANCE_CREATE),
        ({"max_pools": 1}, {}, 1, V.POOL_CREATE),
        ({"max_running": 1}, {}, 0, V.POOL_SCALE),
    ],
)
def test_every_quota_is_enforced_before_anything_is_created(
    node: Node, quota: dict[str, int], resources: dict[str, int], count: int, verb: JobVerb
) -> None:
    node.ok(V.TENANT_CREATE, "acme", quota=quota)
    node.pool(**resources)
    if verb is V.POOL_CREATE:
        job = node.do(verb, "acme/two", flake_ref="builtin:", profile="minimal")
    elif verb is V.POOL_SCALE:
        job = node.do(verb, "acme/web", running=2)
    elif verb is V.INSTANCE_CREATE:
        job = node.do(verb, "acme/web", count=count)
        assert node.services.view.instances(None, None, None) == []
    else:
        refs = node.create(count)
        node.ok(verb, refs[0])
        job = node.do(verb, refs[1])
        assert len(node.host.vmm.processes()) == 1
    assert job.error is not None
    assert job.error["code"] == "quota.exceeded"
    assert job.error["fields"]["field"] == next(iter(quota))
    assert len(node.services.view.pools(None)) == 1
    assert not node.host.leaks()


@pytest.mark.parametrize(
    "point", ["storage.prepare", "network.ensure_tap", "storage.fresh_overlay", "vmm.boot", "vmm.clone", "guest.hello",
              "guest.configure", "storage.revision"],
)  # fmt: skip
def test_a_start_that_fails_anywhere_leaves_nothing_and_can_be_repeated(node: Node, point: str) -> None:
    node.pool(cold=point == "vmm.boot")
    (ref,) = node.create()
    node.host.fail(point, Failed("disk.full", "no space left"))
    node.fails("disk.full", V.INSTANCE_START, ref)
    assert node.instance(ref).status is Status.READY
    assert "disk.full" in (node.instance(ref).last_error or "")
    assert not node.host.leaks()
    assert not node.host.vmm.processes()
    node.ok(V.INSTANCE_START, ref)
    assert node.instance(ref).last_error is None


def test_disk_full_during_a_build(node: Node) -> None:
    node.ok(V.TENANT_CREATE, "acme")
    node.ok(V.POOL_CREATE, "acme/web", flake_ref="builtin:", profile="minimal")
    node.host.fail("images.build", Failed("disk.full", "no space left", hint="free some space"))
    node.fails("disk.full", V.POOL_BUILD, "acme/web")
    node.create()
    node.fails("pool.not_built", V.INSTANCE_START, node.services.view.instances(None, None, None)[0]["ref"])
    node.ok(V.POOL_BUILD, "acme/web")


def test_a_hanging_boot_is_retried_once(node: Node) -> None:
    node.pool()
    first, second = node.create(2)
    node.host.hang_guest(InstanceRef.parse(first))
    assert node.do(V.INSTANCE_START, first).attempt == 1
    node.host.hang_guest(InstanceRef.parse(second), times=2)
    again = node.do(V.INSTANCE_START, second)
    assert (again.state, again.attempt) == (JobState.SUCCEEDED, 2), "a try boots it twice"
    assert len(node.host.vmm.processes()) == 2


def test_a_guest_that_hangs_at_every_boot_is_given_up(node: Node) -> None:
    node.pool()
    (ref,) = node.create()
    node.host.hang_guest(InstanceRef.parse(ref), times=1000)
    job = node.fails("guest.silent", V.INSTANCE_START, ref)
    assert job.attempt > 1
    assert not node.host.leaks()


@pytest.mark.parametrize("point", ["guest.hello", "guest.settle"])
def test_a_template_whose_guest_hangs_is_made_once_more(node: Node, point: str) -> None:
    node.pool()
    (first,) = node.create()
    silent = GuestSilent("guest.silent", "no answer")
    node.host.fail(point, silent)
    assert node.do(V.INSTANCE_START, first).attempt == 1
    assert node.instance(first).cloned
    assert len(node.host.vmm.processes()) == 1


@pytest.mark.parametrize("point", ["guest.hello", "guest.settle"])
def test_a_template_whose_guest_hangs_twice_is_made_in_another_try(node: Node, point: str) -> None:
    node.pool()
    (ref,) = node.create()
    node.host.fail(point, GuestSilent("guest.silent", "no answer"), times=2)
    job = node.do(V.INSTANCE_START, ref)
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 2)
    assert node.instance(ref).cloned
    assert len(node.host.vmm.processes()) == 1


def test_a_panicking_guest_fails_the_job_with_its_console(node: Node) -> None:
    node.pool(cold=True)
    (ref,) = node.create()
    node.host.panic_guest(InstanceRef.parse(ref))
    job = node.fails("guest.panicked", V.INSTANCE_START, ref)
    assert job.error is not None
    assert "Kernel panic" in job.error["message"]
    assert not node.host.leaks()


def test_a_guest_that_will_not_shut_down_is_ended(node: Node) -> None:
    node.pool()
    (ref,) = node.create()
    node.ok(V.INSTANCE_START, ref)
    node.host.hang_guest(InstanceRef.parse(ref))
    stopped = node.ok(V.INSTANCE_STOP, ref)
    assert stopped["clean"] is False
    assert stopped["remarks"] == ["its guest did not shut down in time and was ended: what it had not written is lost"]
    assert not node.host.vmm.processes()
    assert not node.host.leaks()


def test_a_dead_process_is_found_and_its_pool_brought_back(node: Node) -> None:
    node.pool()
    node.ok(V.POOL_SCALE, "acme/web", running=2)
    victim = node.services.view.instances(None, None, None)[0]["ref"]
    node.host.kill_process(InstanceRef.parse(victim))
    found = node.sweep(V.SWEEP_STALE_PIDS)
    assert [gone["ref"] for gone in found["stopped"]] == [victim]
    assert node.instance(victim).status is Status.STOPPED
    assert "found gone" in (node.instance(victim).last_error or "")
    assert not node.host.leaks()
    assert node.sweep(V.SWEEP_RECONCILE)["changed"] is True
    assert {i["status"] for i in node.services.view.instances(None, None, None)} == {"running"}


def test_a_vmm_that_reached_its_memory_limit_is_told_as_such(node: Node) -> None:
    node.pool()
    (ref,) = node.create()
    instance = InstanceRef.parse(ref)
    node.ok(V.INSTANCE_START, ref)
    node.host.exhaust(instance)
    job = node.fails("vmm.out_of_memory", V.INSTANCE_SLEEP, ref)
    assert job.error is not None
    assert "memory limit" in job.error["message"]
    node.sweep(V.SWEEP_STALE_PIDS)
    assert node.instance(ref).status is Status.STOPPED
    told = node.services.view.explain(instance)["last_error"]
    assert "reached its memory limit" in told
    assert "[vmm.out_of_memory]" in told
    node.ok(V.INSTANCE_START, ref)  # the next run has a count of its own
    node.ok(V.INSTANCE_STOP, ref)
    assert not node.host.leaks()


@pytest.mark.parametrize("cold", [False, True])
def test_a_start_that_runs_out_of_memory_says_so(node: Node, monkeypatch: pytest.MonkeyPatch, cold: bool) -> None:
    node.pool(cold=cold)
    (ref,) = node.create()
    hello = node.host.guest.hello

    def exhausting(of: InstanceRef, *args: Any, **kwargs: Any) -> GuestHello:
        if str(of) == ref:
            node.host.exhaust(of)
        return hello(of, *args, **kwargs)

    monkeypatch.setattr(node.host.guest, "hello", exhausting)
    node.fails("vmm.out_of_memory", V.INSTANCE_START, ref)
    assert "[vmm.out_of_memory]" in str(node.instance(ref).last_error)
    assert not node.host.leaks()


def test_a_control_group_that_nobody_owns_is_an_orphan(node: Node) -> None:
    node.pool()
    (ref,) = node.create()
    node.host.groups.add(InstanceRef.parse(ref))
    assert node.sweep(V.SWEEP_ORPHANS)["found"] == [f"control group of {ref}"]
    node.clock.advance(61)
    assert node.sweep(V.SWEEP_ORPHANS)["removed"] == [f"control group of {ref}"]
    assert node.sweep(V.SWEEP_ORPHANS)["found"] == []


def test_a_pool_has_a_seccomp_policy_and_its_vmms_users_of_their_own(node: Node) -> None:
    node.pool()
    node.ok(V.POOL_UPDATE, "acme/web", seccomp_policy="strict")
    assert node.services.view.pools(None)[0]["seccomp_policy"] == "strict"
    refs = node.create(2)
    for ref in refs:
        node.ok(V.INSTANCE_START, ref)
    specs = [node.host.machines[InstanceRef.parse(ref)].spec for ref in refs]
    assert {spec.seccomp for spec in specs} == {SeccompPolicy.STRICT}
    assert len({spec.uid for spec in specs}) == 2


def test_a_process_that_cannot_be_seen_is_not_gone(node: Node) -> None:
    node.pool()
    (ref,) = node.create()
    node.ok(V.INSTANCE_START, ref)
    node.host.unseen.add(InstanceRef.parse(ref))
    assert node.sweep(V.SWEEP_STALE_PIDS)["changed"] is False


def test_orphans_go_after_their_grace_and_owned_things_never(node: Node) -> None:
    node.pool()
    kept, lost = node.create(2)
    node.ok(V.INSTANCE_START, kept)
    node.ok(V.INSTANCE_START, lost)
    node.services.store.delete_instance(InstanceRef.parse(lost))  # the store forgets it; the host does not
    first = node.sweep(V.SWEEP_ORPHANS)
    assert len(first["found"]) == 3, first
    assert first["removed"] == []
    node.clock.advance(61)
    second = node.sweep(V.SWEEP_ORPHANS)
    assert second["removed"] == first["found"]
    assert set(node.host.vmm.processes()) == {InstanceRef.parse(kept)}
    assert node.host.storage.instances() == {InstanceRef.parse(kept)}
    assert not node.host.leaks()
    assert node.sweep(V.SWEEP_ORPHANS)["found"] == []


class Killed(BaseException):
    """Stands for SIGKILL: no handler runs after it."""


@pytest.mark.parametrize("point", ["ensure_tap", "fresh_overlay", "boot", "clone", "resume", "hello", "configure"])
def test_a_start_whose_worker_was_killed_is_completed_by_the_next_delivery(
    node: Node, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was done when the worker died, the second delivery ends with one process."""
    node.pool(cold=point == "boot")
    (ref,) = node.create()
    part = {
        "ensure_tap": node.host.network,
        "fresh_overlay": node.host.storage,
        "boot": node.host.vmm,
        "clone": node.host.vmm,
        "resume": node.host.vmm,
    }.get(point, node.host.guest)
    real = getattr(part, point)

    def then_die(*args: object, **kwargs: object) -> None:
        real(*args, **kwargs)
        raise Killed

    job = node.submit(V.INSTANCE_START, ref)
    monkeypatch.setattr(part, point, then_die)
    with pytest.raises(Killed):
        node.drain()
    monkeypatch.setattr(part, point, real)
    node.queue.send([job])
    node.drain()
    assert node.services.jobs.job(job.job_id).state is JobState.SUCCEEDED
    assert node.instance(ref).status is Status.RUNNING
    assert len(node.host.vmm.processes()[InstanceRef.parse(ref)]) == 1
    assert not node.host.leaks()


def test_cancelling_a_queued_and_a_running_job(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.pool()
    (ref,) = node.create()
    queued = node.submit(V.INSTANCE_START, ref)
    assert node.services.jobs.cancel(queued.job_id).state is JobState.CANCELLED
    node.drain()
    assert node.services.jobs.job(queued.job_id).state is JobState.CANCELLED
    assert node.instance(ref).status is Status.READY
    real = node.host.network.ensure_tap
    running = node.submit(V.INSTANCE_START, ref)

    def meanwhile(*args: object, **kwargs: object) -> None:
        real(*args, **kwargs)
        node.services.jobs.cancel(running.job_id)

    monkeypatch.setattr(node.host.network, "ensure_tap", meanwhile)
    node.drain()
    assert node.services.jobs.job(running.job_id).state is JobState.CANCELLED
    assert node.instance(ref).status is Status.READY
    assert node.instance(ref).in_flight is None
    assert not node.host.leaks()


def test_an_unexpected_error_ends_the_job_without_its_details(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.pool()
    (ref,) = node.create()

    def broken(*_: object, **__: object) -> None:
        raise KeyError("secret")

    monkeypatch.setattr(node.host.network, "ensure_tap", broken)
    job = node.fails("internal", V.INSTANCE_START, ref)
    assert "secret" not in str(job.error)
    monkeypatch.undo()
    node.ok(V.INSTANCE_START, ref)


def test_the_registry_may_be_away_while_a_job_runs(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.pool()
    (ref,) = node.create()
    job = node.submit(V.INSTANCE_START, ref)

    def away(*_: object) -> None:
        raise Unreachable("registry.unreachable", "away")

    for name in ("update", "update_and_ask", "cancel_requested"):
        monkeypatch.setattr(node.registry, name, away)
    node.drain()
    assert node.instance(ref).status is Status.RUNNING
    monkeypatch.undo()
    assert node.services.jobs.job(job.job_id).state is JobState.QUEUED
    node.sweep(V.SWEEP_STALE_PIDS)
    assert node.services.jobs.job(job.job_id).state is JobState.SUCCEEDED, "a sweep publishes what was missed"


def test_a_busy_instance_is_waited_for_within_a_deadline(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mvm.services.lifecycle._LOCK_S", 0.05)
    node.pool()
    (ref,) = node.create()
    with node.host.locks.hold(f"instance {ref}", deadline_s=1):
        job = node.do(V.INSTANCE_START, ref)
    assert job.error is not None
    assert job.error["code"] == "lock.busy"


def test_jobs_keep_their_words(node: Node) -> None:
    job = node.submit(V.TENANT_CREATE, "acme")
    assert Job.from_dict(job.to_dict()) == job
    assert job.node_id == NODE


def test_a_create_that_fails_in_the_middle_creates_nothing(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.pool(data_disk_mib=16)
    real, calls = node.host.storage.prepare, []

    def full_at_the_third(*args: object, **kwargs: object) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise Failed("disk.full", "no space left")
        real(*args, **kwargs)

    monkeypatch.setattr(node.host.storage, "prepare", full_at_the_third)
    node.fails("disk.full", V.INSTANCE_CREATE, "acme/web", count=5)
    assert node.services.view.instances(None, None, None) == []
    assert not node.host.storage.instances()


@pytest.mark.parametrize("verb", [V.INSTANCE_START, V.INSTANCE_STOP, V.INSTANCE_DESTROY])
def test_a_failed_job_holds_nothing(node: Node, verb: JobVerb, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even when it failed by a bug: the instance is free, and the next job may have it."""
    node.pool()
    (ref,) = node.create()
    if verb is V.INSTANCE_STOP:
        node.ok(V.INSTANCE_START, ref)

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(node.host.network, "remove_taps", broken)
    monkeypatch.setattr(node.host.network, "ensure_tap", broken)
    node.fails("internal", verb, ref)
    assert node.instance(ref).in_flight is None
    assert node.instance(ref).last_error
    monkeypatch.undo()
    node.ok(V.INSTANCE_DESTROY, ref)
    assert not node.host.leaks()


def test_a_tenant_that_only_the_registry_remembers_can_be_destroyed(node: Node) -> None:
    node.ok(V.TENANT_CREATE, "acme")
    known = node.services.store.tenants()
    node.ok(V.TENANT_DESTROY, "acme")
    node.registry.restore(known, {}, frozenset())  # a heartbeat that had read the store just before
    node.fails("tenant.exists", V.TENANT_CREATE, "acme")
    node.ok(V.TENANT_DESTROY, "acme")
    assert node.ok(V.TENANT_CREATE, "acme")["net_id"] == 1


def test_a_message_that_was_lost_is_sent_again_and_only_that(node: Node) -> None:
    node.pool()
    refs = node.create(5)
    waiting = node.submit(V.INSTANCE_START, refs[0])
    lost = node.services.jobs.new(V.INSTANCE_START, refs[1], NODE, actor="test")
    node.registry.record([lost])  # its sender died here
    node.services.jobs.submit_bulk(V.INSTANCE_START, refs[2:], lambda _: NODE, parallel=1, actor="test")
    assert node.services.jobs.send_lost(NODE, older_than_s=30) == [], "it may still be on its way"
    node.clock.advance(31)
    assert [job.job_id for job in node.services.jobs.send_lost(NODE, older_than_s=30)] == [lost.job_id]
    node.clock.advance(31)
    assert node.services.jobs.send_lost(NODE, older_than_s=30) == []
    node.drain()
    assert node.services.jobs.job(waiting.job_id).state is JobState.SUCCEEDED
    assert node.services.jobs.job(lost.job_id).state is JobState.SUCCEEDED
    assert {i["status"] for i in node.services.view.instances(None, None, None)} == {"running"}


def test_a_job_cancelled_in_the_moment_it_begins_is_not_done(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the registry is told that it runs, whoever cancels it is told that it is cancelled."""
    node.pool()
    (ref,) = node.create()
    job = node.submit(V.INSTANCE_START, ref)
    put_job, cancels = node.services.store.put_job, []

    def cancelled_before(written: Job) -> None:
        if not cancels:
            cancels.append(node.services.jobs.cancel(job.job_id).state)
        put_job(written)

    monkeypatch.setattr(node.services.store, "put_job", cancelled_before)
    node.drain()
    assert cancels == [JobState.CANCELLED]
    known = node.services.store.job(job.job_id)
    assert known is not None
    assert known.state is JobState.CANCELLED
    assert node.instance(ref).status is Status.READY


def test_going_down_helps_on_what_was_lost_though_beat_has_stopped(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.pool()
    (ref,) = node.create()
    lost = node.services.jobs.new(V.INSTANCE_START, ref, NODE, actor="test")
    node.registry.record([lost])  # its sender died here
    submit = node.services.jobs.submit

    def asked(*words: Any, **more: Any) -> Job:
        node.clock.advance(31)
        job = submit(*words, **more)
        node.drain()
        return job

    monkeypatch.setattr(stop_all, "_PATIENCE_S", 0.0)
    monkeypatch.setattr(node.services.jobs, "submit", asked)
    client: Any = SimpleNamespace(jobs=node.services.jobs)
    said: list[str] = []
    (final,) = stop_all._finals(client, NODE, "test", [lost.job_id], said.append)
    assert said == ["still waiting for jobs to end; see: mvm job list"]
    assert (final.job_id, final.state) == (lost.job_id, JobState.SUCCEEDED)


def test_a_pool_that_another_node_has_is_not_taken_from_it(node: Node) -> None:
    node.ok(V.TENANT_CREATE, "acme")
    ref = PoolRef.parse("acme/web")
    node.registry.place_pool(ref, NodeId("n2"))
    failed = node.fails("pool.exists", V.POOL_CREATE, "acme/web", flake_ref="builtin:", profile="minimal")
    assert "on node n2" in (failed.error or {})["message"]
    assert (node.registry.pool_node(ref), node.services.store.pools()) == (NodeId("n2"), [])


def test_what_waits_for_a_long_pause_is_not_taken_for_lost(node: Node) -> None:
    """Its message is with the worker until its time, in no queue."""
    jobs = Jobs(node.registry, node.queue, node.clock, cap_s=900)
    job = jobs.new(V.TENANT_CREATE, "later", NODE, actor="test")
    node.registry.record([job.with_(attempt=1, attempts=3, retry_at=node.clock.now() + timedelta(seconds=900))])
    for _ in range(25):
        assert jobs.send_lost(NODE, older_than_s=30) == []
        node.clock.advance(36)
    node.clock.advance(31)
    assert [lost.job_id for lost in jobs.send_lost(NODE, older_than_s=30)] == [job.job_id]


def test_a_job_lost_while_the_clock_was_wrong_is_sent_again(node: Node) -> None:
    node.pool()
    (ref,) = node.create()
    node.clock.advance(3600)
    lost = node.services.jobs.new(V.INSTANCE_START, ref, NODE, actor="test")
    node.registry.record([lost])  # its sender died here
    node.clock.advance(-3600)
    assert [job.job_id for job in node.services.jobs.send_lost(NODE, older_than_s=30)] == [lost.job_id]
    node.drain()
    assert node.services.jobs.job(lost.job_id).state is JobState.SUCCEEDED


@pytest.mark.parametrize("how", ["cancelled", "expired", "forgotten"])
def test_a_child_that_is_never_done_holds_up_no_sibling(node: Node, how: str) -> None:
    node.pool()
    refs = node.create(2)
    bulk = node.services.jobs.submit_bulk(V.INSTANCE_START, refs, lambda _: NODE, parallel=1, actor="test")
    first, second = node.services.jobs.children(bulk.job_id)
    if how == "cancelled":
        node.services.jobs.cancel(first.job_id)
    elif how == "expired":
        node.services.jobs.expired(first)
    else:  # its end was told, and whoever told it was killed before it sent the next
        node.registry.request_cancel(first.job_id)
        node.clock.advance(31)
        node.services.jobs.send_lost(NODE, older_than_s=30)
    node.drain()
    assert node.services.jobs.job(second.job_id).state is JobState.SUCCEEDED
    assert node.services.jobs.job(bulk.job_id).state.final


def test_an_urgent_wake_that_could_not_be_ended_is_taken_up_by_a_sweep(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its agent lives, and nobody delivers it again."""
    node.pool()
    (ref,) = node.create()
    node.ok(V.INSTANCE_START, ref)
    node.ok(V.INSTANCE_SLEEP, ref)

    def full(*_: object, **__: object) -> None:
        raise Failed("disk.full", "no space left")

    monkeypatch.setattr(node.host.network, "ensure_tap", full)
    monkeypatch.setattr(node.services.runner, "record_end", full)
    with pytest.raises(Failed):
        node.services.urgent.wake(InstanceRef.parse(ref), "test")
    monkeypatch.undo()
    assert len(node.services.store.unfinished_jobs()) == 1
    node.clock.advance(31)
    node.sweep(V.SWEEP_ORPHANS)
    node.drain()
    assert not node.services.store.unfinished_jobs()
    assert node.instance(ref).status is Status.RUNNING


def test_a_job_left_while_the_clock_was_wrong_is_taken_up(node: Node) -> None:
    node.pool()
    (ref,) = node.create()
    node.clock.advance(3600)
    left = node.services.jobs.new(V.INSTANCE_START, ref, NODE, actor="test")
    running = left.with_(state=JobState.RUNNING, started_at=node.clock.now())
    node.registry.record([running])
    node.services.store.put_job(running)  # its worker died here, and Redis forgot the message
    node.clock.advance(-3600)
    assert node.sweep(V.SWEEP_ORPHANS)["sent_again"] == [str(left.job_id)]
    assert node.services.jobs.job(left.job_id).state is JobState.SUCCEEDED


def test_an_urgent_wake_that_is_done_cannot_be_cancelled(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.pool()
    (ref,) = node.create()
    node.ok(V.INSTANCE_START, ref)
    node.ok(V.INSTANCE_SLEEP, ref)
    record = node.registry.record

    def cancelled_then(jobs: list[Job]) -> None:
        record(jobs)
        node.services.jobs.cancel(jobs[0].job_id)

    monkeypatch.setattr(node.registry, "record", cancelled_then)
    woken = node.services.urgent.wake(InstanceRef.parse(ref), "test")
    assert node.services.jobs.job(woken["job_id"]).state is JobState.SUCCEEDED


def test_a_period_has_one_sweep_whoever_asks(node: Node) -> None:
    node.services.heartbeat.beat()
    (job,) = node.services.jobs.sweep(V.SWEEP_ORPHANS, every_s=60)
    node.drain()
    assert node.services.jobs.sweep(V.SWEEP_ORPHANS, every_s=60) == []
    node.clock.advance(60)
    node.services.heartbeat.beat()
    (later,) = node.services.jobs.sweep(V.SWEEP_ORPHANS, every_s=60)
    assert later.params["tick"] == job.params["tick"] + 1
    node.clock.advance(60)
    node.services.heartbeat.beat()
    assert node.services.jobs.sweep(V.SWEEP_ORPHANS, every_s=60) == [], "it is still queued"
