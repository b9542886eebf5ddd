"""Jobs of a real stack over a fake host, while its processes are killed: each is done, and done once.

``MVM_TEST_CHAOS_JOBS`` is how many jobs there are; what came of it is ``build/chaos.txt``.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

import pytest

from mvm.domain.ids import JobId, NodeId
from mvm.domain.job import Job, JobState, JobVerb
from mvm.drivers.clock import SystemClock
from mvm.drivers.fake.shared import SharedFakeHost
from mvm.drivers.sqlite_store import SqliteStore
from mvm.wiring import Client, open_client
from tests.support.chaos import Killer, asked, percentile, seed
from tests.support.stack import Stack, running_stack
from tests.support.waiting import until

JOBS = int(os.environ.get("MVM_TEST_CHAOS_JOBS", "60"))
REPORT = Path(__file__).parents[2] / "build" / "chaos.txt"
NODE = NodeId("n1")
TENANTS = 10
KILL_S = 2.0

pytestmark = [pytest.mark.redis, pytest.mark.timeout(600 + 2 * JOBS)]


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    # So many kills are no job's fault; and the fewer are at work, the fewer begin again after each.
    # A sweep reads the whole fake host again and again, and it is one file.
    settings = {
        "MVM_RECONCILE_SWEEP_S": "60", "MVM_STALE_PID_SWEEP_S": "10", "MVM_ORPHAN_SWEEP_S": "10",
        "MVM_JOB_WORKER_DEATHS": "100", "MVM_WORKER_THREADS": "4",
    }  # fmt: skip
    with running_stack("fake", MVM_NETNS="host", **settings) as running:
        yield running


@pytest.fixture(scope="module")
def client(stack: Stack) -> Client:
    return open_client(json.loads(stack.layout.connection.read_text()), stack.layout)


def prepared(stack: Stack) -> list[str]:
    """Instances to be started or destroyed, six for every ten jobs."""
    refs: list[str] = []
    for n in range(TENANTS):
        stack.mvm("tenant", "create", f"t{n}", "--max-running", "1000", "--max-mem", "1000000", "--max-vcpus", "1000",
                  "--max-instances-per-pool", "1000")  # fmt: skip
        pool = f"t{n}/web"
        stack.mvm("pool", "create", pool, "--flake", "builtin:", "--profile", "minimal", "--cold", "--pinned")
        stack.mvm("pool", "build", pool)
        refs += stack.mvm("instance", "create", pool, "--count", str(6 * JOBS // 10 // TENANTS)).split()
    return refs


def test_jobs_are_done_once_whatever_dies(stack: Stack, client: Client) -> None:
    luck, killer, refs = seed("chaos"), Killer(stack), prepared(stack)
    luck.shuffle(refs)
    destroyed, started = refs[: len(refs) // 3], refs[len(refs) // 3 :]
    asks = [(JobVerb.INSTANCE_DESTROY, ref) for ref in destroyed] + [(JobVerb.INSTANCE_START, ref) for ref in started]
    asks += [(JobVerb.INSTANCE_CREATE, f"t{n % TENANTS}/web") for n in range(JOBS - len(asks))]
    luck.shuffle(asks)
    began = monotonic()
    jobs = [client.jobs.submit(verb, subject, NODE, actor="chaos") for verb, subject in asks]
    ids = {job.job_id for job in jobs}

    def strike() -> None:
        killer.kill_ready(luck.choice(("worker", "worker", "urgent")))

    def left() -> int:
        return asked(lambda: sum(job.job_id in ids for job in client.registry.open_jobs(NODE)), len(ids))

    with killer.every(KILL_S, strike):
        for share, part in ((0.8, "redis"), (0.65, "beat"), (0.5, "redis"), (0.3, "beat"), (0.2, "redis")):
            until(lambda share=share: left() <= share * JOBS, 300 + 2 * JOBS, f"{share:.0%} of the jobs are left")
            assert killer.kill(part)
        until(lambda: left() == 0, 300 + 2 * JOBS, "all jobs are done")
    took = monotonic() - began

    until(lambda: stack.run("status").returncode == 0, 120, "the stack is whole again")
    done = check_done_once(stack, client, jobs)
    check_world(stack, started, destroyed, created=sum(verb is JobVerb.INSTANCE_CREATE for verb, _ in asks))
    until(lambda: not client.jobs.queued(NODE) & ids, 60, "no message of them is left")
    waited = [(job.finished_at - job.submitted_at).total_seconds() for job in done if job.finished_at]
    ran = [(j.finished_at - j.started_at).total_seconds() for j in done if j.finished_at and j.started_at]
    lines = [
        f"{JOBS} jobs done once each in {took:.1f} s, {JOBS / took:.1f} jobs/s; killed: {killer.told()}",
        f"from submitted to done: median {percentile(waited, 0.5):.1f} s, p99 {percentile(waited, 0.99):.1f} s",
        f"from begun to done: median {percentile(ran, 0.5):.2f} s, p99 {percentile(ran, 0.99):.2f} s",
        f"workers died in {sum(job.deaths > 0 for job in done)} of them, in one {max(j.deaths for j in done)} times",
    ]
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text("\n".join(lines) + "\n")
    print(*lines, sep="\n")


def check_done_once(stack: Stack, client: Client, jobs: list[Job]) -> list[Job]:
    """Registry, store and audit trail agree on the end of each; returns them at their end."""
    done = [client.jobs.job(job.job_id) for job in jobs]
    assert Counter(job.state for job in done) == {JobState.SUCCEEDED: len(jobs)}, [j.error for j in done if j.error]
    store = SqliteStore(stack.layout.database)
    try:
        for job in done:
            known = store.job(job.job_id)
            assert known is not None
            assert known.state is JobState.SUCCEEDED
        assert not [job for job in store.unfinished_jobs() if job.actor == "chaos"]
    finally:
        store.close()
    entries: Counter[JobId] = Counter()
    for n in range(TENANTS):
        assert stack.json("audit", "verify", f"t{n}")["whole"]
        for path in sorted((stack.layout.audit / f"t{n}").glob("*.jsonl")):
            lines = map(json.loads, path.read_text().splitlines())
            entries.update(JobId(line["job_id"]) for line in lines if line.get("actor") == "chaos")
    assert entries == Counter(job.job_id for job in jobs), "each has ended once"
    return done


def check_world(stack: Stack, started: list[str], destroyed: list[str], *, created: int) -> None:
    statuses = stack.statuses()
    assert not set(destroyed) & set(statuses)
    assert {statuses[ref] for ref in started} == {"running"}
    assert len(statuses) == len(started) + created, "every create has made one"
    host = SharedFakeHost(SystemClock(), stack.layout.root / "fake-host")
    with host.turn():
        assert {str(ref) for ref in host.machines} == set(started)
    until(lambda: not leaks(host), 60, "sweeps clean up what those that were killed left")


def leaks(host: SharedFakeHost) -> list[str]:
    with host.turn():
        return list(host.leaks())
