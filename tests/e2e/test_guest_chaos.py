"""Real guests that start, sleep, wake and stop while workers, agent, Beat, Redis and QEMU are killed at random.

At the end host, store, registry and desired state agree, and nothing is left over. ``MVM_TEST_CHAOS_GUESTS`` and
``MVM_TEST_CHAOS_S`` make it larger and longer; what came of it is ``build/guest-chaos.txt``.
"""

from __future__ import annotations

import json
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from mvm.domain.ids import JobId, NodeId
from mvm.domain.instance import Instance
from mvm.domain.job import JobState, JobVerb
from mvm.domain.lifecycle import Status
from mvm.drivers.qemu.driver import QemuDriver
from mvm.drivers.shell import LocalShell
from mvm.drivers.sqlite_store import SqliteStore
from mvm.errors import MvmError
from mvm.wiring import Client, open_client
from tests.support.chaos import Killer, pause, seed
from tests.support.stack import Stack, running_stack
from tests.support.waiting import until

GUESTS = int(os.environ.get("MVM_TEST_CHAOS_GUESTS", "3"))
SECONDS = float(os.environ.get("MVM_TEST_CHAOS_S", "30"))
REPORT = Path(__file__).parents[2] / "build" / "guest-chaos.txt"
NODE = NodeId("n1")
KILL_S, ASK_S = 5.0, 1.0
SETTLE_S = 300.0
V, S = JobVerb, Status

pytestmark = [
    pytest.mark.root, pytest.mark.guest, pytest.mark.redis, pytest.mark.timeout(2 * SECONDS + SETTLE_S + 400)
]  # fmt: skip

ASKS = {
    S.RUNNING: (V.INSTANCE_SLEEP, V.INSTANCE_SLEEP, V.INSTANCE_STOP, V.INSTANCE_WARM),
    S.WARM: (V.INSTANCE_WAKE, V.INSTANCE_SLEEP),
    S.SLEEPING: (V.INSTANCE_WAKE, V.INSTANCE_WAKE, V.INSTANCE_STOP),
    S.STOPPED: (V.INSTANCE_START,),
}


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    # A person's word holds for a moment only: reconcile pulls the other way all the time.
    with running_stack(MVM_MANUAL_HOLD_S="5", MVM_JOB_WORKER_DEATHS="100") as running:
        yield running


def instances(stack: Stack) -> list[Instance]:
    with closing(SqliteStore(stack.layout.database)) as store:
        return list(store.instances())


def vmm_of(stack: Stack, luck: random.Random) -> bool:
    """Kill one QEMU, if there is any."""
    pids = stack.vmms()
    if pids:
        with suppress(ProcessLookupError):
            os.kill(luck.choice(pids), signal.SIGKILL)
    return bool(pids)


def test_all_agree_at_the_end(stack: Stack, tmp_path: Path) -> None:
    wanted = {"running": GUESTS - GUESTS // 3, "sleeping": GUESTS // 3}
    ask(stack, tmp_path / "fleet.json", wanted)
    client = open_client(json.loads(stack.layout.connection.read_text()), stack.layout)
    luck, killer = seed("guest chaos"), Killer(stack)
    strikes: Counter[str] = Counter()

    def strike() -> None:
        part = luck.choice(("worker", "urgent", "agent", "beat", "redis", "QEMU", "QEMU"))
        if part in ("worker", "urgent"):
            strikes[part] += killer.kill_ready(part)
        else:
            strikes[part] += vmm_of(stack, luck) if part == "QEMU" else killer.kill(part)

    asked: dict[JobId, JobVerb] = {}
    end = monotonic() + SECONDS
    with killer.every(KILL_S, strike):
        while monotonic() < end:
            disturb(stack, client, luck, asked)
            until(pause(luck.uniform(0, 2 * ASK_S)), 600, "time passes")
    calm = monotonic()
    until(lambda: stack.run("status").returncode == 0, 120, "the stack is whole")
    until(lambda: converged(stack, wanted), SETTLE_S, "host, store and desired state agree")
    settled = monotonic() - calm
    until(lambda: not still_open(client), 120, "no job is stuck")

    check_guests(stack)
    ended = {job_id: client.jobs.job(job_id) for job_id in asked}
    assert all(job.state.final for job in ended.values())
    until(lambda: orphans(stack) == [], 60, "no orphan is left")
    stack.mvm("instance", "list")
    assert stack.json("audit", "verify", "acme")["whole"]
    states = Counter(f"{job.verb} {job.state}" for job in ended.values())
    codes = Counter(job.error["code"] for job in ended.values() if job.error and job.state is JobState.FAILED)
    lines = [
        f"{GUESTS} guests, {SECONDS:g} s; killed: {', '.join(f'{k} {v} times' for k, v in sorted(strikes.items()))}",
        f"{len(asked)} jobs asked for: " + ", ".join(f"{k} {v}" for k, v in sorted(states.items())),
        "failed: " + (", ".join(f"{k} {v}" for k, v in sorted(codes.items())) or "none"),
        f"as desired {settled:.1f} s after the last kill; 0 leaks, 0 orphans, 0 open jobs",
    ]
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text("\n".join(lines) + "\n")
    print(*lines, sep="\n")


def ask(stack: Stack, path: Path, counts: dict[str, int]) -> None:
    pool: dict[str, Any] = {
        "pool_id": "web", "flake_ref": "builtin:", "profile": "minimal", "instance_resources": {"mem_mib": 128},
        "desired_counts": counts,
    }  # fmt: skip
    tenant = {"tenant_id": "acme", "network": {"tenant_net_id": 7, "ipv4_subnet": "10.240.7.0/24"}, "pools": [pool]}
    path.write_text(json.dumps({"schema_version": 1, "node_id": "n1", "tenants": [tenant]}))
    stack.mvm("agent", "reconcile", "--desired", str(path), timeout_s=600)


def disturb(stack: Stack, client: Client, luck: random.Random, asked: dict[JobId, JobVerb]) -> None:
    """Ask a guest for what it can do now; by job, or of the agent. Either may be away."""
    resting = [i for i in instances(stack) if i.status in ASKS and i.in_flight is None]
    if not resting:
        return
    one = luck.choice(resting)
    verb = luck.choice(ASKS[one.status])
    with suppress(MvmError):
        if verb is V.INSTANCE_WAKE and luck.random() < 0.3:
            address = client.connection["agent_address"]
            client.agents.call(address, "instance.wake", {"ref": str(one.ref), "actor": "chaos"}, deadline_s=20)
        else:
            asked[client.jobs.submit(verb, str(one.ref), NODE, actor="chaos").job_id] = verb


def converged(stack: Stack, wanted: dict[str, int]) -> bool:
    """Records are as desired and in no job's hands; processes, TAPs and snapshots are as the records say."""
    found = instances(stack)
    places = Counter(i.status.value for i in found if i.status in (S.RUNNING, S.WARM, S.SLEEPING))
    if any(i.in_flight for i in found) or dict(places) != {k: v for k, v in wanted.items() if v}:
        return False
    runs = QemuDriver(stack.layout, LocalShell()).processes()
    up = {i.ref: (i.process,) for i in found if i.status in (S.RUNNING, S.WARM)}
    if {ref: tuple(several) for ref, several in runs.items()} != up or len(stack.taps()) != len(up):
        return False
    left = {i.ref for i in found if (stack.layout.instance(i.ref) / "snapshot").exists()}
    return left == {i.ref for i in found if i.status is S.SLEEPING}


def still_open(client: Client) -> list[str]:
    try:
        return [str(job.job_id) for job in client.registry.open_jobs(NODE) if not job.verb.is_sweep]
    except MvmError as error:
        return [error.code]


def check_guests(stack: Stack) -> None:
    for one in instances(stack):
        if one.status is S.RUNNING:
            done = stack.mvm("instance", "exec", str(one.ref), "--", "hostname").strip()
            assert done == str(one.ref.instance)
    with closing(SqliteStore(stack.layout.database)) as store:
        assert not [job for job in store.unfinished_jobs() if not job.verb.is_sweep]


def orphans(stack: Stack) -> list[str] | None:
    """What the last orphan sweep found."""
    swept = [j for j in stack.json("job", "list", "--subject", "n1") if j["verb"] == "sweep.orphans" and j["result"]]
    found: list[str] | None = swept[0]["result"]["found"] if swept else None
    return found
