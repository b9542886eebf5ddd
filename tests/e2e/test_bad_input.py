"""Wrong words and missing parts, through the real command: each has its exit code, its error code and a hint."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from mvm.settings import load_settings
from tests.support.local import free_port
from tests.support.stack import Stack
from tests.support.waiting import until

pytestmark = [pytest.mark.root, pytest.mark.redis]

_AT_ONCE_S = 10.0  # less than any patience of ours; most of it is a process that starts on a busy machine
_NOBODY = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "--")
_POOL = "--flake builtin: --profile minimal"
_REF = "acme/web/i-00000000"


@pytest.fixture(scope="module")
def refs(fake_stack: Stack) -> dict[str, str]:
    """One instance that runs, one that is stopped and one that was never started; the quota lets one run."""
    fake_stack.mvm("tenant", "create", "acme", "--net-id", "7", "--max-running", "1", "--max-pools", "1",
           "--max-instances-per-pool", "3", "--max-disk", "1")  # fmt: skip
    fake_stack.mvm("pool", "create", "acme/web", *_POOL.split(), "--mem", "128")
    fake_stack.mvm("pool", "build", "acme/web")
    running, stopped, ready = fake_stack.mvm("instance", "create", "acme/web", "--count", "3").split()
    fake_stack.mvm("instance", "start", stopped)
    fake_stack.mvm("instance", "stop", stopped)
    fake_stack.mvm("instance", "start", running)
    return {"running": running, "stopped": stopped, "ready": ready}


@pytest.mark.parametrize(
    ("exit_code", "code", "line"),
    [
        # malformed
        (2, "tenant.invalid_id", "tenant create Acme"),
        (2, "tenant.invalid_id", "tenant create ../etc"),
        (2, "pool.invalid_ref", "pool info acme"),
        (2, "instance.invalid_ref", "instance info acme/web"),
        (2, "instance.invalid_id", "instance start acme/web/7f2c91ab"),
        (2, "job.invalid_id", "job show 17"),
        (2, "usage", "nonsense"),
        (2, "confirm.required", "tenant destroy acme"),
        # networks
        (2, "tenant.invalid_subnet", "tenant create other --subnet 192.168.7.0/24"),
        (2, "tenant.invalid_subnet", "tenant create other --subnet 10.240.7.9/24"),
        (2, "tenant.invalid_subnet", "tenant create other --subnet 10.240.0.0/12"),
        (2, "tenant.invalid_net_id", "tenant create other --net-id 4096"),
        (4, "tenant.subnet_overlap", "tenant create other --subnet 10.240.7.128/25"),
        (4, "tenant.net_id_used", "tenant create other --net-id 7"),
        # images and shapes
        (2, "pool.unknown_profile", "pool create acme/new --flake builtin: --profile huge"),
        (2, "pool.unsupported_flake", "pool create acme/new --flake /srv/flake --profile minimal"),
        (2, "pool.invalid_resources", f"pool create acme/new {_POOL} --cpus 0"),
        (2, "pool.invalid_resources", f"pool create acme/new {_POOL} --cpus 65"),
        (2, "pool.invalid_resources", f"pool create acme/new {_POOL} --mem 1"),
        (2, "pool.invalid_resources", f"pool create acme/new {_POOL} --mem 99999999"),
        (2, "pool.invalid_resources", f"pool create acme/new {_POOL} --data-disk -1"),
        (2, "tenant.invalid_quota", "tenant update acme --max-mem -1"),
        (2, "instance.invalid_count", "instance create acme/web --count 0"),
        # unknown
        (3, "tenant.not_found", "tenant info ghost"),
        (3, "tenant.not_found", f"pool create ghost/web {_POOL}"),
        (3, "pool.not_found", "pool build acme/ghost"),
        (3, "pool.not_found", "instance create acme/ghost"),
        (3, "instance.not_found", f"instance start {_REF}"),
        (3, "instance.not_found", f"instance exec {_REF} -- true"),
        (3, "job.not_found", "job show j-0193583f6c2a-9f3b7c21d4"),
        # not in this state
        (4, "tenant.exists", "tenant create acme"),
        (4, "pool.exists", f"pool create acme/web {_POOL}"),
        (4, "instance.invalid_transition", "instance start {running}"),
        (4, "instance.invalid_transition", "instance stop {stopped}"),
        (4, "instance.invalid_transition", "instance stop {ready}"),
        (4, "tenant.not_empty", "tenant destroy acme -y"),
        # quota
        (5, "quota.exceeded", "instance start {ready}"),
        (5, "quota.exceeded", "instance create acme/web"),
        (5, "quota.exceeded", f"pool create acme/new {_POOL}"),
    ],
)
def test_what_cannot_be_done_is_told(
    fake_stack: Stack, refs: dict[str, str], exit_code: int, code: str, line: str
) -> None:
    fake_stack.fails(exit_code, code, *line.format(**refs).split())


def test_nothing_of_it_was_changed(fake_stack: Stack, refs: dict[str, str]) -> None:
    assert [row["tenant_id"] for row in fake_stack.json("tenant", "list")] == ["acme"]
    assert [row["ref"] for row in fake_stack.json("pool", "list")] == ["acme/web"]
    statuses = {row["ref"]: row["status"] for row in fake_stack.json("instance", "list")}
    assert statuses == {refs["running"]: "running", refs["stopped"]: "stopped", refs["ready"]: "ready"}


def test_a_second_up_is_refused_and_harms_nothing(fake_stack: Stack) -> None:
    fake_stack.fails(4, "stack.already_up", "up", "--detach")
    fake_stack.mvm("status")


def test_a_state_directory_of_another_version_is_refused(fake_stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "VERSION").write_text("7\n")
    other = {"MVM_STATE_DIR": str(tmp_path)}
    fake_stack.fails(4, "state.version", "up", "--detach", **other)
    fake_stack.fails(4, "state.version", "down", **other)


def test_without_root_the_hint_is_root(fake_stack: Stack) -> None:
    if fake_stack.run("--help", prefix=_NOBODY).returncode:
        pytest.skip("this checkout cannot be read by nobody")
    for words in (["up", "--detach"], ["tenant", "list"], ["status"], ["down"]):
        done = fake_stack.run(*words, prefix=_NOBODY)
        assert done.returncode == 7, (words, done.stderr)
        assert done.stderr.startswith("error[permission."), done.stderr
        assert "\nhint: " in done.stderr
    fake_stack.mvm("status")


def test_without_redis_commands_end_at_once_and_the_node_is_still_seen(fake_stack: Stack, refs: dict[str, str]) -> None:
    with fake_stack.without("redis"):
        _unreachable_at_once(fake_stack)
        assert len(fake_stack.json("instance", "list")) == len(refs), "the agent needs no Redis"
        assert fake_stack.run("status").returncode == 6
    fake_stack.mvm("tenant", "update", "acme", "--max-vcpus", "9")  # its worker has found it again


def test_a_redis_that_hangs_is_not_waited_for(fake_stack: Stack, refs: dict[str, str]) -> None:
    with fake_stack.frozen("redis"):
        _unreachable_at_once(fake_stack)


def _unreachable_at_once(fake_stack: Stack) -> None:
    for line in ("tenant create late", "job list", "instance start acme --all"):
        began = time.monotonic()
        error = fake_stack.fails(6, "registry.unreachable", *line.split())
        assert time.monotonic() - began < _AT_ONCE_S, line
        assert "mvm status" in error["hint"]


def test_without_an_agent_its_node_is_named(fake_stack: Stack) -> None:
    address = f"127.0.0.1:{fake_stack.env['MVM_AGENT_PORT']}"
    with fake_stack.without("agent"):
        for line in ("instance list", "node list", f"coordinator status --node {address}"):
            error = fake_stack.fails(6, "agent.unreachable", *line.split())
            assert address in error["message"]


def test_without_a_worker_a_job_waits_and_says_so(fake_stack: Stack, refs: dict[str, str]) -> None:
    with fake_stack.without("worker"):
        job = fake_stack.mvm("tenant", "update", "acme", "--max-vcpus", "8", "--no-wait").strip()
        fake_stack.fails(6, "job.wait_timeout", "job", "wait", job, "--timeout", "0.5")
        fake_stack.mvm("instance", "stop", refs["running"])  # what is urgent has a worker of its own
        until(lambda: "note" in fake_stack.json("job", "show", job), 60, "the worker is missed")
        shown = fake_stack.json("job", "show", job)
        assert shown["state"] == "queued"
        assert shown["note"].startswith("no worker has taken it: node n1's worker was last seen ")
    assert fake_stack.json("job", "wait", job)["state"] == "succeeded", "it was only waiting"


def test_a_taken_port_is_told_and_nothing_is_left(fake_stack: Stack, tmp_path: Path) -> None:
    other = {"MVM_STATE_DIR": str(tmp_path / "s"), "MVM_METRICS_PORT": str(free_port())}
    error = fake_stack.fails(4, "stack.port_taken", "up", "--detach", **other)
    assert str(error["fields"]["port"]) == fake_stack.env["MVM_FLOWER_PORT"]
    assert not load_settings(state_dir=tmp_path / "s").layout.connection.exists()
