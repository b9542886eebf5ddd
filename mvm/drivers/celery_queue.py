"""Sends jobs as Celery messages, by task name.

Celery's task message (protocol 2) in kombu's envelope for Redis, written here because importing Celery takes
longer than everything else a command does. A test holds each field against what Celery itself sends, and
real workers consume it. Sources: the "Message Protocol" page of Celery's documentation; kombu.transport.redis.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import socket
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from mvm.domain.ids import JobId, NodeId
from mvm.domain.job import Job, Lane
from mvm.drivers.redis_link import RedisLink
from mvm.errors import InvalidInput
from mvm.ports.queue import node_queue

# kombu keeps one list per priority step; 0 is the highest and has no suffix.
PRIORITY_STEPS = (0, 3, 6, 9)
PRIORITY_SEPARATOR = "\x06\x16"
_PRIORITY = {Lane.URGENT: 0, Lane.NORMAL: 3, Lane.BULK: 9}
_BATCH = 500
ROLES = ("main", "urgent")
"""A node's workers."""


def unacked_key(node: NodeId, role: str) -> str:
    """Where kombu keeps what a worker has taken and not done. Of that worker alone, so that its successor can take over
    at once what it left.
    """
    return f"mvm:unacked:{node}:{role}"


def priority_of(lane: Lane) -> int:
    """Of messages: 0 overtakes all others."""
    return _PRIORITY[lane]


def queue_key(job: Job) -> str:
    """The Redis list a job waits in."""
    priority = _PRIORITY[job.lane]
    name = node_queue(job.node_id, job.lane)
    return f"{name}{PRIORITY_SEPARATOR}{priority}" if priority else name


def task_message(job: Job) -> dict[str, Any]:
    """The envelope of `job`, ready to be dumped as JSON."""
    kwargs = task_kwargs(job)
    canvas = job.canvas or {}
    following = {name: canvas.get(name) for name in ("callbacks", "errbacks", "chain", "chord")}
    body: tuple[list[Any], dict[str, Any], dict[str, Any]] = ([], kwargs, following)
    headers: dict[str, Any] = {
        "lang": "py",
        "task": job.verb.task_name,
        "id": job.job_id,
        "shadow": None,
        "eta": job.retry_at.isoformat() if job.retry_at else None,
        "expires": None,  # ours: a worker that drops a message for its age drops what is sent again, too
        "group": canvas.get("group"),
        "group_index": canvas.get("group_index"),
        "retries": job.attempt,
        "timelimit": [None, None],
        "root_id": canvas.get("root_id") or job.parent or job.job_id,
        "parent_id": canvas.get("parent_id") or job.parent,
        "argsrepr": "()",
        "kwargsrepr": readable(kwargs),
        "origin": f"{os.getpid()}@{socket.gethostname()}",
        "ignore_result": job.canvas is None,
        "replaced_task_nesting": 0,
        "stamped_headers": None,
        "stamps": {},
    }
    properties = {
        "correlation_id": job.job_id,
        "reply_to": "",
        "delivery_mode": 2,
        "delivery_info": {"exchange": "", "routing_key": node_queue(job.node_id, job.lane)},
        "priority": _PRIORITY[job.lane],
        "body_encoding": "base64",
        "delivery_tag": secrets.token_hex(16),
    }
    _announce("before_task_publish", body, headers, declare=[], properties=properties, retry_policy={})
    return {
        "body": base64.b64encode(json.dumps(body).encode()).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": headers,
        "properties": properties,
    }


def _announce(name: str, body: Any, headers: dict[str, Any], **more: Any) -> None:
    """Celery's signal `name`, for those who listen to it in this process: they may add to the headers."""
    if not _heard(name):
        return
    queue = node_queue(body[1]["node"], Lane(body[1]["lane"]))
    getattr(sys.modules["celery.signals"], name).send(
        sender=headers["task"], body=body, exchange="", routing_key=queue, headers=headers, **more
    )


def _heard(name: str) -> bool:
    """Whether anybody listens to this signal; where nobody has imported Celery's, nobody does."""
    signals = sys.modules.get("celery.signals")
    return signals is not None and bool(getattr(signals, name).receivers)


def task_kwargs(job: Job) -> dict[str, Any]:
    """A job as keyword arguments; its id and verb are the task's own. What is None is left out."""
    kwargs = {
        "subject": job.subject,
        "node": str(job.node_id),
        "reason": job.reason.value,
        "actor": job.actor,
        "submitted_at": job.submitted_at.isoformat(),
        "params": dict(job.params) or None,
        "parent": job.parent,
        "retry_of": job.retry_of,
        "lane": job.lane.value,
        "expires_at": job.expires_at.isoformat() if job.expires_at else None,
    }
    return {name: value for name, value in kwargs.items() if value is not None}


def readable(kwargs: dict[str, Any]) -> str:
    """What Flower shows: subject and params first, the rest as Python prints it."""
    shown = {k: kwargs[k] for k in ("subject", "params", "reason", "actor", "node", "parent") if k in kwargs}
    return repr(shown)


class CeleryQueue:
    """ports/queue.py over the broker's Redis."""

    def __init__(self, link: RedisLink) -> None:
        self._link = link

    def send(self, jobs: Sequence[Job]) -> None:
        """See ports/queue.py."""
        for start in range(0, len(jobs), _BATCH):
            batch = [(queue_key(job), task_message(job)) for job in jobs[start : start + _BATCH]]
            self._link.pipeline([("LPUSH", key, json.dumps(message)) for key, message in batch])
            if _heard("after_task_publish"):
                for _, message in batch:
                    _announce("after_task_publish", json.loads(base64.b64decode(message["body"])), message["headers"])

    def queued(self, node: NodeId) -> frozenset[JobId]:
        """See ports/queue.py."""
        return frozenset(job_id for _, _, job_id in self._waiting(node))

    def speaks_of(self, node: NodeId, task_id: str) -> bool:
        """See ports/queue.py."""
        waiting, taken = _queue_keys(node), [unacked_key(node, role) for role in ROLES]
        asked = [("LRANGE", key, 0, -1) for key in waiting] + [("HVALS", key) for key in taken]
        return any(_names(raw, task_id) for raws in self._link.pipeline(asked) for raw in raws)

    def discard(self, node: NodeId, jobs: frozenset[JobId]) -> None:
        """See ports/queue.py."""
        drops = [("LREM", key, 0, raw) for key, raw, job_id in self._waiting(node) if job_id in jobs]
        for start in range(0, len(drops), _BATCH):
            self._link.pipeline(drops[start : start + _BATCH])

    def _waiting(self, node: NodeId) -> Iterator[tuple[str, bytes, JobId]]:
        """Each message in the node's queues: the list's key, the message, its job."""
        keys = _queue_keys(node)
        lists = self._link.pipeline([("LRANGE", key, 0, -1) for key in keys])
        for key, raws in zip(keys, lists, strict=True):
            for raw in raws:
                job_id = _job_of(raw)
                if job_id is not None:
                    yield key, raw, job_id


def _queue_keys(node: NodeId) -> Sequence[str]:
    names = {node_queue(node, lane) for lane in Lane}
    return [f"{name}{PRIORITY_SEPARATOR}{p}" if p else name for name in names for p in PRIORITY_STEPS]


def _names(raw: bytes, task_id: str) -> bool:
    """Whether a message, or what kombu keeps of one that was taken, has the id anywhere in it."""
    sought = task_id.encode()
    if sought in raw:
        return True
    try:
        told = json.loads(raw)
        message = told[0] if isinstance(told, list) else told
        return sought in base64.b64decode(message["body"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return False  # a foreign one, which its worker will set aside


def _job_of(raw: bytes) -> JobId | None:
    """The job that a message is about; None for a foreign one, which its worker will set aside."""
    try:
        return JobId(json.loads(raw)["headers"]["id"])
    except (ValueError, LookupError, TypeError, RecursionError, InvalidInput):
        return None
