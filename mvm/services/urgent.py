"""What cannot wait in a queue: waking an instance for somebody who asks the node's agent."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

import structlog

from mvm.domain.ids import InstanceRef, JobId, NodeId
from mvm.domain.job import Job, JobState, JobVerb, Lane, Reason
from mvm.domain.lifecycle import Status
from mvm.errors import Failed, Unreachable, error_from_dict
from mvm.ports.registry import Registry
from mvm.ports.store import NodeStore
from mvm.services.jobs import Jobs
from mvm.services.precedence import Precedence
from mvm.services.runner import Runner

log = structlog.get_logger("mvm.urgent")


class UrgentWake:
    """Wakes through the same `Runner` as every job, without a broker; one flight per instance at a time."""

    def __init__(
        self, store: NodeStore, registry: Registry, jobs: Jobs, runner: Runner, precedence: Precedence, node_id: NodeId
    ) -> None:  # fmt: skip
        self._store = store
        self._registry = registry
        self._jobs = jobs
        self._runner = runner
        self._precedence = precedence
        self._node_id = node_id
        self._lock = threading.Lock()
        self._flights: dict[InstanceRef, Future[Mapping[str, Any]]] = {}

    def wake(self, ref: InstanceRef, actor: str) -> Mapping[str, Any]:
        """The instance runs; the job's result, and in ``waited_for`` the job that had to end first.

        Raises the job's error. Who asks while another's wake is under way gets that one's answer.
        """
        with self._lock:
            flight = self._flights.get(ref)
            mine = flight is None
            if flight is None:
                flight = self._flights[ref] = Future()
        if not mine:
            return flight.result()
        try:
            answer = self._wake(ref, actor)
        except BaseException as error:
            flight.set_exception(error)
            raise
        else:
            flight.set_result(answer)
            return answer
        finally:
            with self._lock:
                del self._flights[ref]

    def take_up(self) -> None:
        """Finish what this node's agent had begun when it was killed: nobody delivers these jobs again."""
        for job in self._store.unfinished_jobs():
            if job.reason is Reason.URGENT:
                log.warning("took over what a killed agent left", job_id=job.job_id, subject=job.subject)
                self._run(job)

    def _wake(self, ref: InstanceRef, actor: str) -> Mapping[str, Any]:
        ahead = self._store.instance(ref).in_flight
        final = self._run_new(ref, actor)
        if ahead and final.state is not JobState.SUCCEEDED and self._finish(ahead.job_id):
            final = self._run_new(ref, actor)
        waited_for = str(ahead.job_id) if ahead else None
        if final.state is JobState.SUCCEEDED:
            return {"job_id": str(final.job_id), "waited_for": waited_for, **(final.result or {})}
        if ahead and self._store.instance(ref).status is Status.RUNNING:  # the job ahead brought it here
            return {"job_id": str(ahead.job_id), "waited_for": waited_for, "ref": str(ref), "status": "running"}
        raise error_from_dict(final.error or Failed("job.failed", "no reason was recorded").to_dict())

    def _finish(self, job_id: JobId) -> bool:
        """Bring a job to its end whose worker was killed: what it left half done is no state to answer from."""
        job = self._store.job(job_id)
        if job is None or job.state.final:
            return False
        log.warning("took over what a killed worker left", job_id=job_id, subject=job.subject)
        self._runner.run(job)
        return True

    def _run_new(self, ref: InstanceRef, actor: str) -> Job:
        verb, node = JobVerb.INSTANCE_WAKE, self._node_id
        return self._run(self._jobs.new(verb, str(ref), node, reason=Reason.URGENT, actor=actor, lane=Lane.URGENT))

    def _run(self, job: Job) -> Job:
        with self._precedence.taken():
            final = self._runner.run(job)
        try:
            # As one that runs: nobody may cancel in between what has been done.
            self._registry.record([job.with_(state=JobState.RUNNING, started_at=final.started_at)])
            self._registry.update(final)
        except Unreachable as error:  # the node's own record is enough
            log.warning("not listed", job_id=job.job_id, error=error.message)
        return final
