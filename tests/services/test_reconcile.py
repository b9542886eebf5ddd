"""A desired state and a node in memory: by jobs and by the command line."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from mvm.cli import desired
from mvm.domain.document import MAX_BYTES
from mvm.domain.ids import JobId
from mvm.domain.instance import Instance
from mvm.domain.job import Job, JobState, JobVerb, Reason
from mvm.domain.lifecycle import Status
from mvm.drivers.fake import Lie
from mvm.errors import Failed
from mvm.services.jobs import Asked
from tests.services.conftest import NODE, Node
from tests.support.command_line import ADDRESS, DEAD, CommandLine

WEB: dict[str, Any] = {
    "pool_id": "web", "flake_ref": "builtin:", "profile": "minimal", "desired_counts": {"running": 2},
}  # fmt: skip
DOCUMENT: dict[str, Any] = {
    "schema_version": 1,
    "node_id": "n1",
    "tenants": [{"tenant_id": "acme", "network": {"tenant_net_id": 7, "ipv4_subnet": "10.240.7.0/24"}, "pools": [WEB]}],
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "fleet.json"
    path.write_text(json.dumps(DOCUMENT))
    return path


@pytest.fixture(autouse=True)
def beat(monkeypatch: pytest.MonkeyPatch, node: Node) -> None:
    """While a command waits for a rollout's health checks, Beat asks for one."""

    class Waiting:
        def wait(self, _: float) -> None:
            node.clock.advance(2)
            with capture_logs():  # they are no output of the command
                node.sweep(JobVerb.SWEEP_HEALTH)

    monkeypatch.setattr(desired, "Event", Waiting)


def write(file: Path, pool: dict[str, Any] | None = None, **changes: Any) -> None:
    document = {**deepcopy(DOCUMENT), **changes}
    if pool:
        document["tenants"][0]["pools"] = [{**WEB, **pool}]
    file.write_text(json.dumps(document))


def statuses(node: Node) -> dict[str, int]:
    found = [instance.status.value for instance in node.services.store.instances()]
    return {status: found.count(status) for status in sorted(set(found))}


def test_from_nothing_to_what_was_asked_and_then_nothing(mvm: CommandLine, node: Node, file: Path) -> None:
    words = ("agent", "reconcile", "--desired", str(file))
    plan = mvm.json(*words, "--plan")
    assert [action["do"] for action in plan["actions"]] == ["create_tenant", "create_pool", "build", "create"]
    assert node.services.store.tenants() == []
    assert mvm.json(*words) == {"rounds": 4, "jobs": 5, "waiting": 0, "remarks": []}
    assert statuses(node) == {"running": 2}
    assert mvm.ok(*words) == "nothing to do\n"
    assert mvm.ok(*words, "--plan").startswith("nothing to do\nfingerprint ")
    assert node.sweep(JobVerb.SWEEP_RECONCILE)["changed"] is False
    (tenant,) = node.services.store.tenants()
    assert (tenant.network.net_id, str(tenant.network.subnet)) == (7, "10.240.7.0/24")


def test_the_plan_is_a_diff(mvm: CommandLine, file: Path) -> None:
    told = mvm.ok("agent", "reconcile", "--desired", str(file), "--plan").splitlines()
    assert told[:4] == [
        "+ tenant acme  net id 7, 10.240.7.0/24",
        "+ pool acme/web  builtin: minimal, 1 vCPU, 256 MiB",
        "+ image of acme/web  builtin: minimal",
        "+ 2 instances of acme/web  -> running",
    ]


def test_the_sweep_goes_on_with_what_was_accepted(mvm: CommandLine, node: Node, file: Path) -> None:
    job = mvm.ok("agent", "reconcile", "--desired", str(file), "--no-wait").strip()
    assert job.startswith("j-")
    node.drain()
    for _ in range(5):
        node.sweep(JobVerb.SWEEP_RECONCILE)
    assert statuses(node) == {"running": 2}


def test_what_another_pass_asked_for_is_waited_for(mvm: CommandLine, node: Node, file: Path) -> None:
    """A sweep between a document's acceptance and its first pass asks for all of it; that is not yet done."""
    _, job = node.services.view.desired_apply(file.read_bytes(), prune=False, expect=None, actor="another")
    node.services.runner.run(job)
    assert "nothing more to do" in mvm.ok("agent", "reconcile", "--desired", str(file))
    assert statuses(node) == {"running": 2}


def test_what_another_pass_asked_for_in_vain_is_told(mvm: CommandLine, node: Node, file: Path) -> None:
    node.host.fail("network.ensure_bridge", Failed("network.failed", "no bridge"))
    _, job = node.services.view.desired_apply(file.read_bytes(), prune=False, expect=None, actor="another")
    node.services.runner.run(job)
    result = mvm("agent", "reconcile", "--desired", str(file))
    assert (result.exit_code, "error[network.failed]" in result.stderr) == (1, True)


def test_counts_images_and_rules_change(mvm: CommandLine, node: Node, file: Path) -> None:
    words = ("agent", "reconcile", "--desired", str(file))
    mvm.ok(*words)
    write(file, {"desired_counts": {"running": 1, "warm": 1, "sleeping": 1}})
    mvm.ok(*words)
    assert statuses(node) == {"running": 1, "sleeping": 1, "warm": 1}
    before = {i.ref: i.revision for i in node.services.store.instances()}
    write(file, {"profile": "python", "snapshot_compression": "lz4"})
    told = mvm.ok(*words, "--plan")
    assert "compression: zstd -> lz4" in told
    mvm.ok(*words)
    up = [i for i in node.services.store.instances() if i.status is Status.RUNNING]
    assert len(up) == 2
    assert all(before.get(instance.ref) != instance.revision for instance in up)


@pytest.mark.parametrize("lie", list(Lie))
def test_however_their_agents_lie_a_rollout_replaces_guests(mvm: CommandLine, node: Node, file: Path, lie: Lie) -> None:
    words = ("agent", "reconcile", "--desired", str(file))
    mvm.ok(*words)
    before = {i.ref: i.revision for i in node.services.store.instances()}
    for ref in before:
        node.host.lie(ref, lie)
    write(file, {"profile": "python"})
    mvm.ok(*words)
    assert statuses(node) == {"running": 2}
    assert all(before.get(i.ref) != i.revision for i in node.services.store.instances())


def test_a_check_right_after_a_start_proves_nothing(mvm: CommandLine, node: Node, file: Path) -> None:
    words = ("agent", "reconcile", "--desired", str(file))
    mvm.ok(*words)
    before = {i.revision for i in node.services.store.instances()}
    write(file, {"profile": "python"})
    mvm.ok(*words, "--no-wait")

    def sweep() -> int:
        for _ in range(8):
            node.sweep(JobVerb.SWEEP_RECONCILE)
            node.sweep(JobVerb.SWEEP_HEALTH)
        return sum(i.revision not in before for i in node.services.store.instances())

    assert sweep() == 1
    node.clock.advance(5)
    assert sweep() == 2


def test_a_revision_whose_guests_fall_silent_stops_after_the_first(
    mvm: CommandLine, node: Node, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They answer as they start, so only a check that comes later tells."""
    words = ("agent", "reconcile", "--desired", str(file))
    write(file, {"desired_counts": {"running": 4}})
    mvm.ok(*words)
    good = {i.revision for i in node.services.store.instances()}

    def new() -> list[Instance]:
        return [i for i in node.services.store.instances() if i.revision not in good]

    write(file, {"desired_counts": {"running": 4}, "profile": "python"})
    with monkeypatch.context() as patch:
        patch.setattr(desired, "_HALTED_S", 0.0)
        told = mvm.fails(1, "desired.rollout_halted", *words)
    assert "3 keep another revision until" in told.stderr
    assert len(new()) == 1
    for _ in range(20):
        for instance in new():
            if instance.status is Status.RUNNING:
                node.host.machines[instance.ref].hung = True
        node.sweep(JobVerb.SWEEP_HEALTH)
        node.sweep(JobVerb.SWEEP_RECONCILE)
        node.sweep(JobVerb.SWEEP_HEALTH)  # right after its start: it answers
        node.sweep(JobVerb.SWEEP_RECONCILE)
    assert len(new()) == 1, "it is started anew again and again, and the others stay as they are"
    write(file, {"desired_counts": {"running": 4}})
    mvm.ok(*words)
    assert statuses(node) == {"running": 4}
    assert not new(), "the document's way back is open"


def test_what_is_not_listed_stays_until_it_is_pruned(mvm: CommandLine, node: Node, file: Path) -> None:
    node.pool("other/one")
    node.create(2, "other/one")
    words = ("agent", "reconcile", "--desired", str(file))
    mvm.ok(*words)
    assert {str(tenant.id) for tenant in node.services.store.tenants()} == {"acme", "other"}
    mvm.ok(*words, "--prune")
    assert {str(tenant.id) for tenant in node.services.store.tenants()} == {"acme"}


def test_a_sweep_does_not_fill_up_again_what_is_pruned(mvm: CommandLine, node: Node, file: Path) -> None:
    """The document says nothing of pruning, `--prune` did; and its caller is gone after the first round."""
    words = ("agent", "reconcile", "--desired", str(file))
    mvm.ok(*words)
    write(file, {"pool_id": "api"})
    mvm.ok(*words, "--prune", "--no-wait")
    node.drain()
    for _ in range(5):
        node.sweep(JobVerb.SWEEP_RECONCILE)
    assert {i.ref.pool for i in node.services.store.instances()} == {"api"}
    write(file)
    mvm.ok(*words)
    assert statuses(node) == {"running": 4}, "it is asked for again"


def test_a_saved_plan_that_was_accepted_is_not_refused_because_a_sweep_began_it(
    mvm: CommandLine, node: Node, file: Path
) -> None:
    words = ("agent", "reconcile", "--desired", str(file))
    mvm.ok(*words)
    write(file, {"desired_counts": {"running": 3}})
    plan = mvm.json(*words, "--plan")["fingerprint"]
    job = mvm.ok(*words, "--expect", plan, "--no-wait").strip()
    sweep = node.services.jobs.new(
        JobVerb.SWEEP_RECONCILE, "n1", NODE, reason=Reason.SWEEP, actor="beat"
    )  # before the job: Beat's has a worker of its own
    node.services.runner.run(sweep)
    node.drain()
    assert node.services.jobs.job(JobId(job)).state is JobState.SUCCEEDED
    node.sweep(JobVerb.SWEEP_RECONCILE)
    assert statuses(node) == {"running": 3}


def test_a_saved_plan_is_refused_once_the_world_has_moved(mvm: CommandLine, node: Node, file: Path) -> None:
    words = ("agent", "reconcile", "--desired", str(file))
    mvm.ok(*words)
    write(file, {"desired_counts": {"running": 3}})
    plan = mvm.json(*words, "--plan")["fingerprint"]
    node.ok(JobVerb.INSTANCE_STOP, str(node.services.store.instances()[0].ref))
    mvm.fails(4, "desired.plan_outdated", *words, "--expect", plan)
    assert statuses(node) == {"running": 1, "stopped": 1}
    node.clock.advance(600)
    mvm.ok(*words, "--expect", mvm.json(*words, "--plan")["fingerprint"])
    assert statuses(node) == {"running": 3}


def test_what_a_person_does_holds_for_a_while(mvm: CommandLine, node: Node, file: Path) -> None:
    words = ("agent", "reconcile", "--desired", str(file))
    mvm.ok(*words)
    ref = str(node.services.store.instances()[0].ref)
    node.ok(JobVerb.INSTANCE_STOP, ref)
    assert mvm.ok(*words) == "nothing to do\n"
    assert node.sweep(JobVerb.SWEEP_RECONCILE)["changed"] is False
    node.clock.advance(600)
    mvm.ok(*words)
    assert statuses(node) == {"running": 2}


def test_what_was_decided_before_a_person_spoke_is_not_done(node: Node) -> None:
    """A busy node: the sweep's jobs wait behind those of people."""
    node.pool()
    ref, other = node.create(2)
    for each in (ref, other):
        node.ok(JobVerb.INSTANCE_START, each)
    node.clock.advance(1)
    decided = [
        node.services.jobs.new(JobVerb.INSTANCE_STOP, each, NODE, reason=Reason.RECONCILE, actor="reconcile")
        for each in (ref, other)
    ]
    node.clock.advance(1)
    node.ok(JobVerb.INSTANCE_STOP, ref)
    node.ok(JobVerb.INSTANCE_START, ref)
    outdated, done = map(node.services.runner.run, decided)
    assert (outdated.state, outdated.error and outdated.error["code"]) == (JobState.CANCELLED, "policy.outdated")
    assert done.state is JobState.SUCCEEDED, "of this one a person had spoken before"
    assert statuses(node) == {"running": 1, "stopped": 1}


def decided(node: Node, verb: JobVerb, ref: str) -> Job:
    """A job of a pass that waits behind others."""
    group = node.services.jobs.submit_group([Asked(verb, ref)], NODE, reason=Reason.RECONCILE, actor="reconcile")
    (job,) = node.services.jobs.children(group.job_id)
    return job


@pytest.mark.parametrize("way", ["pinned", "critical"])
def test_what_was_decided_before_its_pool_was_protected_is_not_done(node: Node, way: str) -> None:
    node.pool()
    (ref,) = node.create()
    node.ok(JobVerb.INSTANCE_START, ref)
    node.clock.advance(3600)  # nothing holds it any more
    stop = decided(node, JobVerb.INSTANCE_STOP, ref)
    node.ok(JobVerb.POOL_UPDATE, "acme/web", **{way: True})
    node.drain()
    after = node.services.jobs.job(stop.job_id)
    assert (after.state, (after.error or {})["code"]) == (JobState.CANCELLED, "policy.outdated")
    assert statuses(node) == {"running": 1}
    node.ok(JobVerb.POOL_SCALE, "acme/web", running=0)
    assert statuses(node) == {"stopped": 1}, "a person's word goes before"


def test_what_was_to_be_pruned_stays_when_it_is_asked_for_again(mvm: CommandLine, node: Node, file: Path) -> None:
    """The jobs of the pruning pass still wait for a worker, and data disks are not got back."""
    words = ("agent", "reconcile", "--desired", str(file))
    mvm.ok(*words)
    refs = {i.ref for i in node.services.store.instances()}
    write(file, {"pool_id": "api", "desired_counts": {"running": 0}})
    _, job = node.services.view.desired_apply(file.read_bytes(), prune=True, expect=None, actor="another")
    node.services.runner.run(job)
    write(file)
    node.services.view.desired_apply(file.read_bytes(), prune=False, expect=None, actor="another")
    node.drain()
    mvm.ok(*words)
    assert {i.ref for i in node.services.store.instances()} == refs
    assert statuses(node) == {"running": 2}


def test_scaling_says_that_the_desired_state_has_other_counts(mvm: CommandLine, node: Node, file: Path) -> None:
    mvm.ok("agent", "reconcile", "--desired", str(file))
    told = mvm("pool", "scale", "acme/web", "--running", "3")
    assert "the node's desired state asks for running=2, and the next pass goes back to that" in told.stderr
    assert "desired state" not in mvm("pool", "scale", "acme/web", "--running", "2").stderr


def test_a_plan_tells_what_a_new_image_will_do(mvm: CommandLine, node: Node, file: Path) -> None:
    words = ("agent", "reconcile", "--desired", str(file))
    mvm.ok(*words)
    write(file, {"profile": "python"})
    told = mvm.ok(*words, "--plan")
    assert "! acme/web: 2 restart with the new image, at most 1 down at once; what they have in memory is lost" in told


def test_a_crash_ends_what_a_person_has_said(mvm: CommandLine, node: Node, file: Path) -> None:
    words = ("agent", "reconcile", "--desired", str(file))
    mvm.ok(*words)
    ref = node.services.store.instances()[0].ref
    node.ok(JobVerb.INSTANCE_STOP, str(ref))
    node.ok(JobVerb.INSTANCE_START, str(ref))
    node.host.vmm.kill(ref, None)
    node.sweep(JobVerb.SWEEP_STALE_PIDS)
    mvm.ok(*words)
    assert statuses(node) == {"running": 2}


def test_a_failed_job_ends_the_waiting_and_is_told(mvm: CommandLine, node: Node, file: Path) -> None:
    node.host.fail("network.ensure_bridge", Failed("network.failed", "no bridge"))
    result = mvm("agent", "reconcile", "--desired", str(file))
    assert (result.exit_code, "error[network.failed]" in result.stderr) == (1, True)
    assert node.services.store.pools() == []
    mvm.ok("agent", "reconcile", "--desired", str(file))
    assert statuses(node) == {"running": 2}, "its net id was not used up"


def test_what_cannot_be_done_is_blocked_and_fails_no_job(mvm: CommandLine, node: Node, file: Path) -> None:
    node.ok(JobVerb.TENANT_CREATE, "gone", net_id=7)
    node.ok(JobVerb.TENANT_DESTROY, "gone")  # net ids are never given twice
    words = ("agent", "reconcile", "--desired", str(file))
    assert "! acme: not created: net id 7 was given before" in mvm.ok(*words, "--plan")
    told = mvm.fails(4, "desired.blocked", *words)
    assert "acme: not created: net id 7 was given before" in told.stderr
    for _ in range(3):
        swept = node.sweep(JobVerb.SWEEP_RECONCILE)
        assert (swept["changed"], {each["cause"] for each in swept["obstacles"]}) == (False, {"network"})
    assert node.services.jobs.list(state=JobState.FAILED) == []


@pytest.mark.parametrize(
    ("exit_code", "code", "changes"),
    [
        (2, "desired.other_node", {"node_id": "n2"}),
        (2, "desired.invalid", {"schema_version": 3}),
        (4, "desired.older_generation", {"generation": 4}),
        (4, "desired.conflict", {"tenants": [{**DOCUMENT["tenants"][0],
                                              "network": {"tenant_net_id": 8, "ipv4_subnet": "10.240.8.0/24"}}]}),
        (5, "desired.over_quota", {"tenants": [{**DOCUMENT["tenants"][0], "quotas": {"max_running": 1}}]}),
    ],
)  # fmt: skip
def test_a_bad_document_changes_nothing(
    mvm: CommandLine, node: Node, file: Path, exit_code: int, code: str, changes: dict[str, Any]
) -> None:
    write(file, generation=5)
    mvm.ok("agent", "reconcile", "--desired", str(file))
    stored = node.services.store.desired()
    write(file, **{"generation": 6, **changes})
    for words in (("--plan",), ()):
        mvm.fails(exit_code, code, "agent", "reconcile", "--desired", str(file), *words)
    assert node.services.store.desired() == stored
    assert statuses(node) == {"running": 2}


def test_a_document_without_a_generation_keeps_the_one_that_is_known(mvm: CommandLine, node: Node, file: Path) -> None:
    write(file, generation=5)
    mvm.ok("agent", "reconcile", "--desired", str(file))
    write(file, {"desired_counts": {"running": 1}})
    mvm.ok("agent", "reconcile", "--desired", str(file))
    assert (node.services.store.desired() or {})["generation"] == 5


def test_files_that_hold_no_document(mvm: CommandLine, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    words = ("agent", "reconcile", "--desired", str(path))
    mvm.fails(3, "desired.not_found", *words)
    path.write_bytes(b"\xff")
    mvm.fails(2, "desired.malformed", *words)
    with path.open("wb") as file:
        file.truncate(100_000_000)
    assert str(MAX_BYTES) in mvm.fails(2, "desired.too_large", *words).stderr


PROMISES = (
    "x: !!bool 'zz'",
    "x: !!int zz",
    "x: !!int ''",
    "x: !!float zz",
    "x: !!binary 'a'",
    "x: !!set {a, b}",
    "x: !!omap [a: 1]",
    "x: !!pairs [a: 1]",
    "x: !!map 5",
    "x: !!seq 5",
    "x: !!str [a]",
    "x: !!int [1]",
    "x: !what 5",
    "x: " + "9" * 5000,
    "x: !!int 1:" + "9" * 5000,
    "!!bool z: 1",
    "x: !!null [1]",
)
"""YAML whose tags promise what the text does not hold, and what JSON has not."""


def test_yaml_is_a_document_too(mvm: CommandLine, node: Node, tmp_path: Path) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text("""
schema_version: 1
node_id: n1
tenants:
- tenant_id: acme
  network: {tenant_net_id: 7, ipv4_subnet: 10.240.7.0/24}
  pools:
  - {pool_id: web, flake_ref: 'builtin:', profile: minimal, desired_counts: {running: 1}}
""")
    mvm.ok("agent", "reconcile", "--desired", str(path))
    assert statuses(node) == {"running": 1}
    for text, what in (
        ("a: &x [1]\nb: *x", "an alias in line 2"), ("a: [", "not YAML"), ("a: !!python/name:os.system ''", "not YAML"),
        ("[" * 5000, "not YAML"), *((text, "not YAML") for text in PROMISES),
    ):  # fmt: skip
        path.write_text(text)
        assert what in mvm.fails(2, "desired.malformed", "agent", "reconcile", "--desired", str(path)).stderr
    path.write_text("schema_version: 1\nnode_id: n1\nnode_id: n2\ntenants: 2020-01-01\n")
    told = mvm.fails(2, "desired.invalid", "agent", "reconcile", "--desired", str(path)).stderr
    assert "$.node_id: is given more than once" in told
    assert '$.tenants: "2020-01-01" is not an array' in told


def test_a_coordinator_pushes_to_nodes(mvm: CommandLine, node: Node, file: Path) -> None:
    (row,) = mvm.json("coordinator", "push", "--desired", str(file), "--node", ADDRESS)
    assert (row["node"], row["actions"]) == (ADDRESS, 4)
    node.drain()
    assert [str(tenant.id) for tenant in node.services.store.tenants()] == ["acme"]
    mvm.fails(6, "agent.unreachable", "coordinator", "push", "--desired", str(file), "--node", DEAD)


def test_a_tenant_that_another_node_has_too_is_adopted(mvm: CommandLine, node: Node, file: Path) -> None:
    node.ok(JobVerb.TENANT_CREATE, "acme", net_id=7, subnet="10.240.7.0/24")
    tenant = node.registry.tenant(node.services.store.tenants()[0].id)
    node.services.store.delete_tenant(node.services.store.tenants()[0].id)
    assert tenant is not None
    mvm.ok("agent", "reconcile", "--desired", str(file))
    assert node.services.store.tenants()[0].created_at == tenant.created_at
