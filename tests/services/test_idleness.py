"""The sleep policy on the fake host: what the sweep decides, asks for, and tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from mvm.domain.ids import InstanceRef
from mvm.domain.job import JobState, JobVerb
from mvm.domain.lifecycle import Status
from mvm.errors import Failed
from mvm.ports.guest import Worker
from mvm.ports.host import MemoryLeft
from tests.services.conftest import Node
from tests.support.command_line import CommandLine

V = JobVerb


def running(node: Node, count: int = 1, **ways: Any) -> list[str]:
    node.pool()
    if ways:
        node.ok(V.POOL_UPDATE, "acme/web", **ways)
    refs = node.create(count)
    for ref in refs:
        node.ok(V.INSTANCE_START, ref)
    return refs


def sweep(node: Node, seconds: float = 30) -> Mapping[str, Any]:
    """Time passes, then a sweep, and the jobs it asked for."""
    node.clock.advance(seconds)
    return node.sweep(V.SWEEP_IDLENESS)


def statuses(node: Node, refs: Sequence[str]) -> list[str]:
    return [node.instance(ref).status.value for ref in refs]


def explain(node: Node, ref: str) -> dict[str, Any]:
    return node.services.view.explain(InstanceRef.parse(ref))


def test_idle_ones_go_warm_then_to_sleep(node: Node) -> None:
    (ref,) = running(node)
    seen: dict[int, str] = {}
    for at in range(0, 1200, 30):
        sweep(node)
        seen.setdefault(at, node.instance(ref).status.value)
    assert [at for at, status in seen.items() if status == "warm"] == list(range(300, 900, 30))
    assert [at for at, status in seen.items() if status == "sleeping"] == list(range(900, 1200, 30))
    jobs = [job for job in node.registry.jobs(subject=ref) if job.reason == "sleep policy"]
    assert [(job.verb, job.actor, job.params["why"]) for job in reversed(jobs)] == [
        (V.INSTANCE_WARM, "sleep policy", "idle for 300 s, warm after 300 s"),
        (V.INSTANCE_SLEEP, "sleep policy", "idle for 900 s, sleep after 900 s"),
    ]


def test_a_woken_one_is_idle_afresh(node: Node) -> None:
    (ref,) = running(node)
    for _ in range(31):
        sweep(node)
    assert node.instance(ref).status is Status.SLEEPING
    node.ok(V.INSTANCE_WAKE, ref)
    for _ in range(10):
        assert sweep(node)["asked"] == []
    assert [asked["verb"] for asked in sweep(node)["asked"]] == ["warm"]


def test_who_works_stays(node: Node) -> None:
    busy, burning, idle = running(node, 3)
    node.host.work(InstanceRef.parse(busy), Worker.BUSY)
    for tick in range(40):
        node.host.work(InstanceRef.parse(burning), Worker.IDLE, cpu_s=tick * 3.0)
        sweep(node)
    assert statuses(node, [busy, burning, idle]) == ["running", "running", "sleeping"]
    assert explain(node, busy)["decision"]["reason"] == "its worker is busy"
    assert explain(node, burning)["decision"]["reason"] == "it works: 10% CPU, 0 B/s in, 0 B/s out"
    node.host.work(InstanceRef.parse(busy), Worker.READY)
    for _ in range(11):
        sweep(node)
    assert statuses(node, [busy]) == ["warm"]


@pytest.mark.parametrize(
    "way", [{"pinned": True}, {"critical": True}, {"sleep_policy": {"warm_after_s": 0, "sleep_after_s": 0}}]
)
def test_pinned_and_critical_pools_and_those_without_a_policy_are_left_alone(node: Node, way: dict[str, Any]) -> None:
    refs = running(node, 2, **way)
    node.host.memory_left = MemoryLeft(16384, 10)
    for _ in range(40):
        assert sweep(node)["asked"] == []
    assert statuses(node, refs) == ["running"] * 2


def test_a_silent_guest_is_kept(node: Node) -> None:
    (ref,) = running(node)
    sweep(node)
    node.host.hang_guest(InstanceRef.parse(ref))
    for _ in range(40):
        assert sweep(node)["asked"] == []
    assert explain(node, ref)["decision"]["reason"] == "its guest did not say what it does"


def test_when_memory_is_short_the_coldest_sleep_and_no_more_than_needed(node: Node) -> None:
    refs = running(node, 4)
    for ref in refs[1:]:
        node.host.work(InstanceRef.parse(ref), Worker.BUSY)
    sweep(node)
    sweep(node)
    for ref in refs[1:3]:
        node.host.work(InstanceRef.parse(ref), Worker.IDLE)
    sweep(node)
    assert statuses(node, refs) == ["running"] * 4
    node.host.memory_left = MemoryLeft(1000, 80)  # of 100 to keep; each gives back 16
    found = sweep(node)
    assert found["short_mib"] == 20
    assert statuses(node, refs) == ["sleeping", "sleeping", "running", "running"]
    assert "memory is short by 20 MiB" in explain(node, refs[0])["because"]
    node.host.memory_left = MemoryLeft(1000, 99)
    sweep(node)
    assert statuses(node, refs) == ["sleeping", "sleeping", "sleeping", "running"]


def test_memory_on_its_way_is_not_asked_for_twice(node: Node) -> None:
    refs = running(node, 3)
    for _ in range(3):
        sweep(node)
    node.host.memory_left = MemoryLeft(1000, 90)
    node.submit(V.INSTANCE_SLEEP, refs[0])
    job = node.services.jobs.submit(V.SWEEP_IDLENESS, "n1", node.instance(refs[0]).node_id, actor="beat")
    done = node.services.runner.run(job)
    assert done.result == {"changed": False, "short_mib": 0, "asked": []}


def test_who_has_a_job_is_left_to_it(node: Node) -> None:
    (ref,) = running(node)
    for _ in range(10):
        sweep(node)
    node.clock.advance(30)
    waiting = node.submit(V.INSTANCE_STOP, ref)
    job = node.services.jobs.submit(V.SWEEP_IDLENESS, "n1", waiting.node_id, actor="beat")
    assert node.services.runner.run(job).result == {"changed": False, "short_mib": 0, "asked": []}
    assert explain(node, ref)["waiting"] == [
        {"job_id": waiting.job_id, "verb": "instance.stop", "reason": "manual"}
    ]  # fmt: skip


def test_what_was_woken_before_its_job_came_is_not_put_away(node: Node) -> None:
    (ref,) = running(node, sleep_policy={"warm_after_s": 0, "sleep_after_s": 60})
    node.ok(V.INSTANCE_WARM, ref)
    node.clock.advance(30)
    late = node.submit(V.INSTANCE_SLEEP, ref, run=node.instance(ref).run, why="idle")
    node.services.view.wake(InstanceRef.parse(ref), "tester")
    node.drain()
    done = node.services.jobs.job(late.job_id)
    assert done.state is JobState.CANCELLED
    assert node.instance(ref).status is Status.RUNNING
    assert node.instance(ref).last_error is None


def test_a_sleep_that_fails_is_not_tried_again_at_once(node: Node) -> None:
    (ref,) = running(node, sleep_policy={"warm_after_s": 0, "sleep_after_s": 120})
    node.host.fail("vmm.save", Failed("disk.full", "no space left"))
    asked = [len(sweep(node)["asked"]) for _ in range(12)]
    assert asked == [0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0]
    assert node.instance(ref).status is Status.SLEEPING


def test_reconcile_leaves_to_the_policy_what_sleeps(node: Node) -> None:
    node.pool()
    node.ok(V.POOL_SCALE, "acme/web", running=2)
    for _ in range(32):
        sweep(node)
        assert node.sweep(V.SWEEP_RECONCILE)["changed"] is False
    assert [i.status for i in node.services.store.instances()] == [Status.SLEEPING] * 2
    node.ok(V.POOL_SCALE, "acme/web", running=1)
    assert sorted(i.status for i in node.services.store.instances()) == [Status.SLEEPING, Status.STOPPED]


def test_a_host_whose_wall_clock_is_set_puts_nobody_to_sleep(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    (ref,) = running(node)
    sweep(node)
    later = node.clock.now().replace(year=2040)
    monkeypatch.setattr(node.clock, "now", lambda: later)
    assert sweep(node)["asked"] == []
    assert node.instance(ref).status is Status.RUNNING


# --- what is told of it


def test_an_instance_explains_itself(node: Node) -> None:
    (ref,) = running(node)
    fresh = explain(node, ref)
    assert fresh["because"].startswith("instance.start by test, reason manual: succeeded at 2026-01-01 ")
    assert fresh["decision"] is None
    assert fresh["next"]["reason"] == "the sleep policy has not looked at it yet"
    sweep(node)
    sweep(node)
    told = explain(node, ref)
    assert told["last_job"]["verb"] == "instance.start"
    assert told["policy"] == {
        "warm_after_s": 300, "sleep_after_s": 900, "min_running_s": 60, "pinned": False, "critical": False,
    }  # fmt: skip
    assert told["decision"]["verb"] == "keep"
    assert told["sample"] == {
        "age_s": 0.0, "idle_s": 30.0, "cpu_percent": 0.0, "rx_bytes_s": 0, "tx_bytes_s": 0, "load": 0.0,
        "worker": "unknown",
    }  # fmt: skip
    assert (told["next"]["verb"], told["next"]["in_s"]) == ("warm", 270.0)
    for _ in range(10):
        sweep(node)
    told = explain(node, ref)
    assert told["status"] == "warm"
    assert told["because"].startswith(
        "instance.warm by sleep policy, reason sleep policy (idle for 300 s, warm after 300 s): succeeded"
    )
    assert told["acted"]["verb"] == "warm"
    assert told["next"]["verb"] == "sleep"
    for _ in range(20):
        sweep(node)
    told = explain(node, ref)
    assert told["status"] == "sleeping"
    assert told["acted"]["verb"] == "sleep"
    assert told["next"]["reason"] == f"it sleeps until somebody asks: mvm instance wake {ref}"
    node.ok(V.INSTANCE_STOP, ref)
    assert explain(node, ref)["next"]["reason"] == "it stays stopped until it is started"


def test_a_decision_is_told_as_long_as_it_concerns_what_is_now(node: Node) -> None:
    (ref,) = running(node)
    sweep(node)
    assert explain(node, ref)["decision"]["verb"] == "keep"
    for verb in (V.INSTANCE_STOP, V.INSTANCE_START, V.INSTANCE_SLEEP, V.INSTANCE_WAKE):
        node.ok(verb, ref)
        assert explain(node, ref)["decision"] is None, f"it was of the run before {verb}"
    sweep(node)
    assert explain(node, ref)["decision"]["verb"] == "keep"
    node.ok(V.POOL_UPDATE, "acme/web", pinned=True)
    assert explain(node, ref)["decision"] is None, "the policy leaves it alone now"


def test_a_failure_is_part_of_the_explanation(node: Node) -> None:
    (ref,) = running(node)
    node.host.fail("vmm.save", Failed("disk.full", "no space left"))
    node.fails("disk.full", V.INSTANCE_SLEEP, ref)
    told = explain(node, ref)
    assert told["last_job"]["error"] == "disk.full"
    assert told["last_error"] == "no space left [disk.full]"
    node.ok(V.POOL_UPDATE, "acme/web", pinned=True)
    assert explain(node, ref)["next"]["reason"] == "the sleep policy leaves it alone: its pool is pinned"


def test_what_sleeping_takes_and_saves(node: Node, mvm: CommandLine) -> None:
    first, second = running(node, 2)
    awake = mvm.json("instance", "stats", first)
    assert awake["ram_bytes"] == 256 << 20
    assert awake["memory"] == {"rss_bytes": 64 << 20, "pss_bytes": 32 << 20, "private_bytes": 16 << 20}
    assert (awake["snapshot_bytes"], awake["sleep_s"], awake["wake_s"]) == (None, None, None)
    assert awake["template"]["bytes"] > 0
    size = node.ok(V.INSTANCE_SLEEP, first)["snapshot_bytes"]
    asleep = mvm.json("instance", "stats", first)
    assert asleep["memory"] is None
    assert asleep["snapshot_bytes"] == size
    assert asleep["snapshot_ratio"] == round(size / (256 << 20), 5)
    assert asleep["snapshot"] == {"kind": "delta", "compression": "zstd"}
    assert asleep["sleep_s"] == 0
    stats = mvm.json("node", "stats")
    assert (stats["running"], stats["warm"], stats["sleeping"]) == (1, 0, 1)
    assert stats["memory_bytes"] == {
        "in_use": 32 << 20, "saved_by_sleeping": (16 << 20) - size, "saved_by_sharing": 32 << 20,
    }  # fmt: skip
    node.ok(V.INSTANCE_WAKE, first)
    woken = mvm.json("instance", "stats", first)
    assert (woken["wake_s"], woken["woke_from"], woken["snapshot_bytes"]) == (0, "sleeping", size)
    node.ok(V.INSTANCE_DESTROY, first)
    mvm.fails(3, "instance.not_found", "instance", "stats", first)
    mvm.fails(3, "instance.not_found", "instance", "explain", first)
    assert "snapshot_ratio" in mvm.ok("instance", "stats", second)


def test_pools_say_how_they_start_and_sleep(node: Node, mvm: CommandLine) -> None:
    mvm.ok("tenant", "create", "acme")
    create = ("pool", "create", "acme/web", "--flake", "builtin:", "--profile", "minimal")
    mvm.fails(2, "pool.invalid_policy", *create, "--warm-after", "20", "--sleep-after", "10")
    made = mvm.json(*create, "--cold", "--compression", "lz4", "--pinned", "--sleep-after", "400")
    assert made["start"] == "cold"
    assert made["compression"] == "lz4"
    assert (made["pinned"], made["critical"]) == (True, False)
    assert made["sleep_policy"] == {"warm_after_s": 300, "sleep_after_s": 400, "min_running_s": 60}
    changed = mvm.json("pool", "update", "acme/web", "--no-cold", "--no-pinned", "--critical", "--min-running", "5")
    assert (changed["start"], changed["compression"]) == ("clone", "lz4")
    assert (changed["pinned"], changed["critical"]) == (False, True)
    assert changed["sleep_policy"] == {"warm_after_s": 300, "sleep_after_s": 400, "min_running_s": 5}
    mvm.fails(2, "pool.invalid_policy", "pool", "update", "acme/web", "--warm-after", "500")
    mvm.fails(2, "pool.nothing_to_update", "pool", "update", "acme/web")
    mvm.fails(3, "pool.not_found", "pool", "update", "acme/api", "--pinned")
    assert mvm.json("pool", "info", "acme/web")["sleep_policy"] == changed["sleep_policy"]


def test_explain_is_readable(node: Node, mvm: CommandLine) -> None:
    (ref,) = running(node)
    text = mvm.ok("instance", "explain", ref)
    assert "because " in text
    assert "instance.start by test" in text
