"""Two real Beats over one registry: each tick is fired once, whichever of them is stopped, goes on or dies.

``MVM_TEST_BEATS_S`` is how long they are stopped and continued at random; what came of it is ``build/beats.txt``.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from time import monotonic

import pytest

from mvm.domain.job import Job, JobState, JobVerb
from mvm.domain.layout import StateLayout
from mvm.services.jobs import Jobs
from tests.celery.conftest import NODES, ROOT, LocalRedis, NodeWorker, start_worker
from tests.celery.local_container import LocalContainer
from tests.support.waiting import until

SECONDS = float(os.environ.get("MVM_TEST_BEATS_S", "20"))
REPORT = ROOT / "build" / "beats.txt"
NODE = NODES[0]
SWEEPS = (JobVerb.SWEEP_STALE_PIDS, JobVerb.SWEEP_ORPHANS, JobVerb.SWEEP_RECONCILE, JobVerb.SWEEP_IDLENESS)
LONG_TICKS = 10  # without a sweep, on a busy machine
PERIODS = {f"MVM_{name}_SWEEP_S": "1" for name in ("STALE_PID", "ORPHAN", "RECONCILE", "IDLENESS")}

pytestmark = [pytest.mark.redis, pytest.mark.timeout(SECONDS + 240)]


def start_beat(directory: Path, name: str, url: str) -> LocalContainer:
    layout = StateLayout(directory / name)
    layout.run.mkdir(parents=True)
    env = {**PERIODS, "MVM_STATE_DIR": str(layout.root), "MVM_REDIS_URL": url, "MVM_NODE_ID": name, "MVM_NETNS": "host",
           "MVM_DRIVER": "fake", "PYTHONPATH": str(ROOT)}  # fmt: skip
    argv = [sys.executable, "-m", "celery", "-A", "beat.app", "beat", "--pidfile=", "-l", "INFO"]
    return LocalContainer(name, argv, directory, env=env)


@pytest.fixture
def workers(tmp_path: Path, default_redis_broker: LocalRedis) -> Iterator[list[NodeWorker]]:
    both = [start_worker(tmp_path, NODE, default_redis_broker.host_url, role=role) for role in ("main", "urgent")]
    yield both
    for worker in both:
        worker._container.remove()


@pytest.fixture
def beats(tmp_path: Path, default_redis_broker: LocalRedis) -> Iterator[list[LocalContainer]]:
    both = [start_beat(tmp_path, name, default_redis_broker.host_url) for name in ("b1", "b2")]
    yield both
    for beat in both:
        if beat.status == "running":
            os.kill(beat.pid, signal.SIGCONT)
        beat.remove()


def sweeps(fleet: Jobs) -> list[Job]:
    return sorted(
        (job for job in fleet.list(subject=NODE, limit=1_000_000) if job.verb in SWEEPS), key=lambda j: j.job_id
    )


def ticks(fleet: Jobs, verb: JobVerb) -> list[int]:
    return [job.params["tick"] for job in sweeps(fleet) if job.verb is verb]


class Waiter:
    """Lets time pass. `stood_still` is the longest time in which this very process did not get on."""

    def __init__(self) -> None:
        self.stood_still = 0.0

    def __call__(self, seconds: float) -> None:
        last = began = monotonic()

        def over() -> bool:
            nonlocal last
            now = monotonic()
            self.stood_still, last = max(self.stood_still, now - last), now
            return now - began >= seconds

        until(over, seconds + 600, "time passes")


def test_each_tick_is_fired_once(fleet: Jobs, workers: list[NodeWorker], beats: list[LocalContainer]) -> None:
    until(lambda: fleet.is_node_live(NODE), 60, "the node's heartbeat")
    until(lambda: all(ticks(fleet, verb) for verb in SWEEPS), 60, "the first sweeps")
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    luck, end, stops, wait = random.Random(seed), monotonic() + SECONDS, 0, Waiter()
    while monotonic() < end:
        one = luck.choice(beats)
        os.kill(one.pid, signal.SIGSTOP)
        wait(luck.uniform(0.05, 2.5))
        os.kill(one.pid, signal.SIGCONT)
        wait(luck.uniform(0.0, 1.0))
        stops += 1
    lines = [
        f"seed {seed}: {SECONDS:g} s, a Beat stopped and continued {stops} times",
        f"this test itself stood still for {wait.stood_still:.1f} s at most",
    ]
    for verb in SWEEPS:
        fired = ticks(fleet, verb)
        assert len(fired) == len(set(fired)), "each once"
        longest, spanned = max(b - a for a, b in pairwise(fired)), fired[-1] - fired[0] + 1
        lines.append(f"{verb}: {len(fired)} of {spanned} ticks fired, each once; longest time without one {longest} s")
        assert longest <= LONG_TICKS + wait.stood_still, lines
        ran = [
            (j.started_at, j.finished_at) for j in sweeps(fleet) if j.verb is verb and j.started_at and j.finished_at
        ]
        assert all(before[1] <= after[0] for before, after in pairwise(sorted(ran))), "they never overlap"
    states = [job.state for job in sweeps(fleet) if job.state.final]
    lines.append(f"{states.count(JobState.SUCCEEDED)} of {len(states)} succeeded")
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text("\n".join(lines) + "\n")
    assert states.count(JobState.SUCCEEDED) >= 0.9 * len(states)

    beats[0].kill()
    last = ticks(fleet, SWEEPS[0])[-1]
    until(lambda: ticks(fleet, SWEEPS[0])[-1] >= last + 3, 60, "the other one goes on alone")


def test_a_dead_node_collects_nothing(fleet: Jobs, workers: list[NodeWorker], beats: list[LocalContainer]) -> None:
    until(lambda: fleet.is_node_live(NODE) and sweeps(fleet), 60, "the node sweeps")
    for worker in workers:
        worker._container.kill()
    until(lambda: not fleet.is_node_live(NODE), 60, "the node is seen as gone")
    wait = Waiter()

    def none_came() -> bool:
        count = len(sweeps(fleet))
        wait(2)
        return len(sweeps(fleet)) == count

    until(none_came, 60, "what was being sent as the node went has been")  # which takes a while on a busy machine
    queued, known = fleet.queued(NODE), len(sweeps(fleet))
    wait(4)
    assert fleet.queued(NODE) <= queued
    assert len(sweeps(fleet)) == known
    kinds = [job.verb for job in fleet.list(subject=NODE, limit=1_000_000) if job.job_id in queued]
    assert len(kinds) == len(set(kinds)), "of each kind one at most, also of those that come seldom"
    for worker in workers:
        worker._container.start()
    until(lambda: not fleet.queued(NODE) & queued, 60, "what is too old is dropped")
