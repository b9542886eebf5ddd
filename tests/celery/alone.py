"""One node's two workers over a Redis, kept for all tests of a module, and a Celery user's program beside them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvm.domain.ids import JobId, NodeId
from mvm.domain.job import Job, JobState, JobVerb
from mvm.domain.layout import StateLayout
from mvm.drivers import state_dir
from mvm.drivers.locks import FileLocks
from mvm.drivers.redis_link import RedisLink
from mvm.services.jobs import Jobs
from mvm.settings import Settings
from mvm.wiring import Client
from tests.celery.conftest import ROOT, LocalRedis, NodeWorker, _redis, start_worker
from tests.support.waiting import until

NODE = NodeId("n1")


@dataclass
class OneNode:
    """A node whose workers are real, over a fake host."""

    redis: LocalRedis
    main: NodeWorker
    urgent: NodeWorker
    jobs: Jobs
    link: RedisLink

    @property
    def settings(self) -> Settings:
        return Settings(
            state_dir=self.main.state_dir, redis_url=self.redis.host_url, node_id=NODE, netns="host", driver="fake"
        )

    @property
    def env(self) -> dict[str, str]:
        """Of a program beside the workers."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MVM_")}
        return {**kept, **self.settings.environment(), "PYTHONPATH": str(ROOT)}

    def job(self, job: Job | str) -> Job:
        return self.jobs.job(JobId(job) if isinstance(job, str) else job.job_id)

    def ended(self, job: Job | str, deadline_s: float = 60) -> Job:
        job_id = JobId(job) if isinstance(job, str) else job.job_id
        *_, last = self.jobs.follow([job_id], deadline_s=deadline_s)
        return last

    def ok(self, verb: JobVerb, subject: str, **params: Any) -> dict[str, Any]:
        done = self.ended(self.jobs.submit(verb, subject, NODE, params=params, actor="test"))
        assert done.state is JobState.SUCCEEDED, done.error
        return dict(done.result or {})

    def instance(self, pool: str = "acme/web") -> str:
        """A new one, of a pool that is made when needed."""
        if self.jobs.home(self._ref(pool)) is None:
            self.ended(
                self.jobs.submit(JobVerb.TENANT_CREATE, pool.split("/")[0], NODE, actor="test")
            )  # or it is there
            self.ok(JobVerb.POOL_CREATE, pool, flake_ref="builtin:", profile="minimal", start="cold")
            self.ok(JobVerb.POOL_BUILD, pool)
        ref: str = self.ok(JobVerb.INSTANCE_CREATE, pool)["instances"][0]["ref"]
        return ref

    @staticmethod
    def _ref(pool: str) -> Any:
        from mvm.domain.ids import PoolRef

        return PoolRef.parse(pool)

    @contextmanager
    def held(self, name: str) -> Iterator[None]:
        """Keeps whatever needs this lock waiting."""
        with FileLocks(self.main.state_dir / "locks").hold(name, deadline_s=20):
            yield

    def run(self, *argv: str, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
        """A program, with the settings of a user on this machine."""
        done = subprocess.run(argv, env={**self.env, **env}, capture_output=True, text=True, check=False, timeout=120)
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def python(self, program: str, **env: str) -> Any:
        """What a Python program prints last, as JSON."""
        printed = self.run(sys.executable, "-c", program, **env).stdout
        return json.loads(printed.splitlines()[-1])

    def celery(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-m", "celery", "-A", "workers", *words, check=check)

    def logs(self) -> str:
        return str(self.main.logs() + self.urgent.logs())


@contextmanager
def one_node(directory: Path) -> Iterator[OneNode]:
    redis = _redis(directory, "broker")
    url = redis.host_url
    state_dir.prepare(StateLayout(directory / f"state-{NODE}"))
    workers = [start_worker(directory, NODE, url, role=role) for role in ("main", "urgent")]
    link = RedisLink(url, code="x")
    jobs = Client({"node_id": NODE, "redis_url": url, "broker_url": url}, Settings().layout).jobs
    try:
        node = OneNode(redis, *workers, jobs, link)
        until(lambda: jobs.is_node_live(NODE), 120, "the worker's heartbeat")
        until(lambda: "urgent@n1 ready" in node.logs(), 120, "the urgent worker")
        yield node
    finally:
        link.close()
        for worker in workers:
            worker._container.remove()
        redis._container.remove()
