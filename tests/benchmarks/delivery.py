"""``enqueue.*`` and ``execute.*``: jobs per second, against Celery by itself with the same settings.

``enqueue.single``: 10,000 jobs that `Jobs.submit` records and sends one by one, against ``send_task`` of the same name,
arguments and priority, which records nothing. Bar 0.7 of its rate. ``enqueue.bulk``: one bulk job with 10,000
children by `Jobs.submit_bulk`, against ``send_task`` 10,000 times within kombu's ``Producer.batch``. Bar 0.9.

``execute.noop``: jobs whose handler does nothing, through all that makes them jobs (records, locks, cancelling, audit
trail, registry, metrics), against a Celery task that does nothing. Bar 0.5. ``execute.wake``: ``instance.warm`` and
``instance.wake``, in turn, of fake guests; for information. Jobs are done by one real worker as ``mvm up`` starts it,
the task by Celery's with the same settings, which has nothing of ours (see `bare_worker`); from the moment at which all
messages are there until the last one is acknowledged. Redis has its append-only file.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from celery import Celery

from mvm.domain.ids import NodeId
from mvm.domain.job import Job, JobState, JobVerb, Lane
from mvm.drivers.celery_queue import PRIORITY_SEPARATOR, PRIORITY_STEPS, CeleryQueue, task_kwargs
from mvm.drivers.clock import SystemClock
from mvm.drivers.redis_link import RedisLink
from mvm.drivers.redis_registry import RedisRegistry
from mvm.ports.queue import node_queue
from mvm.services.jobs import Asked, Jobs
from mvm.settings import Settings
from tests.benchmarks.bench_stack import Bench
from tests.benchmarks.result import Result, at_least_ratio, informal
from tests.support.redis_server import RedisServer
from tests.support.waiting import until

_NODE = NodeId("n1")
_SENT, _BATCHES = 10_000, 5
_ROUNDS, _A_ROUND = 5, 600
_TENANTS, _GUESTS = 10, 20
_PLAIN = NodeId("plain")  # whose worker is Celery by itself
_PRIORITY = {Lane.NORMAL: 3, Lane.BULK: 9}


@dataclass
class Broker:
    """A Redis, our way to send into it and Celery's."""

    link: RedisLink
    jobs: Jobs
    queue: CeleryQueue
    celery: Celery
    url: str

    def job(self, verb: JobVerb = JobVerb.INSTANCE_START, subject: str = "bench/web/i-00000000") -> Job:
        return self.jobs.new(verb, subject, _NODE, actor="bench")

    def send_task(self, name: str, like: Job, producer: object = None, node: NodeId = _NODE) -> None:
        """As a service that uses Celery would send it."""
        self.celery.send_task(
            name, kwargs=task_kwargs(like), queue=node_queue(node), priority=_PRIORITY[like.lane], producer=producer,
            ignore_result=True,
        )  # fmt: skip

    def left(self, node: NodeId) -> int:
        """Messages that wait or are not acknowledged."""
        keys = [f"{node_queue(node)}{PRIORITY_SEPARATOR}{p}" if p else node_queue(node) for p in PRIORITY_STEPS]
        waiting = self.link.pipeline([("LLEN", key) for key in keys])
        return sum(waiting) + int(self.link.command("HLEN", f"mvm:unacked:{node}:main"))


@contextmanager
def broker() -> Iterator[Broker]:
    server = RedisServer()
    link = RedisLink(server.url, code="registry.unreachable")
    celery = Celery("bench", broker=server.url.replace("unix://", "redis+socket://"))
    celery.conf.update(
        task_ignore_result=True, task_serializer="json",
        broker_transport_options={
            "priority_steps": list(PRIORITY_STEPS), "sep": PRIORITY_SEPARATOR, "queue_order_strategy": "priority",
        },
    )  # fmt: skip
    queue = CeleryQueue(link)
    try:
        yield Broker(link, Jobs(RedisRegistry(link), queue, SystemClock()), queue, celery, server.url)
    finally:
        celery.close()
        link.close()
        server.close()


# --- sending
def enqueue_single(bench: Bench) -> Result:
    with broker() as there:
        sample, count = there.job(), _SENT // _BATCHES

        def ours() -> None:
            for _ in range(count):
                there.jobs.submit(sample.verb, sample.subject, _NODE, actor="bench")

        def bare() -> None:
            for _ in range(count):
                there.send_task(sample.verb.task_name, sample)

        rates = _alternating(bench, "enqueue.single", _BATCHES, lambda: _rate(bare, count), lambda: _rate(ours, count))
    return at_least_ratio("enqueue.single", "jobs/s", "Celery send_task", *rates, 0.7)


def enqueue_bulk(bench: Bench) -> Result:
    with broker() as there:
        subjects = [f"bench/web/i-{n:08x}" for n in range(_SENT)]
        sample = there.job().with_(lane=Lane.BULK)

        def ours() -> None:
            there.jobs.submit_bulk(sample.verb, subjects, lambda _: _NODE, actor="bench")

        def bare() -> None:
            with there.celery.producer_pool.acquire() as producer, producer.batch(1000):
                for _ in subjects:
                    there.send_task(sample.verb.task_name, sample, producer)

        rates = _alternating(bench, "enqueue.bulk", 3, lambda: _rate(bare, _SENT), lambda: _rate(ours, _SENT))
    return at_least_ratio("enqueue.bulk", "jobs/s", "send_task, batched", *rates, 0.9)


# --- executing
@contextmanager
def workers(there: Broker) -> Iterator[None]:
    """The node's worker and Celery's; they have taken nothing yet when this begins."""
    with _worker(there, _PLAIN, "bare_worker"), _worker(there, _NODE, "noop_worker"):
        until(lambda: there.jobs.is_node_live(_NODE), 60, "the worker's heartbeat")
        yield


@contextmanager
def _worker(there: Broker, node: NodeId, module: str) -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix="mvm-bench-") as root:
        settings = Settings(
            state_dir=Path(root), redis_url=there.url, node_id=node, driver="fake", netns="host",
        )  # fmt: skip
        settings.layout.metrics.mkdir(parents=True)
        env = {name: value for name, value in os.environ.items() if not name.startswith("MVM_")}
        env |= {**settings.environment(), "MVM_WORKER_ROLE": "main", "PYTHONPATH": str(Path(__file__).parents[2]),
                "PROMETHEUS_MULTIPROC_DIR": str(settings.layout.metrics)}  # fmt: skip
        argv = [
            sys.executable, "-m", "celery", "-A", f"tests.benchmarks.{module}", "worker", "-n", f"main@{node}",
            "-Q", node_queue(node), "-P", "threads", "-c", str(settings.worker_threads), "--without-gossip",
            "--without-mingle", "-E", "-l", "INFO",
        ]  # fmt: skip
        with (Path(root) / "worker.log").open("wb") as log:
            process = subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            try:
                yield
            finally:
                process.terminate()
                process.wait(60)


def execute_noop(bench: Bench) -> Result:
    with broker() as there, workers(there):
        tenants = [f"t{n}" for n in range(_TENANTS)]
        _all(there, [Asked(JobVerb.TENANT_CREATE, tenant) for tenant in tenants])
        asked = [Asked(JobVerb.TENANT_UPDATE, tenants[n % _TENANTS]) for n in range(_A_ROUND)]
        rates = _alternating(
            bench, "execute.noop", _ROUNDS, lambda: _bare_rate(there, _A_ROUND), lambda: _all(there, asked)
        )
    return at_least_ratio("execute.noop", "jobs/s", "Celery no-op", *rates, 0.5)


def execute_wake(bench: Bench) -> Result:
    with broker() as there, workers(there):
        pools = [f"t{n}/web" for n in range(_TENANTS)]
        shape = {"flake_ref": "builtin:", "profile": "minimal", "start": "cold"}
        _all(there, [Asked(JobVerb.TENANT_CREATE, pool.split("/")[0]) for pool in pools])
        _all(there, [Asked(JobVerb.POOL_CREATE, pool, shape) for pool in pools])
        _all(there, [Asked(JobVerb.POOL_BUILD, pool) for pool in pools])
        parent = there.jobs.submit_group(
            [Asked(JobVerb.INSTANCE_CREATE, pool, {"count": _GUESTS}) for pool in pools], _NODE,
            reason=there.job().reason, actor="bench",
        )  # fmt: skip
        _ended(there, parent)
        refs = [
            instance["ref"]
            for job in there.jobs.children(parent.job_id)
            for instance in (job.result or {})["instances"]
        ]
        _all(there, [Asked(JobVerb.INSTANCE_START, ref) for ref in refs])

        def both() -> float:
            warm, wake = ([Asked(verb, ref) for ref in refs] for verb in (JobVerb.INSTANCE_WARM, JobVerb.INSTANCE_WAKE))
            return (_all(there, warm) + _all(there, wake)) / 2

        rates = _alternating(bench, "execute.wake", _ROUNDS, lambda: _bare_rate(there, 2 * len(refs)), both)
    return informal("execute.wake", "jobs/s", "Celery no-op", *rates)


def _all(there: Broker, asked: Sequence[Asked]) -> float:
    """The rate at which these jobs, all of which succeed, are done once their messages are there."""
    jobs = [there.jobs.new(a.verb, a.subject, _NODE, params=a.params, actor="bench") for a in asked]
    there.jobs._registry.record(jobs)
    there.queue.send(jobs)
    rate = _drained(there, len(jobs), _NODE)
    ended = [there.jobs.job(job.job_id) for job in jobs]
    assert all(job.state is JobState.SUCCEEDED for job in ended), next(job.error for job in ended if job.error)
    return rate


def _bare_rate(there: Broker, count: int) -> float:
    with there.celery.producer_pool.acquire() as producer, producer.batch(count):
        for _ in range(count):
            there.send_task("bench.noop", there.job(), producer, _PLAIN)
    return _drained(there, count, _PLAIN)


def _drained(there: Broker, count: int, node: NodeId) -> float:
    return _rate(lambda: until(lambda: not there.left(node), 120, "all messages acknowledged"), count)


def _ended(there: Broker, parent: Job) -> None:
    *_, final = there.jobs.follow([parent.job_id], deadline_s=120)
    assert final.state is JobState.SUCCEEDED, final.error


# --- measuring
def _rate(run: Callable[[], None], count: int) -> float:
    began = time.perf_counter()
    run()
    return count / (time.perf_counter() - began)


def _alternating(
    bench: Bench, name: str, runs: int, bare: Callable[[], float], ours: Callable[[], float]
) -> tuple[list[float], list[float]]:
    """The first of each is not counted: it connects and imports."""
    pairs = [(bare(), ours()) for _ in range(runs + 1)][1:]
    for one, other in pairs:
        bench.say(f"{name}: {other:.0f} jobs/s, Celery by itself {one:.0f}")
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]
