"""A job queue of one process, in memory: for tests and the fake driver."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from datetime import datetime
from threading import Lock

from mvm.domain.canvas import names
from mvm.domain.ids import JobId, NodeId
from mvm.domain.job import Job, Lane
from mvm.errors import Unreachable
from mvm.ports.clock import Clock
from mvm.ports.queue import node_queue

_ORDER = (Lane.URGENT, Lane.NORMAL, Lane.BULK)


class MemoryQueue:
    """ports/queue.py without a broker: `drain` delivers. While `down` is set, sending fails."""

    def __init__(self, clock: Clock) -> None:
        self.down = False
        self._clock = clock
        self._lock = Lock()
        self._sent: dict[tuple[NodeId, Lane], deque[Job]] = {}

    def send(self, jobs: Sequence[Job]) -> None:
        """See ports/queue.py."""
        if self.down:
            raise Unreachable("broker.unreachable", "the broker does not answer", hint="see: mvm status")
        with self._lock:
            for job in jobs:
                self._sent.setdefault((job.node_id, job.lane), deque()).append(job)

    def waiting(self, queue: str) -> Sequence[Job]:
        """What lies in `queue` (see `node_queue`), expired or not, in the order it will be taken."""
        with self._lock:
            return [job for key in self._keys() if node_queue(*key) == queue for job in self._sent[key]]

    def queued(self, node: NodeId) -> frozenset[JobId]:
        """See ports/queue.py."""
        with self._lock:
            return frozenset(job.job_id for key in self._keys() if key[0] == node for job in self._sent[key])

    def speaks_of(self, node: NodeId, task_id: str) -> bool:
        """See ports/queue.py; what was taken is done."""
        with self._lock:
            jobs = [job for key in self._keys() if key[0] == node for job in self._sent[key]]
        return any(names(job, task_id) for job in jobs)

    def discard(self, node: NodeId, jobs: frozenset[JobId]) -> None:
        """See ports/queue.py."""
        with self._lock:
            for key in self._keys():
                if key[0] == node:
                    self._sent[key] = deque(job for job in self._sent[key] if job.job_id not in jobs)

    def drain(self, run: Callable[[Job], object], *, node: NodeId | None = None) -> int:
        """Deliver to `run` until nothing is due (for `node`, if given), also what `run` sends; returns how many.

        Urgent jobs come first and bulk ones last, as a node's workers take them.
        """
        delivered = 0
        while (job := self._take(node)) is not None:
            run(job)
            delivered += 1
        return delivered

    def _keys(self) -> Sequence[tuple[NodeId, Lane]]:
        return sorted(self._sent, key=lambda key: _ORDER.index(key[1]))

    def next_due(self) -> datetime | None:
        """When the next job is due of those that wait for their time."""
        with self._lock:
            times = [job.retry_at for key in self._keys() for job in self._sent[key] if job.retry_at]
        return min(times, default=None)

    def _take(self, node: NodeId | None) -> Job | None:
        with self._lock:
            for key in self._keys():
                if node in (None, key[0]) and (index := self._first_due(key)) is not None:
                    job = self._sent[key][index]
                    del self._sent[key][index]
                    return job
            return None

    def _first_due(self, key: tuple[NodeId, Lane]) -> int | None:
        now = self._clock.now()
        waiting = enumerate(self._sent[key])
        return next((index for index, job in waiting if not job.retry_at or job.retry_at <= now), None)
