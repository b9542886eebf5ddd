"""A whole node in memory: the real services and the real store over the fake host."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mvm.domain.ids import InstanceRef, NodeId
from mvm.domain.instance import Instance
from mvm.domain.job import Job, JobState, JobVerb, Reason
from mvm.drivers.fake import FakeHost, ManualClock
from mvm.drivers.memory_queue import MemoryQueue
from mvm.drivers.memory_registry import MemoryRegistry
from mvm.drivers.sqlite_store import SqliteStore
from mvm.settings import Settings
from mvm.wiring import NodePorts, NodeServices, build_node
from tests.support.command_line import ADDRESS, CommandLine, LocalAgents, MemoryClient, WorkedJobs

NODE = NodeId("n1")


@dataclass
class Node:
    """One node and what a test does with it. Jobs run when `drain` is called; `do` calls it."""

    host: FakeHost
    clock: ManualClock
    queue: MemoryQueue
    registry: MemoryRegistry
    services: NodeServices

    def submit(self, verb: JobVerb, subject: str, **params: Any) -> Job:
        return self.services.jobs.submit(verb, subject, NODE, params=params, actor="test")

    def drain(self) -> int:
        """Run everything queued, each job's further tries at their times included."""
        delivered = self.queue.drain(self.services.runner.run)
        while (due := self.queue.next_due()) is not None:
            self.clock.advance((due - self.clock.now()).total_seconds())
            delivered += self.queue.drain(self.services.runner.run)
        return delivered

    def do(self, verb: JobVerb, subject: str, **params: Any) -> Job:
        """Submit, run everything queued, and return the job as it ended."""
        self.clock.advance(0.01)
        job = self.submit(verb, subject, **params)
        self.drain()
        return self.services.jobs.job(job.job_id)

    def ok(self, verb: JobVerb, subject: str, **params: Any) -> Mapping[str, Any]:
        """As `do`, for a job that must succeed; returns its result."""
        job = self.do(verb, subject, **params)
        assert job.state is JobState.SUCCEEDED, job.error
        return job.result or {}

    def fails(self, code: str, verb: JobVerb, subject: str, **params: Any) -> Job:
        """As `do`, for a job that must fail with `code`."""
        job = self.do(verb, subject, **params)
        assert job.state is JobState.FAILED, job.result
        assert job.error is not None
        assert job.error["code"] == code, job.error
        return job

    def sweep(self, verb: JobVerb) -> Mapping[str, Any]:
        job = self.services.jobs.submit(verb, str(NODE), NODE, reason=Reason.SWEEP, actor="beat")
        self.drain()
        done = self.services.jobs.job(job.job_id)
        assert done.state is JobState.SUCCEEDED, done.error
        return done.result or {}

    def pool(self, ref: str = "acme/web", *, cold: bool = False, **resources: int) -> None:
        """A tenant (if new) with a built pool, of clones unless `cold`."""
        tenant = ref.split("/")[0]
        if not any(t.id == tenant for t in self.services.store.tenants()):
            self.ok(JobVerb.TENANT_CREATE, tenant)
        self.ok(JobVerb.POOL_CREATE, ref, flake_ref="builtin:", profile="minimal", resources=resources,
                start="cold" if cold else "clone")  # fmt: skip
        self.ok(JobVerb.POOL_BUILD, ref)

    def create(self, count: int = 1, ref: str = "acme/web") -> list[str]:
        created = self.ok(JobVerb.INSTANCE_CREATE, ref, count=count)
        return [instance["ref"] for instance in created["instances"]]

    def instance(self, ref: str) -> Instance:
        return self.services.store.instance(InstanceRef.parse(ref))


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    return Settings(state_dir=tmp_path / "state", node_id="n1", driver="fake", parallel_boots=2, orphan_grace_s=60)


@pytest.fixture
def node(tmp_path: Path, settings: Settings) -> Iterator[Node]:
    clock = ManualClock()
    host = FakeHost(clock)
    registry, queue = MemoryRegistry(clock), MemoryQueue(clock)
    store = SqliteStore(tmp_path / "node.db")
    ports = NodePorts(
        store, registry, queue, host.locks, clock, host.vmm, host.guest, host.network, host.packets, None,
        host.storage, host.images, host.memory, host.audit, host.cgroups, host.secrets,
    )  # fmt: skip
    yield Node(host, clock, queue, registry, build_node(ports, settings, authorized_key="ssh-ed25519 AAAA test"))
    store.close()


@pytest.fixture
def mvm(node: Node, tmp_path: Path) -> CommandLine:
    """The ``mvm`` command over the node in memory."""
    jobs = WorkedJobs(node.registry, node.queue, node.clock, node.drain)
    agents = LocalAgents({ADDRESS: node.services.view})
    return CommandLine(tmp_path / "state", MemoryClient(node.registry, jobs, agents, NODE))
