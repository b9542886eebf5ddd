"""Ledger and host compared both ways, on the fake host."""

from __future__ import annotations

from typing import Any

import pytest

from mvm.domain.ids import InstanceRef
from mvm.domain.job import JobState, JobVerb, Reason
from mvm.domain.lifecycle import Status
from mvm.errors import Failed
from tests.services.conftest import NODE, Node
from tests.support.command_line import CommandLine
from tests.support.make import instance_ref

V = JobVerb
STRAY = instance_ref(0xDEAD)


def running(node: Node, count: int = 1) -> list[str]:
    node.pool()
    refs = node.create(count)
    for ref in refs:
        node.ok(V.INSTANCE_START, ref)
    return refs


def orphans(node: Node, seconds: float = 0) -> dict[str, Any]:
    node.clock.advance(seconds)
    return dict(node.sweep(V.SWEEP_ORPHANS))


def forget(node: Node, ref: str) -> None:
    """The ledger loses an instance; the host keeps all of it."""
    node.services.store.delete_instance(InstanceRef.parse(ref))


def test_what_the_ledger_lost_is_shown_then_removed(node: Node, mvm: CommandLine) -> None:
    lost, kept = running(node, 2)
    forget(node, lost)
    found = orphans(node)
    assert {(each["kind"], each["removed"]) for each in found["orphans"]} == {
        ("process", False), ("tap", False), ("directory", False),
    }  # fmt: skip
    assert found["removed"] == []
    assert found["repaired"]  # its rules need no grace
    assert InstanceRef.parse(lost) in node.host.machines
    found = orphans(node, 60)
    assert {each["age_s"] for each in found["orphans"]} == {60.0}
    assert len(found["removed"]) == 3
    assert orphans(node)["orphans"] == []
    assert not node.host.leaks()
    assert node.instance(kept).status is Status.RUNNING
    (job_id,) = [job.job_id for job in node.registry.jobs(subject="n1") if job.result and job.result.get("removed")]
    shown = mvm.ok("job", "show", job_id)
    assert "orphans:" in shown
    assert "KIND       NAME" in shown
    assert mvm.json("job", "show", job_id)["result"]["orphans"] == found["orphans"]


def test_what_only_has_our_name_is_told_and_stays(node: Node) -> None:
    node.pool()
    node.host.foreign.add("tn0i9")
    node.host.impostors["process 77 of acme/web/i-00000001"] = "it runs as user 1000"
    for _ in range(3):
        found = orphans(node, 100)
        assert [(each["name"], each["why"], each["removed"]) for each in found["orphans"]] == [
            ("interface tn0i9", "not ours: somebody else made it", False),
            ("process 77 of acme/web/i-00000001", "not ours: it runs as user 1000", False),
        ]
    assert found["changed"] is False


def test_a_directory_with_something_mounted_in_it_stays(node: Node) -> None:
    node.pool()
    node.host.storage.prepare(STRAY, data_disk_mib=0)
    node.host.mounts[STRAY] = "something is mounted at /fake/x"
    orphans(node)
    (found,) = orphans(node, 100)["orphans"]
    assert (found["removed"], found["why"]) == (False, "something is mounted at /fake/x")
    del node.host.mounts[STRAY]
    assert orphans(node)["removed"] == [f"directory of {STRAY}"]


def test_an_orphan_whose_name_somebody_works_on_stays(node: Node) -> None:
    node.pool()
    node.host.storage.prepare(STRAY, data_disk_mib=0)
    orphans(node)
    with node.host.locks.hold(f"instance {STRAY}", deadline_s=0):
        assert orphans(node, 100)["removed"] == []
    assert orphans(node)["removed"]


def test_bridges_and_ports_are_made_again(node: Node) -> None:
    running(node)
    node.host.network.remove_bridges(frozenset({"br-tenant-0"}))
    found = orphans(node)
    assert found["repaired"] == ["bridge br-tenant-0 was made again", "tap tn0i3 is a port of br-tenant-0 again"]
    assert node.host.taps == {"tn0i3": "br-tenant-0"}
    assert orphans(node)["repaired"] == []


def test_what_is_recorded_and_gone_is_told(node: Node) -> None:
    up, asleep, stopped = running(node, 3)
    node.ok(V.INSTANCE_SLEEP, asleep)
    node.ok(V.INSTANCE_STOP, stopped)
    assert orphans(node)["missing"] == []
    node.host.taps.pop("tn0i3")
    node.host.vmm.discard(node.host.storage.snapshot(InstanceRef.parse(asleep)))
    node.host.storage.remove(InstanceRef.parse(stopped))
    node.host.revisions.clear()
    missing = orphans(node)["missing"]
    assert sorted((each["kind"], each["ref"]) for each in missing if each["ref"]) == sorted([
        ("tap", up), ("snapshot", asleep), ("directory", stopped),
    ])  # fmt: skip
    assert [each["then"] for each in missing if each["kind"] == "revision"] == [
        "build it again: mvm pool build acme/web"
    ]


@pytest.mark.parametrize("verb", [verb for verb in V if verb.is_sweep])
def test_a_sweep_does_not_overlap_itself(node: Node, verb: JobVerb) -> None:
    node.pool()
    with node.host.locks.hold(f"sweep {verb}", deadline_s=0):
        assert node.sweep(verb) == {"changed": False, "skipped": "the one before is still at work"}
    assert "skipped" not in node.sweep(verb)


def test_a_lock_that_something_within_a_sweep_waits_for_is_no_overlap(node: Node) -> None:
    running(node)
    node.host.fail("network.taps", Failed("network.failed", "no"))
    job = node.services.jobs.submit(V.SWEEP_ORPHANS, str(NODE), NODE, reason=Reason.SWEEP, actor="beat")
    node.drain()
    assert node.services.jobs.job(job.job_id).state is JobState.FAILED
    assert orphans(node)["missing"] == []


def test_stale_pids_are_told_by_instance(node: Node, mvm: CommandLine) -> None:
    (ref,) = running(node)
    node.host.kill_process(InstanceRef.parse(ref))
    swept = node.sweep(V.SWEEP_STALE_PIDS)
    assert [each["ref"] for each in swept["stopped"]] == [ref]
    job_id = mvm.json("job", "list", "--all", "--limit", "1")[0]["job_id"]
    assert "stopped:" in mvm.ok("job", "show", job_id)
