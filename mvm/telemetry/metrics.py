"""Every Prometheus series, named once, and the endpoint that shows them.

The stack's processes share their samples through the files of ``PROMETHEUS_MULTIPROC_DIR``, which has to be set
before this module is imported; the agent's process serves the sum.
"""

from __future__ import annotations

import os
import threading
from collections import Counter as Counts
from collections.abc import Callable, Iterable, Mapping
from socket import socket
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, make_wsgi_app
from prometheus_client.multiprocess import MultiProcessCollector

from mvm.domain.findings import Then
from mvm.domain.job import Job, JobVerb
from mvm.domain.lifecycle import Status
from mvm.domain.remarks import Cause
from mvm.domain.vmm import VmmState

JOBS = Counter("mvm_jobs_total", "Jobs ended, by verb and final state.", ["verb", "state"])
JOB_SECONDS = Histogram(
    "mvm_job_seconds", "How long jobs ran, in seconds.", ["verb"],
    buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
)  # fmt: skip
INSTANCES = Gauge("mvm_instances", "Instances of this node, by status.", ["status"], multiprocess_mode="mostrecent")
SWEEP_FINDINGS = Counter(
    "mvm_sweep_findings_total", "What sweeps found and put right, by kind of finding.", ["sweep", "finding"]
)
ORPHANS = Gauge("mvm_orphans", "What no record owns, by kind.", ["kind"], multiprocess_mode="mostrecent")
MISSING = Gauge("mvm_missing", "What is recorded and not there.", multiprocess_mode="mostrecent")
ILL_GUESTS = Gauge("mvm_ill_guests", "Running guests that are not well.", multiprocess_mode="mostrecent")
SHORT = Gauge(
    "mvm_short_instances",
    "Instances that are not where their pools' counts want them, by cause.",
    ["cause"],
    multiprocess_mode="mostrecent",
)
STALLED = Gauge(
    "mvm_stalled_guests", "Guests that stand still though they should run, by their VMMs' words.", ["state"],
    multiprocess_mode="mostrecent",
)  # fmt: skip
ENDED = Counter("mvm_runs_ended_total", "Runs of instances that nobody here ended, by how they did.", ["how"])
DISK_FREE = Gauge("mvm_disk_free_bytes", "Free space.", multiprocess_mode="mostrecent")
DISK_USED = Gauge("mvm_disk_used_bytes", "What is stored, by kind.", ["kind"], multiprocess_mode="mostrecent")
AGENT_REQUESTS = Counter("mvm_agent_requests_total", "Requests to the agent.", ["method", "outcome"])
FOREIGN_MESSAGES = Counter("mvm_foreign_messages_total", "Messages in a queue that were none of ours.", ["why"])

_FINDINGS = ("stopped", "removed", "repaired", "sent_again", "asked", "pools")
_ORPHANS = ("process", "tap", "bridge", "directory", "files", "cgroup", "snapshot", "stranger")


def observe_job(job: Job) -> None:
    """Count a job that ended, with how long it ran."""
    if job.state.final:
        JOBS.labels(job.verb.value, job.state.value).inc()
        if job.started_at and job.finished_at:
            JOB_SECONDS.labels(job.verb.value).observe((job.finished_at - job.started_at).total_seconds())
    if job.verb.is_sweep and job.result:
        _observe_sweep(job.verb, job.result)


def _observe_sweep(verb: JobVerb, result: Mapping[str, Any]) -> None:
    for name in _FINDINGS:
        if result.get(name):
            SWEEP_FINDINGS.labels(verb.value, name).inc(len(result[name]))
    if "orphans" in result:
        left = Counts(each["kind"] for each in result["orphans"] if not each["removed"])
        for kind in _ORPHANS:
            ORPHANS.labels(kind).set(left[kind])
        MISSING.set(len(result["missing"]))
    if "failing" in result:
        ILL_GUESTS.set(sum(each["ill"] for each in result["failing"]))
        still = Counts(each["state"] for each in result["stalled"] if Then(each["then"]).still)
        for state in VmmState:
            STALLED.labels(state.value).set(still[state.value])
    for each in (*result.get("stopped", ()), *result.get("stalled", ())):
        if each.get("ended"):
            ENDED.labels(each["ended"]).inc()
    if "obstacles" in result:
        short = Counts({cause: 0 for cause in Cause if cause.counts})
        for each in result["obstacles"]:
            short[Cause(each["cause"])] += each["count"]
        for cause in Cause:
            if cause.counts:
                SHORT.labels(cause.value).set(short[cause])
    if "free_bytes" in result:
        DISK_FREE.set(result["free_bytes"])
        for kind, count in result["kinds"].items():
            DISK_USED.labels(kind).set(count)


def show_instances(counts: Mapping[str, int]) -> None:
    """Show how many instances of each status there are; statuses not named have none."""
    for status in Status:
        INSTANCES.labels(status.value).set(counts.get(status.value, 0))


def serve(sockets: Iterable[socket]) -> Callable[[], None]:
    """Show all processes' samples over HTTP on these listening sockets, in threads; returns what ends them."""
    servers = [_Server(sock) for sock in sockets]
    threads = [threading.Thread(target=s.serve_forever, name="metrics", daemon=True) for s in servers]
    for thread in threads:
        thread.start()

    def stop() -> None:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()

    return stop


def _registry() -> CollectorRegistry:
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return REGISTRY
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return registry


class _Quiet(WSGIRequestHandler):
    timeout = 10  # seconds; a client that says nothing holds a thread no longer

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Scrapes are no news."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def __init__(self, sock: socket) -> None:
        host, port = sock.getsockname()[:2]
        super().__init__((host, port), _Quiet, bind_and_activate=False)
        self.socket.close()
        self.socket = sock
        self.server_name, self.server_port = host, port
        self.setup_environ()
        self.set_app(make_wsgi_app(_registry()))
