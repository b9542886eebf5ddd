"""Bringing pools to their desired counts: load, plan, submit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import structlog

from mvm.domain.ids import InstanceRef, JobId, NodeId
from mvm.domain.instance import InFlight, Instance
from mvm.domain.job import Job, JobVerb, Reason
from mvm.domain.lifecycle import Verb
from mvm.domain.planner import Create, plan
from mvm.domain.pool import WorkerPool
from mvm.errors import QuotaExceeded
from mvm.ports.registry import Registry
from mvm.ports.store import NodeStore
from mvm.services.jobs import Jobs
from mvm.services.lifecycle import Lifecycle
from mvm.services.runner import JobContext

log = structlog.get_logger("mvm.reconcile")

_JOB_VERBS = {Verb.START: JobVerb.INSTANCE_START, Verb.STOP: JobVerb.INSTANCE_STOP}
_VERBS = {JobVerb(f"instance.{verb}"): verb for verb in Verb if verb is not Verb.PREPARE}


@dataclass(frozen=True, slots=True)
class Submitted:
    """What one pass asked for: the jobs' ids, and what kept it from asking for more."""

    jobs: tuple[JobId, ...] = ()
    note: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {"jobs": list(self.jobs), "note": self.note}


class Reconcile:
    """Decides with `domain.planner.plan` and submits what it says."""

    def __init__(self, store: NodeStore, registry: Registry, jobs: Jobs, lifecycle: Lifecycle, node_id: NodeId) -> None:
        self._store = store
        self._registry = registry
        self._jobs = jobs
        self._lifecycle = lifecycle
        self._node_id = node_id

    def sweep(self, context: JobContext) -> Mapping[str, Any]:
        """Every pool of this node."""
        pools, asked = self._store.pools(), []
        for done, pool in enumerate(pools):
            context.step(str(pool.ref), done, len(pools))
            submitted = self.pool(pool, context.job, actor="reconcile")
            if submitted.jobs or submitted.note:
                asked.append({"pool": str(pool.ref), **submitted.to_dict()})
        return {"changed": any(entry["jobs"] for entry in asked), "pools": asked}

    def pool(self, pool: WorkerPool, job: Job, *, actor: str) -> Submitted:
        """One pool. Jobs that wait in a queue count where they will land, so a second pass adds nothing."""
        actions = plan(pool, self._observed(pool))
        if not actions:
            return Submitted()
        if pool.revision is None:
            return Submitted(note=f"no image yet: mvm pool build {pool.ref}")
        wanted: list[tuple[InstanceRef, Verb]] = []
        note = None
        for action in actions:
            if isinstance(action, Create):
                try:
                    created = self._lifecycle.add(action.pool, action.count, job)
                except QuotaExceeded as error:
                    note = error.message
                    log.warning("cannot create", pool=str(pool.ref), error=error.message)
                    continue
                wanted += [(instance.ref, Verb.START) for instance in created]
            else:
                wanted.append((action.ref, action.verb))
        jobs = [
            self._jobs.submit(_JOB_VERBS[verb], str(ref), self._node_id, reason=Reason.RECONCILE, actor=actor).job_id
            for ref, verb in wanted
        ]
        log.info("submitted", pool=str(pool.ref), jobs=len(jobs))
        return Submitted(tuple(jobs), note)

    def _observed(self, pool: WorkerPool) -> Sequence[Instance]:
        queued = {
            job.subject: InFlight(job.job_id, _VERBS[job.verb])
            for job in self._registry.open_jobs(self._node_id)
            if job.verb in _VERBS
        }
        return [
            replace(i, in_flight=i.in_flight or queued.get(str(i.ref))) for i in self._store.instances(pool=pool.ref)
        ]
