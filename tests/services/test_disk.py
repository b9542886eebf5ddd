"""The disk on the fake host: reports, cleaning, and what does not begin when space is low."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mvm.domain.disk import Watermarks
from mvm.domain.ids import InstanceRef, PoolRef, Revision
from mvm.domain.instance import InFlight
from mvm.domain.job import JobState, JobVerb
from mvm.domain.lifecycle import Status, Verb
from mvm.errors import QuotaExceeded
from mvm.ports.storage import NodeStorage
from mvm.services.disk_room import DiskRoom
from tests.services.conftest import NODE, Node
from tests.support.command_line import CommandLine

V = JobVerb
MIB = 1 << 20
RESERVE, LOW = 1024 * MIB, 4096 * MIB  # as the settings have it
WEB = PoolRef.parse("acme/web")


def build(node: Node, archive: str, ref: str = "acme/web") -> Revision:
    """Build the pool anew from what the archive has by now."""
    node.host.archive = archive
    return Revision(node.ok(V.POOL_BUILD, ref)["revision"])


def started(node: Node, count: int = 1) -> list[str]:
    refs = node.create(count)
    for ref in refs:
        node.ok(V.INSTANCE_START, ref)
    return refs


def storage(node: Node) -> NodeStorage:
    return node.host.storage


def test_a_report_by_tenant_pool_and_kind(node: Node, mvm: CommandLine) -> None:
    node.pool(data_disk_mib=8)
    _, second = started(node, 2)
    node.ok(V.INSTANCE_SLEEP, second)
    node.pool("beta/db")
    report = mvm.json("disk", "report")
    found = {(row["tenant"], row["pool"], row["kind"]): (row["count"], row["bytes"] // MIB) for row in report["items"]}
    assert found == {
        (None, None, "revisions"): (1, 200),
        ("acme", "acme/web", "templates"): (1, 64),
        ("acme", "acme/web", "overlays"): (2, 2),
        ("acme", "acme/web", "data_disks"): (2, 8),
        ("acme", "acme/web", "snapshots"): (1, 8),
    }
    assert report["used_bytes"] == sum(row["bytes"] for row in report["items"]) == 282 * MIB
    assert report["tenants"] == {"acme": 82 * MIB, "beta": 0}
    assert report["kinds"]["revisions"] == 200 * MIB
    assert (report["level"], report["free_bytes"]) == ("ok", 1 << 39)
    assert mvm.json("node", "stats")["disk"]["level"] == "ok"
    text = mvm.ok("disk", "report")
    assert "acme    web   snapshots   1      8.0M" in text
    assert text.splitlines()[-1].startswith("n1: ok; 282.0M used; /fake has 512.0G free of 1024.0G; low below 4.0G")


def test_cleaning_keeps_the_newest_and_what_is_in_use(node: Node, mvm: CommandLine) -> None:
    node.pool()
    one = Revision(node.services.view.pools(None)[0]["revision"])
    (asleep,) = started(node)
    node.ok(V.INSTANCE_SLEEP, asleep)
    two = build(node, "2")
    (ran,) = started(node)
    node.ok(V.INSTANCE_STOP, ran)
    three = build(node, "3")
    started(node)
    assert storage(node).templates() == {(WEB, one), (WEB, two), (WEB, three)}
    tried = mvm.json("disk", "clean", "--keep", "1", "--dry-run")
    assert (tried["changed"], tried["dry_run"], tried["freed_bytes"]) == (False, True, 264 * MIB)
    assert storage(node).revisions() == {one, two, three}
    done = mvm.json("disk", "clean", "--keep", "1")
    assert done["removed"] == tried["removed"] == [
        {"kind": "templates", "name": f"acme/web@{two.short}", "bytes": 64 * MIB},
        {"kind": "revisions", "name": two, "bytes": 200 * MIB},
    ]  # fmt: skip
    assert {each["name"]: each["why"] for each in done["kept"]} == {
        one: f"{asleep} is sleeping on it", three: "pool acme/web starts from it",
    }  # fmt: skip
    assert storage(node).templates() == {(WEB, one), (WEB, three)}
    node.ok(V.INSTANCE_WAKE, asleep)
    node.ok(V.INSTANCE_SLEEP, asleep)
    node.ok(V.INSTANCE_START, ran)
    assert mvm.ok("disk", "clean", "--keep", "1") == "0B freed; 512.0G are free\n"
    node.ok(V.INSTANCE_DESTROY, asleep)
    text = mvm.ok("disk", "clean", "--keep", "1")
    assert text.splitlines()[-1] == "264.0M freed; 512.0G are free"
    assert storage(node).revisions() == {three}


def test_cleaning_is_a_job_like_others(node: Node, mvm: CommandLine) -> None:
    node.pool()
    job_id = mvm.ok("disk", "clean", "--no-wait").strip()
    node.drain()
    shown = mvm.json("job", "show", job_id)
    assert (shown["verb"], shown["subject"], shown["state"]) == ("node.clean", "n1", "succeeded")
    assert shown["result"]["freed_bytes"] == 0
    for keep in ("0", "-1", "33"):
        mvm.fails(2, "disk.invalid_keep", "disk", "clean", "--keep", keep)
    assert mvm("disk", "clean", "--keep", "many").exit_code == 2
    node.fails("disk.invalid_keep", V.NODE_CLEAN, str(NODE), keep="x")


def test_nothing_is_taken_from_a_build_under_way(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.pool()
    node.host.archive = "2"
    inner = node.host.images.build
    swept = []

    def build_and_clean(*asked: Any) -> Revision:
        revision = inner(*asked)
        swept.append(node.services.runner.run(node.services.jobs.new(V.NODE_CLEAN, "n1", NODE, actor="test")))
        return revision

    monkeypatch.setattr(node.host.images, "build", build_and_clean)
    new = node.ok(V.POOL_BUILD, "acme/web")["revision"]
    assert swept[0].state is JobState.SUCCEEDED
    assert {each["name"]: each["why"] for each in (swept[0].result or {})["kept"]}[new] == "an image is being built"
    assert new in storage(node).revisions()


def test_a_revision_that_is_removed_before_it_is_recorded_is_built_again(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.pool()
    inner, times = node.host.images.build, []

    def build_and_lose(*asked: Any) -> Revision:
        revision = inner(*asked)
        times.append(1)
        if len(times) == 1:
            node.host.storage.remove_revision(revision)
        return revision

    monkeypatch.setattr(node.host.images, "build", build_and_lose)
    assert Revision(node.ok(V.POOL_BUILD, "acme/web")["revision"]) in storage(node).revisions()
    assert len(times) == 2


def test_the_sweep_cleans_only_when_space_is_low(node: Node) -> None:
    node.pool()
    for archive in "2345":
        build(node, archive)
    swept = node.sweep(V.SWEEP_DISK)
    assert swept["kinds"]["revisions"] == 1000 * MIB
    assert swept == {
        "changed": False, "dry_run": False, "removed": [], "freed_bytes": 0, "kept": [], "free_bytes": 1 << 39,
        "level": "ok", "kinds": swept["kinds"],
    }  # fmt: skip
    node.host.disk_free = LOW - 1
    swept = node.sweep(V.SWEEP_DISK)
    assert (swept["changed"], swept["level"], len(swept["removed"])) == (True, "low", 2)
    assert len(storage(node).revisions()) == 3
    assert not node.sweep(V.SWEEP_DISK)["changed"]


def test_below_the_reserve_nothing_large_begins(node: Node, mvm: CommandLine) -> None:
    node.pool()
    (ref,) = started(node)
    node.host.disk_free = RESERVE + 15 * MIB  # a VMM holds 16
    node.ok(V.POOL_BUILD, "acme/web")  # built already
    node.host.archive = "2"
    node.fails("disk.low", V.POOL_BUILD, "acme/web")
    failed = node.fails("disk.low", V.INSTANCE_SLEEP, ref)
    assert failed.error is not None
    assert failed.error["fields"]["need_bytes"] == 16 * MIB
    assert "mvm disk clean" in failed.error["hint"]
    assert node.instance(ref).status is Status.RUNNING
    assert not node.host.vmm.paused(InstanceRef.parse(ref), node.host.vmm.processes()[InstanceRef.parse(ref)][0])
    mvm.fails(5, "disk.low", "instance", "sleep", ref, "--force")
    node.ok(V.INSTANCE_WARM, ref)
    node.fails("disk.low", V.INSTANCE_SLEEP, ref)
    assert node.instance(ref).status is Status.WARM
    node.host.disk_free += MIB
    node.ok(V.INSTANCE_SLEEP, ref)


def test_room_is_promised_to_those_that_were_admitted_alone(node: Node) -> None:
    """One that still asks may be refused: many that ask at once would all be refused for each other's sake."""
    node.pool()
    other, ref = started(node, 2)
    node.host.disk_free = RESERVE + 20 * MIB  # a VMM holds 16
    store, job = node.services.store, node.submit(V.INSTANCE_SLEEP, other)
    claimed = replace(node.instance(other), in_flight=InFlight(job.job_id, Verb.SLEEP))
    with store.transaction():
        store.put_job(job.with_(step="prepare guest"))
        store.save_instance(claimed)
    room = DiskRoom(store, node.host.storage, node.host.vmm, Watermarks(reserve=RESERVE, low=LOW))
    with pytest.raises(QuotaExceeded, match=r"of which 16\.0M are promised"):
        room.admit_sleep(InstanceRef.parse(ref), 16 * MIB)
    with store.transaction():
        store.put_job(job)
    room.admit_sleep(InstanceRef.parse(ref), 16 * MIB)


def test_without_room_for_a_template_instances_are_booted(node: Node) -> None:
    node.pool()
    (ref,) = node.create()
    node.host.disk_free = RESERVE
    job = node.do(V.INSTANCE_START, ref)
    assert job.state is JobState.SUCCEEDED
    assert job.result is not None
    assert "making a template may take 256.0M of disk" in job.result["remarks"][0]
    assert not node.instance(ref).cloned
    assert not storage(node).templates()


def test_the_sleep_policy_tells_why_it_keeps_awake(node: Node) -> None:
    node.pool()
    refs = started(node, 3)
    node.host.disk_free = RESERVE + 40 * MIB  # room for two of three
    for _ in range(33):
        node.clock.advance(30)
        asleep = [asked for asked in node.sweep(V.SWEEP_IDLENESS)["asked"] if asked["verb"] == "sleep"]
        if asleep:
            node.host.disk_free = RESERVE + 8 * MIB  # what they have taken
    assert [node.instance(ref).status.value for ref in refs].count("sleeping") == 2
    (awake,) = [ref for ref in refs if node.instance(ref).status is not Status.SLEEPING]
    assert node.instance(awake).status is Status.WARM
    told = node.services.view.explain(InstanceRef.parse(awake))
    assert told["decision"]["verb"] == "keep"
    assert "but the disk is low: sleeping may take 16 MiB" in told["decision"]["reason"]
    assert "the disk is low" in told["next"]["reason"]
    assert not node.registry.jobs(subject=awake, state=JobState.FAILED)
    node.host.disk_free = 1 << 39
    node.clock.advance(30)
    node.sweep(V.SWEEP_IDLENESS)
    assert node.instance(awake).status is Status.SLEEPING
