"""Redis's file after a power cut, below a whole stack on the fake host."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.stack import Stack, running_stack

pytestmark = [pytest.mark.redis, pytest.mark.timeout(600)]


def grown(stack: Stack) -> Path:
    return next((stack.layout.redis / "appendonlydir").glob("*.incr.aof"))


def known(stack: Stack) -> tuple[object, ...]:
    """What people see of the registry and of the node."""
    jobs = {job["job_id"]: job["state"] for job in stack.json("job", "list") if "bulk" not in job["verb"]}
    tenants = [row["tenant_id"] for row in stack.json("tenant", "list")]
    pools = {row["ref"]: row["desired"] for row in stack.json("pool", "list")}
    return jobs, tenants, pools, stack.statuses()


def test_zeros_and_a_hole_in_redis_file_lose_nothing_that_is_the_nodes() -> None:
    seldom = {f"MVM_{sweep}_SWEEP_S": "60" for sweep in ("STALE_PID", "RECONCILE", "ORPHAN")}
    with running_stack("fake", MVM_NETNS="host", **seldom) as stack:
        stack.mvm("tenant", "create", "gone")
        stack.mvm("tenant", "create", "acme")
        stack.mvm("pool", "create", "acme/web", "--flake", "builtin:", "--profile", "minimal")
        stack.mvm("pool", "build", "acme/web")
        half = grown(stack).stat().st_size
        stack.mvm("instance", "create", "acme/web", "--count", "3")
        stack.mvm("instance", "start", "acme/web", "--all")
        stack.mvm("pool", "scale", "acme/web", "--running", "3")
        stack.mvm("tenant", "destroy", "gone", "-y")
        before = known(stack)

        stack.mvm("down")
        with grown(stack).open("ab") as file:
            file.write(bytes(4096))
        said = stack.run("up", "--detach")
        assert said.returncode == 0, said.stderr
        assert "its last 4096 bytes are dropped" in said.stderr
        assert known(stack) == before

        stack.mvm("down")
        with grown(stack).open("r+b") as file:
            file.seek(min(half, os.fstat(file.fileno()).st_size // 2))
            file.write(bytes(512))
        said = stack.run("up", "--detach")
        assert said.returncode == 0, said.stderr
        assert "put back from the node's store" in said.stderr
        assert known(stack) == before, "also a tenant that was destroyed in the part that is lost stays so"
        assert stack.json("tenant", "create", "new")["net_id"] == 2, "a net id is never given twice"
        assert len(list(stack.layout.root.glob("redis.damaged-*"))) == 2
