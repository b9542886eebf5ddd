"""Jobs: what was asked, by whom, why, and how it went. A *task* is Celery's delivery of a job."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from typing import Any

from mvm.domain.ids import JobId, NodeId


class JobVerb(StrEnum):
    """What a job does. The Celery task's name is ``mvm.`` and this: stable, never a module path."""

    TENANT_CREATE = "tenant.create"
    TENANT_UPDATE = "tenant.update"
    TENANT_DESTROY = "tenant.destroy"
    TENANT_SECRETS = "tenant.secrets"
    POOL_CREATE = "pool.create"
    POOL_UPDATE = "pool.update"
    POOL_BUILD = "pool.build"
    POOL_SCALE = "pool.scale"
    POOL_DESTROY = "pool.destroy"
    INSTANCE_CREATE = "instance.create"
    INSTANCE_START = "instance.start"
    INSTANCE_STOP = "instance.stop"
    INSTANCE_WARM = "instance.warm"
    INSTANCE_SLEEP = "instance.sleep"
    INSTANCE_WAKE = "instance.wake"
    INSTANCE_DESTROY = "instance.destroy"
    NODE_RECONCILE = "node.reconcile"
    NODE_CLEAN = "node.clean"
    SWEEP_STALE_PIDS = "sweep.stale_pids"
    SWEEP_ORPHANS = "sweep.orphans"
    SWEEP_RECONCILE = "sweep.reconcile"
    SWEEP_IDLENESS = "sweep.idleness"
    SWEEP_DISK = "sweep.disk"
    SWEEP_HEALTH = "sweep.health"
    BULK = "bulk"  # a parent: no task of its own, it ends with its last child

    @property
    def task_name(self) -> str:
        """The Celery task's name."""
        return f"mvm.{self.value}"

    @property
    def is_sweep(self) -> bool:
        """Whether Beat asks for it, on every live node."""
        return self.value.startswith("sweep.")


class JobState(StrEnum):
    """Where a job is; the last three are final."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        """Whether nothing more will happen to it."""
        return self not in (JobState.QUEUED, JobState.RUNNING)


class Reason(StrEnum):
    """Why a job was asked for."""

    MANUAL = "manual"
    RECONCILE = "reconcile"
    SWEEP = "sweep"
    SHUTDOWN = "shutdown"
    URGENT = "urgent"
    SLEEP_POLICY = "sleep policy"


class Lane(StrEnum):
    """How a job is queued on its node. Urgent work has a worker of its own; bulk gives way."""

    URGENT = "urgent"
    NORMAL = "normal"
    BULK = "bulk"


_URGENT = frozenset({JobVerb.INSTANCE_STOP, JobVerb.INSTANCE_DESTROY})


def lane_of(verb: JobVerb, *, bulk: bool) -> Lane:
    """Sweeps, and single stops and destroys (they free what others wait for), overtake what is queued."""
    if bulk:
        return Lane.BULK
    return Lane.URGENT if verb.is_sweep or verb in _URGENT else Lane.NORMAL


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a job is: steps done of `total`, or children done (and failed among them) of `total`."""

    done: int = 0
    total: int = 0
    failed: int = 0

    def to_dict(self) -> dict[str, int]:
        """JSON form."""
        return {"done": self.done, "total": self.total, "failed": self.failed}


@dataclass(frozen=True, slots=True)
class Job:
    """One job. `params` are JSON values without secrets; `error` is `MvmError.to_dict`'s form.

    `attempt` counts the tries begun, of `attempts` that it has; `deaths` how often a worker died in it. Each try that
    failed and each death is one of `setbacks` (``at, code, message``). It is tried again at `retry_at`; the try under
    way ends at `deadline_at`; what nobody has taken at `expires_at` is dropped. `retry_of` is the job it repeats.
    `canvas` is what Celery has joined to its task (`mvm.domain.canvas`), `worker` the process that began it last.
    """

    job_id: JobId
    verb: JobVerb
    subject: str
    node_id: NodeId
    actor: str
    reason: Reason
    submitted_at: datetime
    params: Mapping[str, Any] = field(default_factory=dict)
    lane: Lane = Lane.NORMAL
    state: JobState = JobState.QUEUED
    step: str | None = None
    progress: Progress = Progress()
    error: Mapping[str, Any] | None = None
    result: Mapping[str, Any] | None = None
    parent: JobId | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    attempt: int = 0
    attempts: int = 1
    deaths: int = 0
    setbacks: tuple[Mapping[str, str], ...] = ()
    retry_at: datetime | None = None
    deadline_at: datetime | None = None
    expires_at: datetime | None = None
    retry_of: JobId | None = None
    canvas: Mapping[str, Any] | None = None
    worker: str | None = None
    _json: list[str] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def run(self) -> int:
        """Grows whenever the job is begun: who began it before has no say any more."""
        return self.attempt + self.deaths

    def asks_as(self, other: Job) -> bool:
        """Whether both ask for the same: whoever asks again by the same id is given the same job."""
        mine, theirs = (json.dumps(dict(job.params), sort_keys=True) for job in (self, other))
        return (self.verb, self.subject, mine) == (other.verb, other.subject, theirs)

    def with_(self, **changes: Any) -> Job:
        """A copy with `changes`."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """JSON form: the fields of the command line's contract, and ``params`` and ``lane``."""
        return {
            "job_id": str(self.job_id),
            "verb": self.verb.value,
            "subject": self.subject,
            "node_id": str(self.node_id),
            "actor": self.actor,
            "reason": self.reason.value,
            "state": self.state.value,
            "step": self.step,
            "progress": self.progress.to_dict(),
            "error": dict(self.error) if self.error is not None else None,
            "result": dict(self.result) if self.result is not None else None,
            "parent": self.parent,
            "submitted_at": self.submitted_at.isoformat(),
            "started_at": _iso(self.started_at),
            "finished_at": _iso(self.finished_at),
            "params": dict(self.params),
            "lane": self.lane.value,
            "attempt": self.attempt,
            "attempts": self.attempts,
            "deaths": self.deaths,
            "setbacks": [dict(setback) for setback in self.setbacks],
            "retry_at": _iso(self.retry_at),
            "deadline_at": _iso(self.deadline_at),
            "expires_at": _iso(self.expires_at),
            "retry_of": self.retry_of,
            **({"canvas": dict(self.canvas)} if self.canvas else {}),
            **({"worker": self.worker} if self.worker else {}),
        }

    def to_json(self) -> str:
        """`to_dict` as text, made once: each state is written into the store and into the registry."""
        if not self._json:
            self._json.append(json.dumps(self.to_dict()))
        return self._json[0]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Job:
        """Inverse of `to_dict`."""
        progress = data.get("progress") or {}
        return cls(
            job_id=JobId(data["job_id"]),
            verb=JobVerb(data["verb"]),
            subject=data["subject"],
            node_id=NodeId(data["node_id"]),
            actor=data["actor"],
            reason=Reason(data["reason"]),
            submitted_at=datetime.fromisoformat(data["submitted_at"]),
            params=data.get("params") or {},
            lane=Lane(data.get("lane", Lane.NORMAL)),
            state=JobState(data.get("state", JobState.QUEUED)),
            step=data.get("step"),
            progress=Progress(**progress),
            error=data.get("error"),
            result=data.get("result"),
            parent=JobId(data["parent"]) if data.get("parent") else None,
            started_at=_time(data.get("started_at")),
            finished_at=_time(data.get("finished_at")),
            attempt=data.get("attempt", 0),
            attempts=data.get("attempts", 1),
            deaths=data.get("deaths", 0),
            setbacks=tuple(data.get("setbacks") or ()),
            retry_at=_time(data.get("retry_at")),
            deadline_at=_time(data.get("deadline_at")),
            expires_at=_time(data.get("expires_at")),
            retry_of=JobId(data["retry_of"]) if data.get("retry_of") else None,
            canvas=data.get("canvas"),
            worker=data.get("worker"),
        )


def by_age(job: Job) -> tuple[datetime, JobId]:
    """Sorts jobs by the time at which they were asked for; ids of Celery's do not."""
    return job.submitted_at, job.job_id


def _iso(when: datetime | None) -> str | None:
    return when.isoformat() if when else None


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None
