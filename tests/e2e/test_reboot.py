"""A reboot: every process ended, namespaces and TAPs gone, state kept. ``mvm up`` again, and it is as was asked."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mvm.drivers import netns
from mvm.drivers.cgroups import LinuxCgroups
from mvm.drivers.identity import mark
from mvm.drivers.shell import LocalShell
from mvm.drivers.supervisor import Supervisor
from tests.support.stack import Stack, running_stack
from tests.support.waiting import until

pytestmark = [pytest.mark.root, pytest.mark.guest, pytest.mark.redis, pytest.mark.timeout(840)]

POOL: dict[str, Any] = {
    "pool_id": "web", "flake_ref": "builtin:", "profile": "minimal", "instance_resources": {"mem_mib": 128},
}  # fmt: skip


def ask(stack: Stack, path: Path, **counts: int) -> None:
    """Give the node its desired state and wait until it is so."""
    network = {"tenant_net_id": 7, "ipv4_subnet": "10.240.7.0/24"}
    tenant = {"tenant_id": "acme", "network": network, "pools": [{**POOL, "desired_counts": counts}]}
    path.write_text(json.dumps({"schema_version": 1, "node_id": "n1", "tenants": [tenant]}))
    stack.mvm("agent", "reconcile", "--desired", str(path), timeout_s=300)


def fail(stack: Stack) -> None:
    """What a power failure does to a stack: nobody is told, everything that is no file is gone."""
    supervisor = Supervisor(stack.layout, LocalShell())
    members = [*supervisor.pids(), *stack.vmms()]
    for pid in members:  # the first of them is the supervisor, who would start the others again
        os.kill(pid, signal.SIGSTOP)
    for pid in members:
        os.kill(pid, signal.SIGKILL)
    until(lambda: not stack.rest(), 60, "no process is left")
    name = json.loads(stack.layout.connection.read_text())["netns"]
    if name:
        netns.delete(LocalShell(), name)
    LinuxCgroups(mark(stack.layout)).close()


def places(stack: Stack) -> Counter[str]:
    return Counter(stack.statuses().values())


def gone(stack: Stack) -> list[str]:
    """Those that a sweep has found gone."""
    swept = stack.json("job", "list", "--subject", "n1")
    return [one["ref"] for job in swept for one in (job["result"] or {}).get("stopped") or ()]


def test_a_node_comes_back_as_it_was_asked_to_be(tmp_path: Path) -> None:
    with running_stack() as stack:
        ask(stack, tmp_path / "fleet.json", running=2, warm=1, sleeping=1)
        wanted, before = places(stack), {i["ref"]: i["pid"] for i in stack.json("instance", "list")}
        assert wanted == {"running": 2, "warm": 1, "sleeping": 1}
        fail(stack)
        assert not stack.vmms()
        stack.mvm("up", "--detach")
        until(lambda: gone(stack) and places(stack) == wanted, 240, "converged again")
        after = {i["ref"]: i["pid"] for i in stack.json("instance", "list")}
        assert after.keys() == before.keys(), "the same instances"
        assert not {pid for pid in after.values() if pid} & {pid for pid in before.values() if pid}
        running = [ref for ref, status in stack.statuses().items() if status == "running"]
        for ref in running:
            assert stack.mvm("instance", "exec", ref, "--", "hostname").strip() == ref.split("/")[2]
        assert len(stack.vmms()) == len(stack.taps()) == len(running) + wanted["warm"]
        assert stack.json("net", "verify")
