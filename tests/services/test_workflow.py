"""The whole workflow on the fake host: tenant, pool, image, instances."""

from __future__ import annotations

import pytest

from mvm.domain.commands import collected
from mvm.domain.ids import InstanceRef
from mvm.domain.job import JobState, JobVerb
from mvm.domain.lifecycle import Status
from tests.services.conftest import NODE, Node


def test_a_tenant_from_creation_to_destruction(node: Node) -> None:
    made = node.ok(JobVerb.TENANT_CREATE, "acme", quota={"max_running": 3})
    assert made["net_id"] == 0
    assert made["subnet"] == "10.240.0.0/24"
    assert made["gateway"] == "10.240.0.1"
    assert made["bridge"] == "br-tenant-0"
    assert made["quota"]["max_running"] == 3
    assert "br-tenant-0" in node.host.network.bridges()
    assert [t["tenant_id"] for t in node.services.view.tenants()] == ["acme"]
    assert node.ok(JobVerb.TENANT_UPDATE, "acme", quota={"max_running": 5})["quota"]["max_running"] == 5
    node.ok(JobVerb.TENANT_DESTROY, "acme")
    assert node.services.view.tenants() == []
    assert not node.host.network.bridges()
    assert node.ok(JobVerb.TENANT_CREATE, "acme")["net_id"] == 1, "a net id is never given twice"


def test_an_instance_from_creation_to_destruction(node: Node) -> None:
    node.pool(mem_mib=128)
    assert node.services.view.pools(None)[0]["revision"]
    (ref,) = node.create()
    assert node.instance(ref).status is Status.READY
    started = node.ok(JobVerb.INSTANCE_START, ref)
    assert started["status"] == "running"
    assert started["guest_ip"] == "10.240.0.3"
    assert started["tap"] == "tn0i3"
    assert started["pid"]
    assert (
        collected(node.services.view.run(InstanceRef.parse(ref), b"hostname", deadline_s=5)).stdout.decode().strip()
        == ref.split("/")[2]
    )
    stopped = node.ok(JobVerb.INSTANCE_STOP, ref)
    assert stopped["clean"] is True
    assert stopped["pid"] is None
    assert node.instance(ref).status is Status.STOPPED
    assert not node.host.leaks()
    node.ok(JobVerb.INSTANCE_START, ref)
    node.ok(JobVerb.INSTANCE_DESTROY, ref)
    assert node.services.view.instances(None, None, None) == []
    assert not node.host.leaks()
    assert not node.host.storage.instances()
    node.ok(JobVerb.POOL_DESTROY, "acme/web")
    node.ok(JobVerb.TENANT_DESTROY, "acme")


def test_a_bulk_start_has_a_child_per_instance_and_bounds_how_many_run(node: Node) -> None:
    node.pool()
    refs = node.create(5)
    parent = node.services.jobs.submit_bulk(JobVerb.INSTANCE_START, refs, lambda _: NODE, parallel=2, actor="test")
    assert len(node.queue.waiting("node.n1")) == 2
    node.drain()
    done = node.services.jobs.job(parent.job_id)
    assert done.state is JobState.SUCCEEDED
    assert done.progress.to_dict() == {"done": 5, "total": 5, "failed": 0}
    assert {i["status"] for i in node.services.view.instances(None, None, None)} == {"running"}


def test_one_failure_of_many_does_not_stop_the_others(node: Node) -> None:
    node.pool()
    refs = node.create(3)
    node.ok(JobVerb.INSTANCE_START, refs[1])
    parent = node.services.jobs.submit_bulk(JobVerb.INSTANCE_START, refs, lambda _: NODE, actor="test")
    node.drain()
    done = node.services.jobs.job(parent.job_id)
    assert done.state is JobState.FAILED
    assert done.progress.failed == 1
    assert {i["status"] for i in node.services.view.instances(None, None, None)} == {"running"}


def test_scaling_up_and_down(node: Node) -> None:
    node.pool()
    up = node.ok(JobVerb.POOL_SCALE, "acme/web", running=3)
    assert len(up["jobs"]) == 3
    assert node.services.view.pools(None)[0]["counts"] == {"running": 3}
    assert node.ok(JobVerb.POOL_SCALE, "acme/web", running=3)["jobs"] == []
    node.ok(JobVerb.POOL_SCALE, "acme/web", running=1)
    assert node.services.view.pools(None)[0]["counts"] == {"running": 1, "stopped": 2}
    node.ok(JobVerb.POOL_SCALE, "acme/web", running=2)
    assert node.services.view.pools(None)[0]["counts"] == {"running": 2, "stopped": 1}, "what exists is reused"


def test_a_pool_that_was_never_scaled_is_left_alone(node: Node) -> None:
    node.pool()
    (ref,) = node.create()
    node.ok(JobVerb.INSTANCE_START, ref)
    assert node.sweep(JobVerb.SWEEP_RECONCILE)["changed"] is False
    assert node.instance(ref).status is Status.RUNNING


def test_a_second_reconcile_adds_nothing_while_jobs_wait(node: Node) -> None:
    node.pool()
    node.submit(JobVerb.POOL_SCALE, "acme/web", running=3)
    job = node.queue._take(NODE)
    assert job is not None
    node.services.runner.run(job)
    assert len(node.queue.waiting("node.n1")) == 3
    sweep = node.services.jobs.new(JobVerb.SWEEP_RECONCILE, str(NODE), NODE, actor="test")
    result = node.services.runner.run(sweep).result or {}
    assert (result["changed"], result["pools"], result["jobs"]) == (False, [], 0)
    node.drain()
    assert node.services.view.pools(None)[0]["counts"] == {"running": 3}


@pytest.mark.parametrize("verb", [JobVerb.INSTANCE_START, JobVerb.INSTANCE_STOP, JobVerb.INSTANCE_DESTROY])
def test_a_job_delivered_twice_runs_once(node: Node, verb: JobVerb) -> None:
    node.pool()
    (ref,) = node.create()
    if verb is JobVerb.INSTANCE_STOP:
        node.ok(JobVerb.INSTANCE_START, ref)
    job = node.submit(verb, ref)
    node.queue.send([job])
    assert node.drain() == 2
    assert node.services.jobs.job(job.job_id).state is JobState.SUCCEEDED
    assert len(node.host.vmm.processes()) == (verb is JobVerb.INSTANCE_START)


def test_a_hundred_messages_delivered_twice_leave_what_one_delivery_leaves(node: Node) -> None:
    node.pool()
    refs = node.create(50)
    for verb, status, processes in ((JobVerb.INSTANCE_START, "running", 50), (JobVerb.INSTANCE_STOP, "stopped", 0)):
        jobs = [node.submit(verb, ref) for ref in refs]
        node.queue.send(list(reversed(jobs)))
        assert node.drain() == 100
        assert {node.services.jobs.job(job.job_id).state for job in jobs} == {JobState.SUCCEEDED}
        assert [i["status"] for i in node.services.view.instances(None, None, None)] == [status] * 50
        assert sum(len(found) for found in node.host.vmm.processes().values()) == processes
