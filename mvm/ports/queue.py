"""Handing jobs to nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from mvm.domain.ids import JobId, NodeId
from mvm.domain.job import Job, Lane
from mvm.errors import InvalidInput


def node_queue(node: NodeId, lane: Lane = Lane.NORMAL) -> str:
    """The queue of a node's worker, or of its urgent worker."""
    return f"node.{node}.urgent" if lane is Lane.URGENT else f"node.{node}"


def queue_owner(queue: str) -> tuple[NodeId, Lane | None] | None:
    """The inverse: a queue's node and lane, None where it leaves that open; None for another queue."""
    kind, _, rest = queue.partition(".")
    node, _, lane = rest.partition(".")
    try:
        if kind == "node" and lane in ("", Lane.URGENT):
            return NodeId(node), Lane.URGENT if lane else None
    except InvalidInput:
        pass
    return None


class JobQueue(Protocol):
    """Sends recorded jobs to their nodes. Raises `Unreachable` (``broker.unreachable``) within a second."""

    def send(self, jobs: Sequence[Job]) -> None:
        """Send each to its node's queue: delivered at its ``retry_at``, if it has one."""
        ...

    def queued(self, node: NodeId) -> frozenset[JobId]:
        """The jobs whose messages wait in the node's queues; not those that a worker has taken."""
        ...

    def speaks_of(self, node: NodeId, task_id: str) -> bool:
        """Whether a message has this task's id, as its own or as that of one that follows.

        Of those that wait in the node's queues, and those that its workers have taken and not done.
        """
        ...

    def discard(self, node: NodeId, jobs: frozenset[JobId]) -> None:
        """Take these jobs' messages out of the node's queues."""
        ...
