"""The real stack that benchmarks measure: one for all of a run, brought up by the first that needs it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from mvm.domain.ids import NodeId
from mvm.domain.job import JobState, JobVerb, Lane
from mvm.drivers.celery_queue import CeleryQueue
from mvm.drivers.redis_link import RedisLink
from mvm.ports.agents import ConnectedAgent
from mvm.wiring import Client, open_client
from tests.support.stack import Stack, running_stack
from tests.support.waiting import until

COMMAND = str(Path(sys.executable).with_name("mvm"))  # as people run it
CLONES, COLD = "bench/web", "bench/cold"
NODE = NodeId("n1")
_SETTINGS = {  # the defaults, which tests make shorter; and the steps of jobs in the services' logs
    "MVM_STALE_PID_SWEEP_S": "10", "MVM_RECONCILE_SWEEP_S": "15", "MVM_ORPHAN_SWEEP_S": "60",
    "MVM_ORPHAN_GRACE_S": "60", "MVM_LOG": "mvm.jobs=debug,mvm.snapshots=debug",
}  # fmt: skip

_EVENTS = ("began", "step", "guest replied", "succeeded")

Times = dict[str, float]
"""When each step of a job began, in seconds from when it was asked for; ``succeeded`` is after its last record."""


class Bench:
    """What benchmarks share. `stack` has tenant ``bench`` with pools of 256 MB guests, `CLONES` and `COLD`, built."""

    def __init__(self, cleanup: ExitStack, say: Callable[[str], None]) -> None:
        self.cleanup = cleanup
        self.say = say

    @cached_property
    def stack(self) -> Stack:
        """Up. Packages come from the tests' cache."""
        self.say("bringing a stack up")
        stack = self.cleanup.enter_context(running_stack(**_SETTINGS))
        stack.mvm("tenant", "create", "bench")
        self.say("building its image")
        for pool, *how in ((CLONES,), (COLD, "--cold")):
            stack.mvm("pool", "create", pool, "--flake", "builtin:", "--profile", "minimal", "--mem", "256", *how)
            stack.mvm("pool", "build", pool, timeout_s=600)
        return stack

    @cached_property
    def client(self) -> Client:
        """As a command line has it."""
        return open_client(json.loads(self.stack.layout.connection.read_text()), self.stack.layout)

    def create(self, pool: str, count: int = 1) -> list[str]:
        """New instances."""
        return self.stack.mvm("instance", "create", pool, "--count", str(count)).split()

    def destroy(self, *refs: str) -> None:
        """They are gone."""
        self.stack.mvm("instance", "destroy", "-y", *refs)

    @cached_property
    def queue(self) -> CeleryQueue:
        """The broker's."""
        return CeleryQueue(RedisLink(self.client.connection["broker_url"], code="broker.unreachable"))

    def job(self, verb: JobVerb, ref: str, *, lane: Lane | None = None, **params: Any) -> Times:
        """A job that must succeed, from before it is recorded."""

        job = self.client.jobs.new(verb, ref, NODE, params=params, actor="bench", lane=lane)

        def run() -> None:
            self.client.registry.record([job])
            self.queue.send([job])
            *_, final = self.client.jobs.follow([job.job_id], deadline_s=120)
            assert final.state is JobState.SUCCEEDED, final.error

        return self.timed("urgent" if job.lane is Lane.URGENT else "worker", ref, run)

    @contextmanager
    def agent(self) -> Iterator[ConnectedAgent]:
        """The node's agent, shaken hands with."""
        with self.client.agents.connected(self.client.connection["agent_address"]) as agent:
            agent.call("node.ping", {}, deadline_s=60)
            yield agent

    def wake(self, ref: str, agent: ConnectedAgent | None = None) -> Times:
        """An urgent wake, from before it is asked for; ``answer`` is when the client has it.

        Without an `agent` it begins with the opening of a QUIC connection.
        """
        asked = {"ref": ref, "actor": "bench"}

        def run() -> None:
            if agent is not None:
                agent.call("instance.wake", asked, deadline_s=60)
            else:
                address = self.client.connection["agent_address"]
                self.client.agents.call(address, "instance.wake", asked, deadline_s=60)

        return self.timed("agent", ref, run)

    def timed(self, service: str, ref: str, run: Callable[[], None]) -> Times:
        """What `run` makes `service` log of the jobs of `ref`."""
        log = self.stack.layout.logs / f"{service}.log"
        offset, began = log.stat().st_size, time.time()
        run()
        answered = time.time() - began
        times: Times = {}

        def succeeded() -> bool:  # the log's file is the supervisor's, and may lag
            with log.open() as lines:
                lines.seek(offset)
                for event in (json.loads(line) for line in lines if line.startswith("{") and line.endswith("\n")):
                    if event.get("subject") == ref and event["event"] in _EVENTS:
                        at = datetime.fromisoformat(event["timestamp"]).timestamp() - began
                        times.setdefault(event.get("step", event["event"]), at)
            return "succeeded" in times

        until(succeeded, 10, f"{service}.log has the end of the job of {ref}")
        return times | {"answer": answered}
