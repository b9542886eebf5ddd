"""The main job on real microVMs: jobs, kills, sweeps, networks, disks."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from mvm.domain.addressing import tap_uid
from mvm.domain.ids import JobId, NodeId
from mvm.domain.job import Job, JobState, JobVerb
from mvm.wiring import open_client
from tests.support.stack import Stack, running_stack
from tests.support.waiting import until

pytestmark = [pytest.mark.root, pytest.mark.guest, pytest.mark.redis, pytest.mark.timeout(420)]


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack(builds=True) as running:
        running.mvm("tenant", "create", "acme")
        running.mvm("pool", "create", "acme/web", "--flake", "builtin:", "--profile", "minimal", "--mem", "128")
        running.mvm("pool", "build", "acme/web")
        running.mvm(
            "pool", "create", "acme/cold", "--flake", "builtin:", "--profile", "minimal", "--mem", "128", "--cold"
        )
        running.mvm("pool", "build", "acme/cold")
        yield running


def create(stack: Stack, count: int, pool: str = "acme/web") -> list[str]:
    return [i["ref"] for i in stack.json("instance", "create", pool, "--count", str(count))]


def execute(stack: Stack, ref: str, command: str) -> str:
    return stack.mvm("instance", "exec", ref, "--", "sh", "-c", command).strip()


@pytest.fixture
def emptied(stack: Stack) -> Iterator[Stack]:
    """The stack, whose instances are destroyed after the test."""
    yield stack
    stack.mvm("instance", "destroy", "acme", "--all", "-y")
    assert not stack.vmms()
    assert not stack.taps()


def test_guests_of_a_tenant_reach_each_other_and_their_gateway(emptied: Stack) -> None:
    stack, refs = emptied, create(emptied, 2)
    stack.mvm("instance", "start", *refs)
    infos = [stack.json("instance", "info", ref) for ref in refs]
    for ref, info in zip(refs, infos, strict=True):
        assert execute(stack, ref, "hostname") == ref.split("/")[2]
        assert info["mac"] in execute(stack, ref, "cat /sys/class/net/eth0/address")
        for target in ("10.240.0.1", *(i["guest_ip"] for i in infos)):
            execute(stack, ref, f"ping -c 1 -W 3 {target}")
    assert stack.mvm("instance", "ssh", refs[0], "--", "hostname").strip() == refs[0].split("/")[2]
    failed = stack.run("instance", "exec", refs[0], "--", "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (failed.returncode, failed.stdout, failed.stderr) == (7, "out\n", "err\n")
    stack.run("instance", "exec", refs[0], "--", "sh", "-c", "echo to-the-console >/dev/console")
    assert "to-the-console" in stack.mvm("instance", "logs", refs[0])


def test_a_data_disk_survives_stop_and_start_and_the_root_does_not(emptied: Stack) -> None:
    stack = emptied
    stack.mvm("pool", "create", "acme/data", "--flake", "builtin:", "--profile", "minimal", "--mem", "128",
              "--data-disk", "16")  # fmt: skip
    stack.mvm("pool", "build", "acme/data")
    (ref,) = create(stack, 1, "acme/data")
    stack.mvm("instance", "start", ref)
    execute(stack, ref, "echo kept >/data/file; echo lost >/etc/lost; sync")
    stack.mvm("instance", "stop", ref)
    stack.mvm("instance", "start", ref)
    assert execute(stack, ref, "cat /data/file; ls /etc/lost 2>/dev/null || echo gone") == "kept\ngone"
    stack.mvm("instance", "destroy", "-y", ref)
    stack.mvm("pool", "destroy", "-y", "acme/data")


def test_builds_leave_no_memory_with_the_worker(stack: Stack) -> None:
    """The pools above were built by the main worker; the urgent one is the same program, and has built nothing."""

    def resident_mib(part: str) -> int:
        lines = Path(f"/proc/{stack.pid(part)}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) >> 10

    assert resident_mib("worker") < resident_mib("urgent") + 60


def test_ten_starts_survive_two_kills_of_their_worker(emptied: Stack) -> None:
    """Ten instances by one command are ten jobs; the worker dies twice meanwhile; all end running, once each."""
    stack, refs = emptied, create(emptied, 10, "acme/cold")
    parent = stack.mvm("instance", "start", *refs, "--no-wait").strip()
    for running in (1, 4):
        until(lambda n=running: list(stack.statuses().values()).count("running") >= n, 120, f"{running} running")
        os.kill(stack.pid("worker"), signal.SIGKILL)
    stack.mvm("job", "wait", parent, timeout_s=240)
    assert len(stack.json("job", "show", parent)["children"]) == 10
    assert set(stack.statuses().values()) == {"running"}
    assert len(stack.vmms()) == 10
    assert len(stack.taps()) == 10


def test_a_killed_vmm_is_noticed_and_its_pool_brought_back(emptied: Stack) -> None:
    stack = emptied
    stack.mvm("pool", "create", "acme/kept", "--flake", "builtin:", "--profile", "minimal", "--mem", "128")
    stack.mvm("pool", "build", "acme/kept")
    stack.mvm("pool", "scale", "acme/kept", "--running", "2")
    until(lambda: list(stack.statuses().values()) == ["running"] * 2, 60, "two running")
    victim = stack.json("instance", "list")[0]
    os.kill(victim["pid"], signal.SIGKILL)

    def info() -> dict[str, object]:
        found: dict[str, object] = stack.json("instance", "info", victim["ref"])
        return found

    until(lambda: info()["last_stopped_at"] is not None, 60, "the sweep sees it")
    swept = [j for j in stack.json("job", "list", "--subject", "n1") if (j["result"] or {}).get("stopped")]
    assert swept[0]["verb"] == "sweep.stale_pids"
    assert f"VMM process {victim['pid']} was found gone" in swept[0]["result"]["stopped"][0]["reason"]
    until(lambda: info()["status"] == "running", 60, "reconcile brings it back")
    assert info()["pid"] != victim["pid"]
    assert len(stack.vmms()) == 2
    stack.mvm("pool", "scale", "acme/kept", "--running", "0")
    until(lambda: set(stack.statuses().values()) == {"stopped"}, 60, "scaled down")
    stack.mvm("instance", "destroy", "acme/kept", "--all", "-y")
    stack.mvm("pool", "destroy", "acme/kept", "-y")


def test_running_vms_survive_worker_and_agent(emptied: Stack) -> None:
    stack, (ref,) = emptied, create(emptied, 1)
    stack.mvm("instance", "start", ref)
    pid = stack.json("instance", "info", ref)["pid"]
    for part in ("worker", "agent"):
        old = stack.pid(part)
        os.kill(old, signal.SIGKILL)
        until(lambda part=part, old=old: _answers(stack, part, old), 60, f"{part} is back")
    assert execute(stack, ref, "echo alive") == "alive"
    assert stack.json("instance", "info", ref)["pid"] == pid


def _answers(stack: Stack, part: str, old_pid: int) -> bool:
    done = stack.run("status", "-o", "json")
    return any(p["name"] == part and p["answers"] and p["pid"] != old_pid for p in json.loads(done.stdout))


def test_messages_delivered_twice_do_their_job_once(emptied: Stack) -> None:
    """Four starts, then four stops, each message sent twice at once."""
    stack, refs = emptied, create(emptied, 4)
    client = open_client(json.loads(stack.layout.connection.read_text()), stack.layout)

    def twice(verb: JobVerb) -> dict[JobId, Job]:
        jobs = [client.jobs.new(verb, ref, NodeId("n1"), actor="test") for ref in refs]
        client.registry.record(jobs)
        client.jobs._queue.send([*jobs, *jobs])
        return {job.job_id: job for job in client.jobs.follow([job.job_id for job in jobs], deadline_s=120)}

    assert {job.state for job in twice(JobVerb.INSTANCE_START).values()} == {JobState.SUCCEEDED}
    assert set(stack.statuses().values()) == {"running"}
    assert len(stack.vmms()) == 4
    assert {job.state for job in twice(JobVerb.INSTANCE_STOP).values()} == {JobState.SUCCEEDED}
    assert set(stack.statuses().values()) == {"stopped"}
    assert not stack.vmms()


def test_what_nobody_owns_is_removed_after_its_grace(emptied: Stack) -> None:
    stack, (ref,) = emptied, create(emptied, 1)
    stack.mvm("instance", "start", ref)
    owner = str(tap_uid("tn7i9"))
    stack.in_namespace("ip", "tuntap", "add", "tn7i9", "mode", "tap", "user", owner)
    stack.in_namespace("ip", "tuntap", "add", "tn7i10", "mode", "tap")  # only its name is like ours
    stray = stack.layout.instances / "acme" / "web" / "i-0000dead"
    stray.mkdir(mode=0o700)
    (stray / "console.log").write_text("left over")
    until(lambda: "tn7i9" not in stack.taps() and not stray.exists(), 60, "orphans are gone")
    assert "tn7i10" in stack.taps()
    stack.in_namespace("ip", "link", "del", "tn7i10")
    assert execute(stack, ref, "echo alive") == "alive"
