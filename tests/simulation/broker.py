"""Redis as the simulation has it: a registry and a queue that can be away, and forget what was not yet on the disk."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from mvm.domain.canvas import names
from mvm.domain.ids import JobId, NodeId
from mvm.domain.job import Job, Lane
from mvm.drivers.memory_registry import MemoryRegistry
from mvm.errors import Unreachable
from mvm.ports.clock import Clock

_STATE = ("_nodes", "_tenants", "_net_ids", "_rebuilt_at", "_pools", "_jobs", "_bulks", "_cancels", "_sweeps")
_CALLS = (
    "heartbeat", "nodes", "live_nodes", "reserve_tenant", "restore", "rebuilding_s", "tenant", "put_tenant",
    "remove_tenant", "place_pool", "unplace_pool", "pool_node", "record", "job", "jobs", "children", "open_jobs",
    "update", "next_children", "held_children", "request_cancel", "cancel_requested", "expired_jobs", "expire",
    "claim_sweep", "release_sweep", "networks", "withdraw_tenant",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Message:
    """What the broker holds of a job: `number` tells it from others of the same job."""

    number: int
    job: Job
    not_before: float = 0.0

    @property
    def urgent(self) -> bool:
        """Whether the urgent worker takes it."""
        return self.job.lane is Lane.URGENT


class SimRegistry(MemoryRegistry):
    """ports/registry.py. `call` is told of every call before it is done, and may raise."""

    def __init__(self, clock: Clock, call: Callable[[str], None]) -> None:
        super().__init__(clock)
        self.call = call

    def state(self) -> dict[str, Any]:
        """A copy of all it knows."""
        kept = {name: copy.copy(getattr(self, name)) for name in _STATE}
        kept["_bulks"] = {key: copy.deepcopy(bulk) for key, bulk in self._bulks.items()}
        return kept

    def set_state(self, state: dict[str, Any]) -> None:
        """It knows that, and nothing else."""
        for name, value in state.items():
            setattr(self, name, copy.copy(value))
        self._bulks = {key: copy.deepcopy(bulk) for key, bulk in state["_bulks"].items()}

    def all_jobs(self) -> dict[JobId, Job]:
        """Every job it knows."""
        return self._jobs


def _telling(name: str) -> Any:
    known = getattr(MemoryRegistry, name)

    def method(self: SimRegistry, *args: Any, **kwargs: Any) -> Any:
        self.call(f"registry.{name}")
        return known(self, *args, **kwargs)

    return method


for _name in _CALLS:
    setattr(SimRegistry, _name, _telling(_name))


class SimQueue:
    """ports/queue.py. A message is ready, or some worker has it; what becomes of it, events say."""

    def __init__(self, now: Callable[[], float], wall: Callable[[], datetime], call: Callable[[str], None]) -> None:
        self.call = call
        self.ready: list[Message] = []
        self.taken: dict[int, tuple[str, Message]] = {}
        self._now = now
        self._wall = wall
        self._number = 0

    def send(self, jobs: Sequence[Job]) -> None:
        """See ports/queue.py."""
        self.call("queue.send")
        for job in jobs:
            later = max(0.0, (job.retry_at - self._wall()).total_seconds()) if job.retry_at else 0.0
            self.put(Message(0, job, self._now() + later))

    def queued(self, node: NodeId) -> frozenset[JobId]:
        """See ports/queue.py."""
        self.call("queue.queued")
        return frozenset(message.job.job_id for message in self.ready)

    def speaks_of(self, node: NodeId, task_id: str) -> bool:
        """See ports/queue.py."""
        self.call("queue.speaks_of")
        return any(names(message.job, task_id) for message in self.ready)

    def discard(self, node: NodeId, jobs: frozenset[JobId]) -> None:
        """See ports/queue.py."""
        self.call("queue.discard")
        self.ready = [message for message in self.ready if message.job.job_id not in jobs]

    # --- what events do
    def put(self, message: Message) -> None:
        """One more message."""
        self._number += 1
        self.ready.append(replace(message, number=self._number))

    def due(self, urgent: bool) -> list[Message]:
        """What a worker could take now."""
        return [m for m in self.ready if m.urgent is urgent and m.not_before <= self._now()]

    def take(self, message: Message, by: str) -> None:
        """A worker has it."""
        self.ready.remove(message)
        self.taken[message.number] = by, message

    def ack(self, message: Message) -> None:
        """It is done with."""
        self.taken.pop(message.number, None)

    def give_back(self, by: str) -> None:
        """What that worker had taken is ready again, before all else."""
        back = [message for who, message in self.taken.values() if who == by]
        for message in back:
            self.ack(message)
        self.ready[:0] = back

    def state(self) -> tuple[list[Message], dict[int, tuple[str, Message]]]:
        """A copy of all it holds."""
        return list(self.ready), dict(self.taken)

    def set_state(self, state: tuple[list[Message], dict[int, tuple[str, Message]]]) -> None:
        """It holds that, and nothing else."""
        self.ready, self.taken = list(state[0]), dict(state[1])


def away(what: str) -> Unreachable:
    """What a call raises while Redis is away."""
    return Unreachable(f"{what}.unreachable", "Redis does not answer", hint="see: mvm status")
