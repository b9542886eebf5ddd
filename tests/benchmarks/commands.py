"""``cli.*`` and ``enqueue.single``: what a command costs as a whole process, and what a job costs to send.

``cli.help``: ``mvm --help`` from its spawn to its end; bar 100 ms. ``cli.list``: ``mvm instance list`` of three
instances over a running stack, asked of the agent over QUIC; bar 400 ms. For both the bar is a time, and the baseline,
a bare ``python -c pass``, tells how much of it is the interpreter.

``enqueue.single``: jobs per second that `Jobs.submit` records and sends one by one into a real Redis, against Celery's
own ``send_task`` of the same name and arguments, which records nothing. For information.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from mvm.domain.ids import NodeId
from mvm.domain.job import JobVerb
from mvm.drivers.celery_queue import CeleryQueue, task_kwargs
from mvm.drivers.clock import SystemClock
from mvm.drivers.redis_link import RedisLink
from mvm.drivers.redis_registry import RedisRegistry
from mvm.services.jobs import Jobs
from tests.benchmarks.bench_stack import COMMAND, Bench
from tests.benchmarks.result import Result, at_most, informal
from tests.support.redis_server import RedisServer

_RUNS = 15
_BATCHES, _BATCH = 7, 300
_BARE = (sys.executable, "-c", "pass")
_REF = "bench/web/i-00000000"


def cli_help(_bench: Bench) -> Result:
    bare, ours = _interleaved(lambda: _process(_BARE), lambda: _process((COMMAND, "--help")))
    return at_most("cli.help", "ms", "python -c pass", bare, ours, 100)


def cli_list(bench: Bench) -> Result:
    stack = bench.stack
    refs = stack.mvm("instance", "create", "bench/web", "--count", "3").split()
    listing = (COMMAND, "instance", "list")
    bare, ours = _interleaved(lambda: _process(_BARE), lambda: _process(listing, stack.env))
    stack.mvm("instance", "destroy", "-y", *refs)
    return at_most("cli.list", "ms", "python -c pass", bare, ours, 400)


def enqueue_single(_bench: Bench) -> Result:
    from celery import Celery

    server = RedisServer()
    try:
        link = RedisLink(server.url, code="registry.unreachable")
        jobs = Jobs(RedisRegistry(link), CeleryQueue(link), SystemClock())
        app = Celery("bench", broker=server.url.replace("unix://", "redis+socket://"))
        sample = jobs.submit(JobVerb.INSTANCE_START, _REF, NodeId("n1"), actor="bench")

        def submit() -> None:
            jobs.submit(JobVerb.INSTANCE_START, _REF, NodeId("n1"), actor="bench")

        def send_task() -> None:
            app.send_task(sample.verb.task_name, kwargs=task_kwargs(sample), queue="node.n1", ignore_result=True)

        send_task()  # connects
        bare, ours = _interleaved(lambda: _rate(send_task), lambda: _rate(submit), _BATCHES)
        app.close()
        link.close()
    finally:
        server.close()
    return informal("enqueue.single", "jobs/s", "Celery send_task", bare, ours)


def _interleaved(
    bare: Callable[[], float], ours: Callable[[], float], runs: int = _RUNS
) -> tuple[list[float], list[float]]:
    bare(), ours()  # files come into the page cache
    pairs = [(bare(), ours()) for _ in range(runs)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _process(argv: Sequence[str], environment: dict[str, str] | None = None) -> float:
    """Milliseconds from spawn to exit."""
    began = time.perf_counter()
    subprocess.run(argv, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
    return (time.perf_counter() - began) * 1000


def _rate(send: Callable[[], None]) -> float:
    began = time.perf_counter()
    for _ in range(_BATCH):
        send()
    return _BATCH / (time.perf_counter() - began)
