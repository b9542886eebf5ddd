"""Values for tests, each with what the test does not care about filled in."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any

from mvm.domain.ids import InstanceId, InstanceRef, JobId, NodeId, PoolId, PoolRef, TenantId
from mvm.domain.job import Job, JobState, JobVerb, Progress, Reason

NODE = NodeId("n1")
START = datetime.now(UTC).replace(microsecond=0)
"""When everything was submitted; recent, because a registry forgets what is old."""
ACME = TenantId("acme")
WEB = PoolRef(ACME, PoolId("web"))

_serial = count(1)


def instance_ref(number: int = 1, pool: PoolRef = WEB) -> InstanceRef:
    return pool.instance(InstanceId(f"i-{number:08x}"))


def job(**changes: Any) -> Job:
    """A queued job, newer than every one made before it."""
    serial = next(_serial)
    at = START + timedelta(milliseconds=serial)
    made = Job(
        job_id=JobId.make(int(at.timestamp() * 1000), serial.to_bytes(5, "big")),
        verb=JobVerb.INSTANCE_START,
        subject=str(instance_ref(serial)),
        node_id=NODE,
        actor="tester",
        reason=Reason.MANUAL,
        submitted_at=at,
    )
    return made.with_(**changes)


def bulk(children: int, *, parallel: int | None = None, **changes: Any) -> tuple[Job, Sequence[Job]]:
    """A bulk job that runs, and its queued children."""
    parent = job(
        verb=JobVerb.BULK, subject=str(WEB), state=JobState.RUNNING, started_at=START,
        params={"parallel": parallel or children}, progress=Progress(total=children),
    ).with_(**changes)  # fmt: skip
    return parent, [job(parent=parent.job_id) for _ in range(children)]


def ended(what: Job, state: JobState = JobState.SUCCEEDED) -> Job:
    return what.with_(state=state, finished_at=START + timedelta(seconds=5))
