"""Real guests outlive their stack, whole: whatever runs is where it was, and reachable, while it goes down and up.

``MVM_TEST_OUTLIVE_ROUNDS`` is how often it does, 3 for the whole proof.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.reach import reaching
from tests.support.stack import Stack, running_stack
from tests.support.waiting import until

pytestmark = [pytest.mark.root, pytest.mark.redis, pytest.mark.guest, pytest.mark.timeout(1800)]

PATIENCE_S = 120.0
ROUNDS = int(os.environ.get("MVM_TEST_OUTLIVE_ROUNDS", "1"))


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack(MVM_IDLENESS_SWEEP_S="86400") as stack:  # on a slow machine they are idle for long
        shape = ("--flake", "builtin:", "--profile", "minimal", "--mem", "128", "--data-disk", "16")
        stack.mvm("tenant", "create", "acme")
        stack.mvm("pool", "create", "acme/web", *shape)
        stack.mvm("pool", "build", "acme/web")
        yield stack


@pytest.fixture(scope="module")
def four(stack: Stack) -> list[str]:
    """Two that run, one that is warm, one that sleeps; each remembers who it is in its memory."""
    refs: list[str] = stack.mvm("instance", "create", "acme/web", "--count", "4").split()
    stack.mvm("instance", "start", *refs, timeout_s=300)
    for ref in refs:
        execute(stack, ref, f"echo {ref} >/dev/shm/me")
    stack.mvm("instance", "warm", refs[2])
    stack.mvm("instance", "sleep", refs[3])
    for ref in refs[:2]:
        stack.mvm("instance", "ssh", ref, "true")  # which writes down its host key
    return refs


def execute(stack: Stack, ref: str, command: str) -> str:
    return stack.mvm("instance", "exec", ref, "--", "sh", "-c", command).strip()


def rows(stack: Stack) -> dict[str, dict[str, Any]]:
    return {row["ref"]: row for row in stack.json("instance", "list")}


def places(stack: Stack) -> dict[str, tuple[str, int | None]]:
    return {ref: (row["status"], row["pid"]) for ref, row in rows(stack).items()}


def swept(stack: Stack) -> None:
    """Sweeps that began after now have looked at everything."""
    known = {job["job_id"] for job in stack.json("job", "list", "--subject", "n1")}

    def done() -> bool:
        ended = [
            job["verb"] for job in stack.json("job", "list", "--subject", "n1")
            if job["job_id"] not in known and job["state"] == "succeeded"
        ]  # fmt: skip
        return {"sweep.stale_pids", "sweep.orphans", "sweep.reconcile"} <= set(ended)

    until(done, PATIENCE_S, "every sweep has been")


def test_guests_go_on_while_the_stack_goes_down_and_up(stack: Stack, four: list[str]) -> None:
    """Twice a round, the first time by another path; while it is down, what would lose them is refused."""
    before = places(stack)
    assert [before[ref][0] for ref in four] == ["running", "running", "warm", "sleeping"]
    namespace = json.loads(stack.layout.connection.read_text())["netns"]
    running = [(ref, rows(stack)[ref]["guest_ip"]) for ref in four[:2]]
    with reaching(namespace, stack.layout, running) as reached:
        until(lambda: reached.logins > 1 and reached.pings > 1, PATIENCE_S, "it can be reached at all")
        for _ in range(ROUNDS):
            told = stack.run("down")
            assert told.returncode == 0, told.stderr
            assert f"instances run on; network namespace {namespace} stays" in told.stderr
            count = reached.logins
            what_would_lose_them_is_refused(stack)
            until(lambda at=count: reached.failures or reached.logins > at + 2, PATIENCE_S, "logins without a stack")
            by_another_path_it_is_the_same_directory(stack, four[0], before)
            stack.mvm("up", "--detach")
            swept(stack)
            assert places(stack) == before
    assert not reached.failures, reached.failures
    assert stack.json("net", "verify", "--active")["clean"]
    for ref, (_, pid) in before.items():
        assert not pid or Path(f"/proc/{pid}").exists(), ref
    assert len(stack.vmms()) == len([pid for _, pid in before.values() if pid])
    stack.mvm("instance", "wake", four[2])
    stack.mvm("instance", "wake", four[3])
    for ref in four:
        assert execute(stack, ref, "cat /dev/shm/me") == ref
    assert {ref: pid for ref, (_, pid) in places(stack).items() if ref != four[3]} == {
        ref: pid for ref, (_, pid) in before.items() if ref != four[3]
    }


def what_would_lose_them_is_refused(stack: Stack) -> None:
    """With the stack down: ending them behind its back, and a stack that would not reach them."""
    error = stack.fails(6, "stack.down", "down", "--instances")
    assert "process" in error["message"]
    for flags, code in (
        (("--netns", "mvm-e2e-other"), "stack.other_netns"),
        (("--netns", "host"), "stack.other_netns"),
        (("--driver", "fake"), "stack.other_driver"),
    ):
        stack.fails(4, code, "up", "--detach", *flags)
    stack.fails(4, "node.renamed", "up", "--detach", MVM_NODE_ID="renamed")


def by_another_path_it_is_the_same_directory(stack: Stack, ref: str, before: dict[str, tuple[str, int | None]]) -> None:
    """The stack, which is down, is up by a link to its directory, and down again."""
    root = stack.layout.root
    link = root.with_name("link")
    link.symlink_to(root)
    other = Stack(stack.layout, stack.env | {"MVM_STATE_DIR": f"{link.parent}//{link.name}/../{link.name}"})
    other.mvm("up", "--detach")
    swept(other)
    assert places(other) == before
    assert other.run("instance", "start", ref).returncode != 0, "it runs"
    assert execute(other, ref, "cat /dev/shm/me") == ref
    other.mvm("down")
    link.unlink()


@pytest.mark.parametrize("how", ["stop", "scale"])
def test_what_a_warm_one_has_written_is_on_its_disk(stack: Stack, four: list[str], how: str) -> None:
    ref = four[0]
    execute(stack, ref, f"echo {how} >/data/{how}")
    stack.mvm("instance", "warm", ref)
    if how == "stop":
        stack.mvm("instance", "stop", ref)
    else:
        others = [each for each in four if each != ref]
        stack.mvm("instance", "stop", *others, "--force")
        stack.mvm("pool", "scale", "acme/web", "--running", "0")
        until(lambda: stack.statuses()[ref] == "stopped", PATIENCE_S, "it is scaled down")
    stack.mvm("instance", "start", ref)
    assert execute(stack, ref, f"cat /data/{how}") == how


def test_down_with_instances_leaves_no_warm_one(stack: Stack, four: list[str]) -> None:
    ref = four[0]
    stack.mvm("instance", "warm", ref)
    assert stack.vmms()
    stack.mvm("down", "--instances")
    assert not stack.vmms()
    stack.mvm("up", "--detach")
    assert stack.statuses()[ref] == "stopped"
