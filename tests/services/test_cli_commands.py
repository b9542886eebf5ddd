"""Every command over a node in memory: what it prints, as JSON and for people."""

from __future__ import annotations

import json

import pytest
import yaml

from mvm.domain.job import JobVerb
from tests.services.conftest import Node
from tests.support.command_line import CommandLine

TENANT = {"tenant_id", "net_id", "subnet", "gateway", "bridge", "quota", "usage", "created_at"}
POOL = {"ref", "flake_ref", "profile", "resources", "desired", "counts", "revision", "node_id"}
INSTANCE = {
    "ref", "status", "node_id", "revision", "guest_ip", "mac", "tap", "pid", "job", "last_error", "created_at",
    "last_started_at", "last_stopped_at",
}  # fmt: skip
JOB = {
    "job_id", "verb", "subject", "node_id", "actor", "reason", "state", "step", "progress", "error", "result",
    "parent", "submitted_at", "started_at", "finished_at",
}  # fmt: skip
NODE_FIELDS = {"node_id", "address", "status", "driver", "vcpus", "mem_mib", "instances", "last_seen_at"}


def test_a_fleet_from_first_tenant_to_last(mvm: CommandLine) -> None:
    made = mvm.json("tenant", "create", "acme", "--net-id", "7", "--subnet", "10.240.9.0/24", "--max-running", "3")
    assert set(made) >= TENANT
    assert (made["net_id"], made["subnet"], made["quota"]["max_running"]) == (7, "10.240.9.0/24", 3)
    assert mvm.json("tenant", "update", "acme", "--max-mem", "999")["quota"]["max_mem_mib"] == 999
    assert mvm.json("tenant", "info", "acme")["quota"]["max_running"] == 3, "what is not given stays"
    words = ("acme/web", "--flake", "builtin:", "--profile", "minimal", "--mem", "128")
    pool = mvm.json("pool", "create", *words)
    assert set(pool) >= POOL
    assert pool["resources"] == {"vcpus": 1, "mem_mib": 128, "data_disk_mib": 0}
    revision = mvm.json("pool", "build", "acme/web")["revision"]
    assert mvm.json("pool", "info", "acme/web")["revision"] == revision
    created = mvm.json("instance", "create", "acme/web", "--count", "2")
    assert [set(each) >= INSTANCE for each in created] == [True, True]
    ref = created[0]["ref"]
    job = mvm.json("instance", "start", ref)
    assert set(job) >= JOB
    assert (job["verb"], job["state"], job["subject"]) == ("instance.start", "succeeded", ref)
    assert mvm.json("instance", "info", ref)["status"] == "running"
    listed = mvm.json("instance", "list", "--pool", "acme/web")
    assert sorted(each["status"] for each in listed) == ["ready", "running"]
    assert mvm.json("instance", "list", "--tenant", "acme") == listed
    assert [each["ref"] for each in mvm.json("instance", "list", "--status", "running")] == [ref]
    assert mvm.json("instance", "stop", ref, "--force")["state"] == "succeeded"
    bulk = mvm.json("instance", "destroy", "acme", "--all", "--yes")
    assert (bulk["verb"], bulk["state"], len(bulk["children"])) == ("bulk", "succeeded", 2)
    assert mvm.json("pool", "destroy", "acme/web", "-y")["state"] == "succeeded"
    assert mvm.json("tenant", "destroy", "acme", "-y")["verb"] == "tenant.destroy"
    assert mvm.json("tenant", "list") == []


def test_scaling_sends_the_counts_given_and_shows_those_wanted(mvm: CommandLine, node: Node) -> None:
    node.pool()
    scaled = mvm.json("pool", "scale", "acme/web", "--running", "2")
    assert scaled["desired"]["running"] == 2
    node.drain()
    assert mvm.json("pool", "info", "acme/web")["counts"] == {"running": 2}
    mvm.ok("pool", "scale", "acme/web", "--running", "1", "--warm", "1")
    assert mvm.json("pool", "info", "acme/web")["desired"] == {"running": 1, "warm": 1, "sleeping": None}
    assert mvm.ok("pool", "scale", "acme/web", "--running", "0").startswith("acme/web  running=0")


def test_tables_name_what_there_is(mvm: CommandLine, node: Node) -> None:
    node.pool()
    (ref,) = node.create()
    node.ok(JobVerb.INSTANCE_START, ref)
    assert mvm.ok("tenant", "list").splitlines()[0].split()[:3] == ["TENANT", "NET", "SUBNET"]
    assert "running=1" in mvm.ok("pool", "list", "acme")
    line = mvm.ok("instance", "list").splitlines()[1].split()
    assert line[:4] == [ref, "running", "-", "10.240.0.3"]
    assert "quota.max_running" in mvm.ok("tenant", "info", "acme")
    assert mvm.ok("node", "list").splitlines()[1].split()[0] == "n1"
    empty = mvm("instance", "list", "--status", "stopped")
    assert (empty.stdout, empty.stderr, empty.exit_code) == ("", "no instances\n", 0)


@pytest.mark.parametrize(
    "line",
    ["-o json tenant list", "tenant -ojson list", "tenant list --output=json", "-o yaml tenant list -o json"],
)
def test_the_format_may_stand_anywhere(mvm: CommandLine, node: Node, line: str) -> None:
    node.ok(JobVerb.TENANT_CREATE, "acme")
    assert [each["tenant_id"] for each in json.loads(mvm.ok(*line.split()))] == ["acme"]


def test_yaml_holds_what_json_holds(mvm: CommandLine, node: Node) -> None:
    node.pool()
    for words in (("pool", "list"), ("job", "list"), ("node", "info"), ("instance", "list")):
        assert yaml.safe_load(mvm.ok(*words, "-o", "yaml")) == mvm.json(*words)


def test_several_refs_are_one_bulk_job_and_each_counts_once(mvm: CommandLine, node: Node) -> None:
    node.pool()
    one, two = node.create(2)
    bulk = mvm.json("instance", "start", one, two, one, "--parallel", "1")
    assert [child["subject"] for child in bulk["children"]] == [one, two]
    assert bulk["params"]["parallel"] == 1
    assert mvm.ok("instance", "stop", one, two).split() == [one, two]


def test_all_takes_those_that_can(mvm: CommandLine, node: Node) -> None:
    node.pool()
    running, ready = node.create(2)
    node.ok(JobVerb.INSTANCE_START, running)
    assert [c["subject"] for c in mvm.json("instance", "start", "acme/web", "--all")["children"]] == [ready]
    again = mvm("instance", "start", "acme/web", "--all")
    assert (again.exit_code, again.stdout, again.stderr) == (0, "", "nothing to start\n")
    assert mvm.json("instance", "start", "acme", "--all") == []
    assert len(mvm.json("instance", "stop", "acme", "--all")["children"]) == 2


def test_exec_passes_words_streams_and_exit_code(mvm: CommandLine, node: Node) -> None:
    node.pool()
    (ref,) = node.create()
    mvm.fails(4, "instance.not_running", "instance", "exec", ref, "--", "true")
    node.ok(JobVerb.INSTANCE_START, ref)
    done = mvm("instance", "exec", ref, "--", "echo", "a  b", "-o", "c")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "a  b -o c\n", "")
    missing = mvm("instance", "exec", ref, "--", "nonsense")
    assert (missing.exit_code, missing.stdout, missing.stderr) == (127, "", "sh: nonsense: not found\n")
    parsed = mvm("instance", "exec", ref, "-o", "json", "--", "false")
    assert parsed.exit_code == 1
    told = {"exit_code": 1, "stdout": "", "stderr": "", "truncated": False, "timed_out": False}
    assert json.loads(parsed.stdout) == told
    assert mvm("instance", "exec", ref).exit_code == 2


def test_logs_show_the_console_without_its_control_characters(mvm: CommandLine, node: Node) -> None:
    node.pool(cold=True)
    (ref,) = node.create()
    node.ok(JobVerb.INSTANCE_START, ref)
    next(iter(node.host.consoles.values())).append("\x1b[2Jgone?\r")
    assert "guest agent ready\n?[2Jgone?\n" in mvm.ok("instance", "logs", ref)
    assert mvm.json("instance", "logs", ref)["text"].startswith("Linux version")


def test_jobs_are_listed_shown_and_waited_for(mvm: CommandLine, node: Node) -> None:
    node.pool()
    (ref,) = node.create()
    node.sweep(JobVerb.SWEEP_ORPHANS)
    job_id = mvm.ok("instance", "start", ref, "--no-wait").strip()
    assert mvm.json("job", "show", job_id)["state"] == "queued"
    assert mvm.json("job", "list", "--state", "queued")[0]["job_id"] == job_id
    assert mvm.ok("job", "wait", job_id).split() == [job_id, "succeeded"]
    assert set(mvm.json("job", "wait", job_id)) >= JOB
    both = mvm.json("job", "list", "--subject", "acme/web")[:2]
    assert len(mvm.json("job", "wait", *(each["job_id"] for each in both))) == 2
    assert not [each for each in mvm.json("job", "list") if each["verb"].startswith("sweep")]
    assert [each for each in mvm.json("job", "list", "--all") if each["verb"].startswith("sweep")]
    assert [each["verb"] for each in mvm.json("job", "list", "--subject", "n1")] == ["sweep.orphans"]
    assert len(mvm.json("job", "list", "--limit", "1")) == 1
    assert mvm.ok("job", "list").splitlines()[0].split() == ["ID", "VERB", "SUBJECT", "STATE", "STEP", "AGE", "REASON"]


def test_no_wait_prints_the_job_as_json(mvm: CommandLine) -> None:
    job = mvm.json("tenant", "create", "acme", "--no-wait")
    assert set(job) >= JOB
    assert (job["state"], job["subject"], job["reason"]) == ("queued", "acme", "manual")


def test_a_queued_job_can_be_cancelled_and_says_so_to_those_who_wait(mvm: CommandLine, node: Node) -> None:
    job_id = mvm.ok("tenant", "create", "acme", "--no-wait").strip()
    assert mvm.json("job", "cancel", job_id)["state"] == "cancelled"
    mvm.fails(1, "job.cancelled", "job", "wait", job_id)
    mvm.fails(4, "job.finished", "job", "cancel", job_id)


def test_a_bulk_job_is_shown_with_its_children(mvm: CommandLine, node: Node) -> None:
    node.pool()
    refs = node.create(2)
    job_id = mvm.ok("instance", "start", *refs, "--no-wait").strip()
    assert "no worker has taken it: node n1 has never been seen" in mvm.json("job", "show", job_id)["note"]
    mvm.ok("job", "wait", job_id)
    shown = mvm.json("job", "show", job_id)
    assert [child["subject"] for child in shown["children"]] == refs
    assert "note" not in shown
    text = mvm.ok("job", "show", job_id)
    assert all(ref in text for ref in refs)
    assert "instance.start (bulk)" in mvm.ok("job", "list")


def test_nodes_are_shown_by_their_agents(mvm: CommandLine) -> None:
    assert set(mvm.json("node", "list")[0]) >= NODE_FIELDS
    assert set(mvm.json("node", "info")) >= NODE_FIELDS
    assert mvm.json("node", "info", "n1")["driver"] == "fake"
    assert mvm.json("node", "stats")["tenants"] == 0
    mvm.fails(3, "node.not_found", "node", "info", "n2")


def test_the_coordinator_asks_by_address(mvm: CommandLine, node: Node) -> None:
    node.pool()
    (ref,) = node.create()
    address = "127.0.0.1:4433"
    assert [row["node_id"] for row in mvm.json("coordinator", "status", "--node", address, address)] == ["n1"]
    words = ("coordinator", "list-instances", "--node", address, "--tenant", "acme")
    assert [row["ref"] for row in mvm.json(*words)] == [ref]
