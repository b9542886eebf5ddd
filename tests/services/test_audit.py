"""The audit trail of what is done to a tenant, over a node in memory."""

from __future__ import annotations

import json
from typing import Any

import pytest
from structlog.testing import capture_logs

from mvm.domain.audit import START, read_line, verify
from mvm.domain.ids import InstanceRef, TenantId
from mvm.domain.job import JobVerb, Reason
from mvm.errors import Failed
from tests.services.conftest import Node
from tests.support.command_line import CommandLine
from tests.support.waiting import until

ACME = TenantId("acme")


def trail(mvm: CommandLine, tenant: str = "acme") -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = mvm.json("audit", "tail", tenant, "-n", "1000")
    return entries


def test_every_job_of_a_tenant_is_told_with_who_why_what_and_how_it_ended(mvm: CommandLine, node: Node) -> None:
    node.pool()
    (ref,) = node.create()
    started = node.do(JobVerb.INSTANCE_START, ref)
    node.fails("instance.invalid_transition", JobVerb.INSTANCE_WAKE, ref)
    node.do(JobVerb.INSTANCE_SLEEP, ref, why="idle for 900 s")
    node.services.urgent.wake(InstanceRef.parse(ref), "ann")
    node.ok(JobVerb.INSTANCE_DESTROY, ref)
    node.ok(JobVerb.POOL_DESTROY, "acme/web")
    node.ok(JobVerb.TENANT_DESTROY, "acme")
    told = trail(mvm)
    assert [(e["verb"], e["from"], e["to"], e["result"]) for e in told] == [
        ("tenant.create", None, None, "succeeded"),
        ("pool.create", None, None, "succeeded"),
        ("pool.build", None, None, "succeeded"),
        ("instance.create", None, "ready", "succeeded"),
        ("instance.start", "ready", "running", "succeeded"),
        ("instance.wake", "running", "running", "failed"),
        ("instance.sleep", "running", "sleeping", "succeeded"),
        ("instance.wake", "sleeping", "running", "succeeded"),
        ("instance.destroy", "running", "destroyed", "succeeded"),
        ("pool.destroy", None, None, "succeeded"),
        ("tenant.destroy", None, None, "succeeded"),
    ]
    assert [e["seq"] for e in told] == list(range(1, 12))
    start, refused, slept, woken = told[4:8]
    assert start["job_id"] == started.job_id
    assert (start["actor"], start["reason"], start["subject"], start["node_id"]) == ("test", "manual", ref, "n1")
    assert len(start["revision"]) == 64
    assert len({e["config"] for e in told[1:9]}) == 1
    assert len(start["config"]) == 64
    assert refused["code"] == "instance.invalid_transition"
    assert slept["why"] == "idle for 900 s"
    assert (woken["actor"], woken["reason"]) == ("ann", "urgent")
    assert slept["generation"] < woken["generation"]
    assert mvm.json("audit", "verify", "acme")["whole"] is True, "a destroyed tenant's trail is kept"
    node.ok(JobVerb.TENANT_CREATE, "acme")
    assert trail(mvm)[-1]["seq"] == 12, "and goes on when the name is used again"


def test_what_a_sweep_finds_gone_is_told(mvm: CommandLine, node: Node) -> None:
    node.pool()
    (ref,) = node.create()
    node.ok(JobVerb.INSTANCE_START, ref)
    before = len(trail(mvm))
    node.sweep(JobVerb.SWEEP_STALE_PIDS)
    node.sweep(JobVerb.SWEEP_ORPHANS)
    assert len(trail(mvm)) == before, "a sweep that changed nothing is not told"
    node.host.kill_process(InstanceRef.parse(ref))
    node.sweep(JobVerb.SWEEP_STALE_PIDS)
    (gone,) = trail(mvm)[before:]
    assert (gone["kind"], gone["reason"], gone["actor"], gone["subject"]) == ("sweep", "sweep", "beat", ref)
    assert (gone["from"], gone["to"], gone["code"]) == ("running", "stopped", "vmm.gone")


def test_what_reconcile_makes_is_told(mvm: CommandLine, node: Node) -> None:
    node.pool()
    node.ok(JobVerb.POOL_SCALE, "acme/web", running=2)
    (scaled,) = [e for e in trail(mvm) if e["verb"] == "pool.scale" and e["kind"] == "job"]
    assert (scaled["from"], scaled["to"]) == ("running=0", "running=2")
    made = [e for e in trail(mvm) if e["to"] == "created"]
    assert len(made) == 2
    assert [e["reason"] for e in trail(mvm) if e["verb"] == "instance.start"] == [Reason.RECONCILE] * 2


def test_a_create_tells_of_each_instance_or_of_its_failure(mvm: CommandLine, node: Node) -> None:
    node.pool()
    refs = node.create(3)
    assert [e["subject"] for e in trail(mvm)[-3:]] == refs
    node.host.fail("storage.prepare", Failed("disk.full", "secret words of the host"))
    node.fails("disk.full", JobVerb.INSTANCE_CREATE, "acme/web", count=2)
    last = trail(mvm)[-1]
    assert (last["subject"], last["result"], last["code"]) == ("acme/web", "failed", "disk.full")
    assert "secret" not in json.dumps(trail(mvm)), "errors' texts are not told"


def test_a_job_delivered_twice_is_told_once(mvm: CommandLine, node: Node) -> None:
    node.pool()
    job = node.do(JobVerb.POOL_BUILD, "acme/web")
    node.services.runner.run(job)
    assert [e["job_id"] for e in trail(mvm)].count(job.job_id) == 1


def test_bulk_jobs_and_cancelled_ones_are_told(mvm: CommandLine, node: Node) -> None:
    node.pool()
    refs = node.create(2)
    bulk = mvm.json("instance", "start", *refs)
    assert [(e["subject"], e["parent"]) for e in trail(mvm)[-2:]] == [(ref, bulk["job_id"]) for ref in refs]
    job = node.submit(JobVerb.INSTANCE_STOP, refs[0])
    node.services.jobs.cancel(job.job_id)
    node.drain()
    last = trail(mvm)[-1]
    assert (last["job_id"], last["result"], last["code"]) == (job.job_id, "cancelled", "job.cancelled")


def test_a_changed_configuration_has_another_hash(mvm: CommandLine, node: Node) -> None:
    node.pool()
    node.ok(JobVerb.TENANT_UPDATE, "acme", quota={"max_pools": 3})
    node.ok(JobVerb.POOL_UPDATE, "acme/web", pinned=True)
    hashes = {(e["verb"], e["config"]) for e in trail(mvm)}
    assert len({config for _, config in hashes}) == 4, "the quota's and the pool's, before and after"


def test_an_urgent_wake_does_not_wait_for_the_trail(node: Node) -> None:
    node.pool()
    (ref,) = node.create()
    node.ok(JobVerb.INSTANCE_START, ref)
    node.ok(JobVerb.INSTANCE_SLEEP, ref)
    node.services.view.audit_verify(ACME)
    before = len(node.host.trails[ACME])
    with node.host.trail_locks[ACME]:
        assert node.services.view.wake(InstanceRef.parse(ref), "ann")["status"] == "running"
        assert len(node.host.trails[ACME]) == before
        assert len(node.services.store.pending_audit(ACME)) == 1
    until(lambda: len(node.host.trails[ACME]) > before, 60, "the entry is appended")


def test_a_damaged_line_is_shown_as_such(mvm: CommandLine, node: Node) -> None:
    node.ok(JobVerb.TENANT_CREATE, "acme")
    trail(mvm)
    node.host.trails[ACME][:] = node.host.trails[ACME].replace(b"succeeded", b"f\xff\x1b[2J")
    (shown,) = trail(mvm)
    assert (shown["seq"], shown["kind"]) == (None, "damaged")
    assert "\\xff" in shown["text"]
    assert "\x1b" not in mvm.ok("audit", "tail", "acme"), "it does not drive the terminal"
    node.ok(JobVerb.TENANT_UPDATE, "acme", quota={"max_pools": 3})
    assert mvm("audit", "verify", "acme").exit_code == 1


def test_entries_wait_while_the_disk_is_full(mvm: CommandLine, node: Node) -> None:
    node.ok(JobVerb.TENANT_CREATE, "acme")
    trail(mvm)
    with capture_logs() as logs:
        node.host.fail("audit.append", Failed("disk.full", "the audit trail: no space"), times=1000)
        node.ok(JobVerb.TENANT_UPDATE, "acme", quota={"max_pools": 3})
        assert [e["verb"] for e in trail(mvm)] == ["tenant.create", "tenant.update"], "what waits is shown"
        verdict = mvm.json("audit", "verify", "acme")
        assert (verdict["whole"], verdict["pending"], verdict["entries"]) == (True, 1, 2)
        node.host._faults.clear()
    assert {"disk.full"} == {entry["code"] for entry in logs if entry["event"] == "audit entries wait"}
    assert mvm.json("audit", "verify", "acme")["pending"] == 0


def test_half_a_line_is_cut_off_and_that_is_told(mvm: CommandLine, node: Node) -> None:
    node.ok(JobVerb.TENANT_CREATE, "acme")
    trail(mvm)
    node.host.trails[ACME] += b'{"seq":2,"pr'
    node.ok(JobVerb.TENANT_UPDATE, "acme", quota={"max_pools": 3})
    one, two, three = trail(mvm)
    assert (one["verb"], two["verb"], three["verb"]) == ("tenant.create", "tenant.update", "audit.recover")
    assert (three["kind"], three["cut"]["bytes"], three["cut"]["text"]) == ("recovered", 12, '{"seq":2,"pr')
    assert mvm.json("audit", "verify", "acme")["whole"]


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_lines_missing_at_the_end_are_found(mvm: CommandLine, node: Node, kept: int) -> None:
    node.pool()
    trail(mvm)
    lines = bytes(node.host.trails[ACME]).split(b"\n")[:-1]
    node.host.trails[ACME][:] = b"".join(line + b"\n" for line in lines[:kept])
    done = mvm("audit", "verify", "acme", "-o", "json")
    assert done.exit_code == 1
    assert "error[audit.broken]" in done.stderr
    (finding,) = json.loads(done.stdout)["findings"]
    assert (finding["problem"], finding["seq"]) == ("removed", kept + 1)
    assert f"{kept + 1}" in mvm("audit", "verify", "acme").stdout


def test_a_new_store_goes_on_with_the_trail_it_finds(node: Node, mvm: CommandLine) -> None:
    node.ok(JobVerb.TENANT_CREATE, "acme")
    trail(mvm)
    store: Any = node.services.store
    store._write("DELETE FROM audit_heads")
    done = mvm("audit", "verify", "acme", "-o", "json")
    assert [f["problem"] for f in json.loads(done.stdout)["findings"]] == ["unknown end"]
    node.ok(JobVerb.TENANT_UPDATE, "acme", quota={"max_pools": 3})
    assert mvm.json("audit", "verify", "acme")["entries"] == 2


def test_wrong_names_and_numbers(mvm: CommandLine, node: Node) -> None:
    for words in (("tail", "nobody"), ("verify", "nobody"), ("tail", "nobody", "-f")):
        mvm.fails(3, "tenant.not_found", "audit", *words)
    mvm.fails(2, "tenant.invalid_id", "audit", "verify", "No Body")
    mvm.fails(2, "audit.invalid_count", "audit", "tail", "acme", "-n", "0")
    node.ok(JobVerb.TENANT_CREATE, "acme")
    assert mvm.ok("audit", "tail", "acme").splitlines()[0].split()[:3] == ["ENTRY", "AT", "ACTOR"]
    assert mvm.ok("audit", "verify", "acme").split() == ["acme", "whole", "1", "entries"]


def test_following_shows_what_comes(node: Node) -> None:
    node.ok(JobVerb.TENANT_CREATE, "acme")
    following = node.services.view.audit_tail(ACME, 5, follow=True)
    assert [e["verb"] for e in next(following)] == ["tenant.create"]
    assert next(following) == []
    for pools in (1, 2):
        node.ok(JobVerb.TENANT_UPDATE, "acme", quota={"max_pools": pools})
    assert [e["seq"] for e in next(following)] == [2, 3]
    assert next(following) == []
    following.close()


def test_the_trail_is_appended_without_anybody_asking(node: Node) -> None:
    node.ok(JobVerb.TENANT_CREATE, "acme")
    until(lambda: bool(node.host.trails.get(ACME)), 60, "the entry is appended")
    (line,) = bytes(node.host.trails[ACME]).split(b"\n")[:-1]
    entry = read_line(line)
    assert entry is not None
    assert entry["prev"] == START.hash
    assert verify([("x", line + b"\n")], node.services.store.audit_head(ACME)).findings == ()


def last(mvm: CommandLine, verb: str) -> tuple[str | None, str | None]:
    """From what to what the newest entry of `verb` tells."""
    entry = next(each for each in reversed(trail(mvm)) if each["verb"] == verb)
    return entry["from"], entry["to"]


def test_an_update_tells_what_was_changed_from_what_to_what(mvm: CommandLine, node: Node) -> None:
    node.pool()
    policy = {"warm_after_s": 60}
    node.ok(JobVerb.POOL_UPDATE, "acme/web", pinned=True, sleep_policy=policy, user_data="long " * 50)
    before, after = last(mvm, "pool.update")
    assert before is not None
    assert after is not None
    assert {"pinned=false", "sleep_policy.warm_after_s=300"} <= set(before.split())
    assert {"pinned=true", "sleep_policy.warm_after_s=60"} <= set(after.split())
    assert "user_data=sha256:" in after
    assert "long" not in after
    assert "critical" not in after
    node.ok(JobVerb.POOL_UPDATE, "acme/web", pinned=True)
    assert last(mvm, "pool.update") == ("pinned=true", "pinned=true"), "what was asked for is told though it was so"
    node.ok(JobVerb.TENANT_UPDATE, "acme", quota={"max_running": 7})
    assert last(mvm, "tenant.update") == ("max_running=64", "max_running=7")
    node.ok(JobVerb.POOL_SCALE, "acme/web", running=0)
    assert last(mvm, "pool.scale") == ("running=0", "running=0")


def test_of_user_data_there_is_only_a_hash_however_short_it_is(mvm: CommandLine, node: Node) -> None:
    node.pool()
    node.ok(JobVerb.POOL_UPDATE, "acme/web", user_data="password=hunter2")
    set_first = last(mvm, "pool.update")
    node.ok(JobVerb.POOL_UPDATE, "acme/web", user_data="password=hunter3")
    changed = last(mvm, "pool.update")
    node.ok(JobVerb.POOL_UPDATE, "acme/web", user_data="")
    removed = last(mvm, "pool.update")
    assert "hunter" not in str(trail(mvm))
    assert set_first[0] == removed[1] == "user_data=", "that there is none is told"
    assert set_first[1] == changed[0] != changed[1] == removed[0]


def test_secrets_are_told_by_their_names(mvm: CommandLine, node: Node) -> None:
    node.pool()
    node.services.view.set_secrets(ACME, b"KEY=hush\nOTHER=x\n", "ann")
    node.services.view.set_secrets(ACME, b"KEY=hush\n", "ann")
    assert last(mvm, "tenant.set_secrets") == ("epoch=1 names=KEY,OTHER", "epoch=2 names=KEY")


def test_a_document_that_is_accepted_is_told_to_the_tenants_it_concerns(mvm: CommandLine, node: Node) -> None:
    node.pool()
    network = {"tenant_net_id": 0, "ipv4_subnet": "10.240.0.0/24"}
    document: dict[str, Any] = {
        "schema_version": 1, "node_id": "n1", "tenants": [{"tenant_id": "acme", "network": network}],
    }  # fmt: skip
    for more in ({}, {}, {"quotas": {"max_running": 3}}):
        document["tenants"][0] |= more
        node.services.view.desired_apply(json.dumps(document).encode(), prune=False, expect=None, actor="ann")
    told = [each for each in trail(mvm) if each["verb"] == "desired.apply"]
    assert [each["actor"] for each in told] == ["ann", "ann"], "the same document again changes nothing"
    assert told[0]["from"] == "-"
    assert told[0]["to"] == told[1]["from"] != told[1]["to"]


def test_a_look_along_a_trail_that_nobody_waits_for_ends(node: Node) -> None:
    node.pool()

    def gone() -> None:
        raise EOFError

    with pytest.raises(EOFError):
        node.services.view.audit_verify(ACME, check=gone)
    assert node.services.view.audit_verify(ACME)["whole"], "the trail is not held"


def test_what_changed_nothing_says_so(node: Node, mvm: CommandLine) -> None:
    node.pool()
    (ref,) = node.create()
    node.ok(JobVerb.INSTANCE_START, ref)
    node.fails("instance.invalid_transition", JobVerb.INSTANCE_START, ref)
    node.ok(JobVerb.POOL_UPDATE, "acme/web", pinned=True)
    node.ok(JobVerb.POOL_UPDATE, "acme/web", pinned=True)
    told = mvm.ok("audit", "tail", "acme")
    started, failed, pinned, again = told.splitlines()[-4:]
    assert "  ready > running  " in started
    assert "  stays running  " in failed
    assert "  pinned=false > pinned=true  " in pinned
    assert "  stays pinned=true  " in again
    assert "- > -" not in told
