"""Reconcile says what it does not do and why, asks for nothing that must fail, and exists for all or for none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from mvm.domain.idleness import Choice
from mvm.domain.ids import InstanceRef, TenantId
from mvm.domain.job import JobState, JobVerb, Reason
from mvm.domain.lifecycle import Status
from mvm.domain.pool import DesiredCounts
from mvm.domain.tenant import Quota, Tenant
from mvm.domain.vmm import Ending
from mvm.errors import Failed, GuestSilent, NotFound
from mvm.ports.host import MemoryLeft
from tests.services.conftest import NODE, Node
from tests.support.command_line import CommandLine
from tests.support.make import ACME

V = JobVerb
OVERTAKING_S = 0.5  # in which it would be done, if nothing held it


def statuses(node: Node) -> list[str]:
    return sorted(instance.status.value for instance in node.services.store.instances())


def causes(node: Node, pool: str = "acme/web") -> Mapping[str, Mapping[str, Any]]:
    """What keeps the pool from its counts, as `pool info` shows it."""
    (row,) = [row for row in node.services.view.pools(TenantId(pool.split("/")[0])) if row["ref"] == pool]
    return {obstacle["cause"]: obstacle for obstacle in row["obstacles"]}


def passes(node: Node, count: int = 3) -> list[Mapping[str, Any]]:
    swept = []
    for _ in range(count):
        swept.append(node.sweep(V.SWEEP_RECONCILE))
        node.clock.advance(15)
    return swept


def failed_jobs(node: Node) -> list[str]:
    return [f"{job.verb} {(job.error or {})['code']}" for job in node.services.jobs.list(state=JobState.FAILED)]


# --- holds


def test_scaling_ends_holds(node: Node) -> None:
    node.pool()
    for ref in node.create(2):
        node.ok(V.INSTANCE_START, ref)
        node.ok(V.INSTANCE_STOP, ref)
    node.ok(V.POOL_SCALE, "acme/web", running=2)
    assert statuses(node) == ["running", "running"]
    killed = node.services.store.instances()[0].ref
    node.host.kill_process(killed)
    node.sweep(V.SWEEP_STALE_PIDS)
    node.sweep(V.SWEEP_RECONCILE)
    assert statuses(node) == ["running", "running"]
    assert causes(node) == {}


def test_whoever_is_held_is_named_with_the_time_when_that_ends(mvm: CommandLine, node: Node) -> None:
    node.pool()
    node.ok(V.POOL_SCALE, "acme/web", running=2)
    first, other = (instance.ref for instance in node.services.store.instances())
    node.clock.advance(1)
    node.ok(V.INSTANCE_STOP, str(first))
    (held,) = [obstacle for obstacle in node.sweep(V.SWEEP_RECONCILE)["obstacles"] if obstacle["cause"] == "held"]
    until = node.services.store.instance(first).manual_override_until
    assert until is not None
    assert (held["subject"], held["count"], held["instances"]) == ("acme/web", 1, [str(first)])
    assert held["until"] == until.isoformat()
    assert causes(node)["held"] == held
    explained = mvm.json("instance", "explain", str(first))
    assert explained["held_until"] == until.isoformat()
    assert [obstacle["cause"] for obstacle in explained["obstacles"]] == ["held"]
    assert "as a person left it" in explained["next"]["reason"]
    assert "stay as a person left them" in mvm.ok("pool", "info", "acme/web")
    assert mvm.json("instance", "explain", str(other))["held_until"] is None

    node.clock.advance((until - node.clock.now()).total_seconds())
    explained = mvm.json("instance", "explain", str(first))
    assert (explained["next"]["verb"], explained["held_until"]) == ("start", None)
    node.sweep(V.SWEEP_RECONCILE)
    assert (statuses(node), causes(node)) == (["running", "running"], {})


@pytest.mark.parametrize("by", ["hand", "document"])
@pytest.mark.parametrize("counts", [{"running": 2}, {"running": 1, "warm": 1}, {"running": 0, "sleeping": 2}])
def test_the_command_that_a_remark_names_ends_what_holds(
    mvm: CommandLine, node: Node, tmp_path: Path, by: str, counts: dict[str, int]
) -> None:
    if by == "hand":
        node.pool()
        node.ok(V.POOL_SCALE, "acme/web", **counts)
    else:
        mvm.ok("agent", "reconcile", "--desired", document(tmp_path, {"desired_counts": counts}))
    passes(node, 4)
    wanted = statuses(node)
    assert len(wanted) == 2
    node.clock.advance(1)
    ref = str(node.services.store.instances()[0].ref)
    mvm.ok("instance", "stop", ref)
    passes(node)
    assert statuses(node) != wanted
    node.clock.advance(1)
    remark = causes(node)["held"]["text"]
    command = remark.rpartition("to end that: ")[2]
    explained = mvm.json("instance", "explain", ref)["next"]["reason"]
    assert explained.endswith(f"to end that: {command}")
    mvm.ok(*command.split()[1:])
    passes(node, 4)
    assert (statuses(node), causes(node)) == (wanted, {})


def test_a_stop_by_reconcile_makes_no_hold(node: Node) -> None:
    node.pool()
    refs = node.create(2)
    for ref in refs:
        node.ok(V.INSTANCE_START, ref)
    node.ok(V.POOL_SCALE, "acme/web", running=1)
    assert statuses(node) == ["running", "stopped"]
    (stopped,) = [i for i in node.services.store.instances() if i.status is Status.STOPPED]
    assert stopped.manual_override_until is None
    node.host.kill_process(next(i.ref for i in node.services.store.instances() if i.status is Status.RUNNING))
    node.sweep(V.SWEEP_STALE_PIDS)
    node.sweep(V.SWEEP_RECONCILE)
    assert statuses(node) == ["running", "stopped"]


def test_a_word_that_was_spoken_before_the_scaling_holds_no_longer_however_late_it_is_done(node: Node) -> None:
    node.pool()
    node.ok(V.POOL_SCALE, "acme/web", running=1)
    (ref,) = [str(instance.ref) for instance in node.services.store.instances()]
    node.clock.advance(1)
    stop = node.services.jobs.new(V.INSTANCE_STOP, ref, NODE, actor="ann")
    node.clock.advance(1)
    node.ok(V.POOL_SCALE, "acme/web", running=1)
    node.services.runner.run(stop)
    assert statuses(node) == ["stopped"]
    node.sweep(V.SWEEP_RECONCILE)
    assert statuses(node) == ["running"]


# --- what cannot be done


def document(tmp_path: Path, pool: dict[str, Any], **tenant: Any) -> str:
    path = tmp_path / "fleet.json"
    web = {"pool_id": "web", "flake_ref": "builtin:", "profile": "minimal", "desired_counts": {"running": 2}, **pool}
    network = {"tenant_net_id": 7, "ipv4_subnet": "10.240.7.0/24"}
    path.write_text(json.dumps({
        "schema_version": 1, "node_id": "n1",
        "tenants": [{"tenant_id": "acme", "network": network, "pools": [web], **tenant}],
    }))  # fmt: skip
    return str(path)


def test_egress_without_an_uplink_is_blocked_until_there_is_one(
    mvm: CommandLine, node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("agent", "reconcile", "--desired", document(tmp_path, {"egress": {"policy": "nat"}}))
    assert "! acme/web: not created: its egress needs an uplink" in mvm.ok(*words, "--plan")
    assert "acme/web: not created" in mvm.fails(4, "desired.blocked", *words).stderr
    swept = passes(node)
    assert [(each["changed"], each["jobs"]) for each in swept] == [(False, 0)] * 3
    assert [[obstacle["cause"] for obstacle in each["obstacles"]] for each in swept] == [["no_uplink"]] * 3
    assert failed_jobs(node) == []

    reconcile = node.services.view._desired._reconcile
    monkeypatch.setattr(reconcile, "_uplink", True)
    monkeypatch.setattr(node.services.networks, "plan", replace(node.services.networks.plan, uplink="up0"))
    passes(node)
    assert statuses(node) == ["running", "running"]


def test_a_shape_that_the_host_has_not_is_blocked(mvm: CommandLine, node: Node, tmp_path: Path) -> None:
    node.host.memory_left = MemoryLeft(1024, 900)
    words = ("agent", "reconcile", "--desired", document(tmp_path, {"instance_resources": {"mem_mib": 2048}}))
    assert "less memory than one of them needs" in mvm.fails(4, "desired.blocked", *words).stderr
    assert {obstacle["cause"] for each in passes(node) for obstacle in each["obstacles"]} == {"host"}
    assert (statuses(node), failed_jobs(node)) == ([], [])
    node.host.memory_left = MemoryLeft(4096, 4000)
    node.sweep(V.SWEEP_RECONCILE)
    assert statuses(node) == ["running", "running"]


def test_a_shape_that_the_quota_has_no_room_for_is_blocked(mvm: CommandLine, node: Node, tmp_path: Path) -> None:
    """Nothing of it is to run, so that the document as such is within its quota."""
    pool = {"instance_resources": {"vcpus": 8}, "desired_counts": {"running": 0}}
    words = ("agent", "reconcile", "--desired", document(tmp_path, pool, quotas={"max_vcpus": 4}))
    assert "max_vcpus" in mvm.fails(4, "desired.blocked", *words).stderr
    passes(node)
    assert failed_jobs(node) == []


def test_a_full_subnet_is_blocked_and_named(mvm: CommandLine, node: Node, tmp_path: Path) -> None:
    node.ok(V.TENANT_CREATE, "acme", net_id=7, subnet="10.240.7.0/29")
    node.pool("acme/other")
    node.create(4, "acme/other")
    network = {"tenant_net_id": 7, "ipv4_subnet": "10.240.7.0/29"}
    words = ("agent", "reconcile", "--desired", document(tmp_path, {}, network=network))
    assert "no free address" in mvm.fails(4, "desired.blocked", *words).stderr
    assert {obstacle["cause"] for each in passes(node) for obstacle in each["obstacles"]} == {"subnet"}
    assert failed_jobs(node) == []
    for other in [i.ref for i in node.services.store.instances() if i.ref.pool == "other"][:2]:
        node.ok(V.INSTANCE_DESTROY, str(other))
    node.sweep(V.SWEEP_RECONCILE)
    assert statuses(node).count("running") == 2


def test_no_image_is_built_again_and_again_on_a_full_disk(mvm: CommandLine, node: Node, tmp_path: Path) -> None:
    free = node.host.disk_free
    node.host.disk_free = 1 << 20
    words = ("agent", "reconcile", "--desired", document(tmp_path, {}))
    assert "the disk is low" in mvm.fails(4, "desired.blocked", *words).stderr
    passes(node)
    assert failed_jobs(node) == []
    node.host.disk_free = free
    passes(node)
    assert statuses(node) == ["running", "running"]


def test_what_has_failed_is_asked_for_again_after_a_pause_that_doubles(node: Node) -> None:
    node.pool(cold=True)
    node.ok(V.POOL_SCALE, "acme/web", running=0)
    node.create()
    with node.services.store.transaction():
        pool = node.services.store.pools()[0]
        node.services.store.put_pool(replace(pool, desired=DesiredCounts(1)))
    node.host.fail("vmm.boot", Failed("vmm.failed", "it does not"), times=100)
    for _ in range(40):  # ten minutes
        swept = node.sweep(V.SWEEP_RECONCILE)
        node.clock.advance(15)
    assert failed_jobs(node).count("instance.start vmm.failed") == 6
    (failed,) = [obstacle for obstacle in swept["obstacles"] if obstacle["cause"] == "failed"]
    assert "instance.start of acme/web/i-" in failed["text"]
    assert "failed [vmm.failed]; it is asked for again at " in failed["text"]
    node.host._faults.clear()
    node.clock.advance(300)
    node.sweep(V.SWEEP_RECONCILE)
    assert statuses(node) == ["running"]


def held_up(node: Node, ref: str, swept: Mapping[str, Any]) -> None:
    """The pass before, `pool info` and `explain` say the same of a pool that is kept from its count by `ref` alone."""
    (obstacle,) = swept["obstacles"]
    told = node.services.view.explain(InstanceRef.parse(ref))
    assert causes(node) == {obstacle["cause"]: obstacle}
    assert told["obstacles"] == [obstacle]
    assert (obstacle["cause"], obstacle["count"], obstacle["instances"]) == ("failed", 1, [ref])
    assert (told["next"]["verb"], told["next"]["at"]) == ("start", obstacle["until"])
    assert told["next"]["reason"].endswith(obstacle["text"])


def test_the_sweep_pool_info_and_explain_agree_while_a_start_keeps_failing(mvm: CommandLine, node: Node) -> None:
    node.pool(cold=True)
    (ref,) = node.create()
    with node.services.store.transaction():
        node.services.store.put_pool(replace(node.services.store.pools()[0], desired=DesiredCounts(1)))
    node.host.fail("vmm.boot", Failed("vmm.failed", "it does not"), times=100)
    asked = 0
    for _ in range(40):  # ten minutes
        swept = node.sweep(V.SWEEP_RECONCILE)
        node.clock.advance(1)
        if swept["jobs"]:
            asked += 1
            (obstacle,) = swept["obstacles"]
            assert (obstacle["cause"], obstacle["instances"]) == ("under_way", [ref]), "this pass asks for it"
            assert list(causes(node)) == ["failed"], "and it has failed again"
        else:
            held_up(node, ref, swept)
        node.clock.advance(14)
    assert asked == 6
    assert "failed [vmm.failed]; it is asked for again at " in mvm.ok("pool", "info", "acme/web")
    assert "failed [vmm.failed]; it is asked for again at " in mvm.ok("instance", "explain", ref)


def test_what_waits_for_an_image_that_is_not_built_says_so(mvm: CommandLine, node: Node, tmp_path: Path) -> None:
    node.host.fail("images.build", Failed("build.failed", "it does not"), times=100)
    mvm("agent", "reconcile", "--desired", document(tmp_path, {}))
    node.sweep(V.SWEEP_RECONCILE)
    node.clock.advance(15)
    node.sweep(V.SWEEP_RECONCILE)
    node.clock.advance(1)
    swept = node.sweep(V.SWEEP_RECONCILE)
    (obstacle,) = swept["obstacles"]
    assert causes(node) == {"failed": obstacle}
    assert (swept["jobs"], obstacle["count"]) == (0, 2)
    assert "pool.build of acme/web failed [build.failed]" in obstacle["text"]
    assert statuses(node) == []


def test_explain_promises_no_start_that_does_not_come(node: Node) -> None:
    node.pool()
    node.ok(V.POOL_SCALE, "acme/web", running=1)
    (ref,) = [instance.ref for instance in node.services.store.instances()]
    node.host.kill_process(ref)
    node.sweep(V.SWEEP_STALE_PIDS)
    told = node.services.view.explain(ref)["next"]
    assert (told["verb"], "was found gone; the next pass: too few" in told["reason"]) == ("start", True)
    node.ok(V.POOL_SCALE, "acme/web", running=0)
    told = node.services.view.explain(ref)["next"]
    assert told["verb"] is None
    assert "was found gone; it stays stopped until it is started; the pool is kept at running=0" in told["reason"]
    node.sweep(V.SWEEP_RECONCILE)
    assert statuses(node) == ["stopped"]


def test_explain_promises_no_start_in_a_place_that_a_held_one_takes(node: Node) -> None:
    node.pool()
    node.ok(V.POOL_SCALE, "acme/web", running=1)
    (ref,) = [instance.ref for instance in node.services.store.instances()]
    node.clock.advance(1)
    (other,) = node.create()
    node.ok(V.INSTANCE_START, other)
    node.host.kill_process(ref)
    node.sweep(V.SWEEP_STALE_PIDS)
    node.sweep(V.SWEEP_RECONCILE)
    assert node.services.store.instance(ref).status is Status.STOPPED
    assert node.services.view.explain(ref)["next"]["verb"] is None


@pytest.mark.parametrize("critical", [False, True])
def test_one_that_rests_by_its_pools_on_exit_is_named(node: Node, critical: bool) -> None:
    node.pool()
    node.ok(V.POOL_UPDATE, "acme/web", on_exit="stop", critical=critical)
    node.ok(V.POOL_SCALE, "acme/web", running=1)
    (ref,) = [instance.ref for instance in node.services.store.instances()]
    node.host.halt_guest(ref, Ending.HALTED)
    node.sweep(V.SWEEP_STALE_PIDS)
    swept = node.sweep(V.SWEEP_RECONCILE)
    assert (statuses(node), [each["cause"] for each in swept["obstacles"]]) == (["stopped"], ["rested"])
    assert list(causes(node)) == ["rested"]
    assert "it rests: its pool's on_exit is stop" in node.services.view.explain(ref)["next"]["reason"]


def test_nobody_is_made_warm_beyond_what_the_quota_gives(node: Node) -> None:
    node.ok(V.TENANT_CREATE, "acme", quota={"max_warm": 1})
    node.pool()
    node.ok(V.POOL_UPDATE, "acme/web", sleep_policy={"warm_after_s": 30, "sleep_after_s": 0, "min_running_s": 0})
    for ref in node.create(3):
        node.ok(V.INSTANCE_START, ref)
    for _ in range(8):
        node.sweep(V.SWEEP_IDLENESS)
        node.clock.advance(30)
    assert statuses(node) == ["running", "running", "warm"]
    assert failed_jobs(node) == []
    kept = next(i.ref for i in node.services.store.instances() if i.status is Status.RUNNING)
    decision = node.services.view.explain(kept)["decision"]
    assert (decision["verb"], "max_warm" in decision["reason"]) == (Choice.KEEP, True)


# --- guests that are silent as they boot


def test_a_template_that_is_silent_is_named_as_one_and_tried_again(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.pool()
    (ref,) = node.create()
    hello, asked = node.host.guest.hello, []

    def silent(guest: InstanceRef, directory: Path, *, deadline_s: float) -> None:
        asked.append(guest)
        if len(asked) <= 2:  # once, and once more in the same try
            raise GuestSilent("guest.silent", f"the guest of {guest} did not answer in time")
        hello(guest, directory, deadline_s=deadline_s)

    monkeypatch.setattr(node.host.guest, "hello", silent)
    job = node.do(V.INSTANCE_START, ref)
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 2)
    (setback,) = job.setbacks
    assert setback["message"] == "the guest of the template of pool acme/web did not answer in time"
    assert asked[0] == asked[1] != node.instance(ref).ref, "it was a template that was silent"


# --- for all or for none


def exists(node: Node, tenant: str = "acme") -> tuple[bool, bool]:
    """For those who ask the registry, and for those who ask the node."""
    try:
        node.services.store.tenant(TenantId(tenant))
    except NotFound:
        return node.registry.tenant(TenantId(tenant)) is not None, False
    return node.registry.tenant(TenantId(tenant)) is not None, True


def test_a_tenant_that_could_not_be_made_exists_for_nobody(node: Node) -> None:
    node.host.fail("network.ensure_bridge", Failed("network.failed", "no bridge"))
    node.fails("network.failed", V.TENANT_CREATE, "acme", net_id=7)
    assert exists(node) == (False, False)
    node.ok(V.TENANT_CREATE, "acme", net_id=7)
    assert exists(node) == (True, True)


def test_a_tenant_whose_making_is_cancelled_or_given_up_exists_for_nobody(node: Node) -> None:
    job = node.services.jobs.new(V.TENANT_CREATE, "acme", NODE, actor="ann")
    node.registry.reserve_tenant(ACME, None, None, Quota(), job.submitted_at)  # where its worker was killed
    dead = job.with_(state=JobState.RUNNING, attempt=1, deaths=4)
    assert (node.services.runner.run(dead).error or {})["code"] == "job.poison"
    assert exists(node) == (False, False)


def test_what_could_not_be_given_back_is_given_back_by_a_sweep(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(reserved: object) -> None:
        raise Failed("registry.failed", "not now")

    node.host.fail("network.ensure_bridge", Failed("network.failed", "no bridge"))
    with monkeypatch.context() as patch:
        patch.setattr(node.registry, "withdraw_tenant", away)
        node.fails("registry.failed", V.TENANT_CREATE, "acme")
    assert exists(node) == (True, False)
    node.sweep(V.SWEEP_ORPHANS)
    assert exists(node) == (False, False)


def _unwritable(tenant: object) -> None:
    raise Failed("store.failed", "not now")


def test_an_undone_tenants_net_id_is_given_back_when_its_bridge_is_gone(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is made in the very moment in which it is given back gets it."""
    withdraw, put = node.registry.withdraw_tenant, node.services.store.put_tenant

    def overtaken(reserved: Tenant) -> None:
        withdraw(reserved)
        monkeypatch.setattr(node.services.store, "put_tenant", put)
        job = node.services.jobs.new(V.TENANT_CREATE, "bolt", NODE, actor="ann")
        assert node.services.runner.run(job).state is JobState.SUCCEEDED

    monkeypatch.setattr(node.registry, "withdraw_tenant", overtaken)
    monkeypatch.setattr(node.services.store, "put_tenant", _unwritable)
    node.fails("store.failed", V.TENANT_CREATE, "acme")
    bolt = node.services.store.tenant(TenantId("bolt")).network
    assert node.host.network.bridges() == {bolt.bridge}
    assert node.sweep(V.SWEEP_ORPHANS)["repaired"] == []


def test_an_undone_tenants_bridge_goes_though_the_registry_is_away(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(reserved: object) -> None:
        raise Failed("registry.failed", "not now")

    with monkeypatch.context() as patch:
        patch.setattr(node.services.store, "put_tenant", _unwritable)
        patch.setattr(node.registry, "withdraw_tenant", away)
        node.fails("registry.failed", V.TENANT_CREATE, "acme")
    assert node.host.network.bridges() == frozenset()


def test_a_create_that_is_given_up_leaves_another_ones_bridge_alone(node: Node) -> None:
    """The other has reserved the tenant, and has made its bridge but not yet its record."""
    theirs = node.registry.reserve_tenant(ACME, None, None, Quota(), node.clock.now() - timedelta(seconds=1))
    node.services.networks.open(theirs.network)
    job = node.services.jobs.new(V.TENANT_CREATE, "acme", NODE, actor="ann")
    node.services.runner.run(job.with_(state=JobState.RUNNING, attempt=1, deaths=4))
    assert node.registry.tenant(ACME) == theirs
    assert node.host.network.bridges() == {theirs.network.bridge}


def test_a_tenant_of_another_node_is_not_given_back(node: Node) -> None:
    node.registry.reserve_tenant(ACME, None, None, Quota(), node.clock.now() - timedelta(days=1))
    node.sweep(V.SWEEP_ORPHANS)
    assert exists(node) == (True, False)


def test_a_pool_that_could_not_be_made_exists_for_nobody(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.ok(V.TENANT_CREATE, "acme")

    def away(pool: object, other: object) -> None:
        raise Failed("registry.failed", "not now")

    with monkeypatch.context() as patch:
        patch.setattr(node.registry, "place_pool", away)
        node.fails("registry.failed", V.POOL_CREATE, "acme/web", flake_ref="builtin:", profile="minimal")
    assert (node.services.store.pools(), node.registry._pools) == ([], {})
    node.pool()


def test_a_pool_that_could_not_be_destroyed_exists_for_all(node: Node) -> None:
    node.pool()
    node.host.fail("storage.drop_templates", Failed("storage.failed", "it cannot"))
    node.fails("storage.failed", V.POOL_DESTROY, "acme/web")
    (pool,) = node.services.store.pools()
    assert node.registry.pool_node(pool.ref) == NODE
    node.ok(V.POOL_DESTROY, "acme/web")
    assert (node.services.store.pools(), node.registry._pools) == ([], {})


def test_a_heartbeat_does_not_bring_back_what_is_being_destroyed(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads what the node has, and tells the registry a moment later."""
    node.ok(V.TENANT_CREATE, "acme")
    tenants = node.services.store.tenants
    destroy = node.services.jobs.new(V.TENANT_DESTROY, "acme", NODE, actor="ann", reason=Reason.MANUAL)

    destroying = Thread(target=node.services.runner.run, args=(destroy,))

    def overtaken(*words: object) -> Any:
        found = tenants()
        monkeypatch.setattr(node.services.store, "tenants", tenants)
        destroying.start()
        destroying.join(OVERTAKING_S)
        return found

    monkeypatch.setattr(node.services.store, "tenants", overtaken)
    node.services.heartbeat.beat()
    destroying.join()
    assert exists(node) == (False, False)
