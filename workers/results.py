"""Celery's result backend over the records of jobs: it reads them, and writes nothing of its own.

A job's record is the truth about it. So what Celery would store is dropped, a revoke cancels the job, and what can
never become a job is noted for whoever waits for it (`Registry.refuse`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from celery import exceptions, states
from celery.backends.base import BaseBackend

from mvm.domain.ids import JobId
from mvm.domain.job import Job, JobState
from mvm.domain.refusals import job_not_found
from mvm.errors import Cancelled, Failed, InvalidInput, MvmError, NotAllowed, NotFound, TimedOut, error_from_dict
from mvm.services.jobs import Jobs

_STATES = {
    JobState.RUNNING: states.STARTED,
    JobState.SUCCEEDED: states.SUCCESS,
    JobState.FAILED: states.FAILURE,
    JobState.CANCELLED: states.REVOKED,
}

_LOOK_S = 0.2


class JobRevoked(Cancelled, exceptions.TaskRevokedError):  # type: ignore[misc]
    """A cancelled job, as Celery's users catch it."""


def state_of(job: Job) -> str:
    """Celery's name of a job's state."""
    if job.state is JobState.QUEUED:
        return str(states.RETRY if job.setbacks else states.PENDING)
    return str(_STATES[job.state])


def error_of(told: Mapping[str, Any] | None) -> MvmError:
    """The error that a job ended with, as ``get`` raises it."""
    if told is None:
        return JobRevoked("job.cancelled", "it was cancelled before it began")
    error = error_from_dict(told)
    if not isinstance(error, Cancelled) and error.code != "job.expired":
        return error
    return JobRevoked(error.code, error.message, hint=error.hint, **error.fields)


class JobResults(BaseBackend):  # type: ignore[misc]
    """What Celery asks of a result backend. Nothing is stored by it, so nothing expires but jobs themselves."""

    supports_autoexpire = True
    unheard_of_s = 5.0
    """How long a task may be one of which nobody has heard: between a link's end and the message of the next, it is."""

    @property
    def _jobs(self) -> Jobs:
        jobs: Jobs = self.app.jobs
        return jobs

    def as_uri(self, include_password: bool = False) -> str:
        """Where results are: with the jobs."""
        return "mvm jobs"

    def _get_task_meta_for(self, task_id: str) -> dict[str, Any]:
        try:
            job = self._jobs.find(JobId(task_id))
        except InvalidInput:  # no job has such an id
            job = None
        if job is not None:
            return _meta(job)
        refusal = self._jobs.refusal(task_id)
        if refusal is None:
            return {"task_id": task_id, "status": states.PENDING, "result": None}
        error = error_of(refusal.to_dict())
        status = states.REVOKED if isinstance(error, Cancelled) else states.FAILURE
        return {"task_id": task_id, "status": status, "result": error, "traceback": None, "children": []}

    def store_result(
        self, task_id: str, result: Any, state: str, traceback: Any = None, request: Any = None, **_: Any
    ) -> Any:
        """Nothing is stored. A revoke cancels; the end of what never was a job is noted."""
        if state == states.REVOKED:
            from workers.base import cancel

            cancel(task_id)
        elif state == states.FAILURE and self._is_no_job(task_id):
            self._jobs.refuse(task_id, Failed("job.chain_broken", f"what came before it failed: {result}"))
        return result

    def _is_no_job(self, task_id: str) -> bool:
        try:
            return self._jobs.find(JobId(task_id)) is None and self._jobs.refusal(task_id) is None
        except InvalidInput:
            return True

    def wait_for(
        self,
        task_id: str,
        timeout: float | None = None,
        interval: float = 0.5,
        no_ack: bool = True,
        on_interval: Callable[[], Any] | None = None,
    ) -> dict[str, Any]:
        """The job's end, told at once; `on_interval` is called every `interval` seconds at least.

        Raises `NotFound` (``job.not_found``) when there is no such job, and nothing from which it could come.
        """
        end = None if timeout is None else time.monotonic() + timeout
        heard_of = time.monotonic()
        while True:
            meta: dict[str, Any] = self.get_task_meta(task_id)
            if meta["status"] in states.READY_STATES:
                return meta
            if "name" in meta or self._jobs.is_expected(task_id):
                heard_of = time.monotonic()
            elif time.monotonic() - heard_of > self.unheard_of_s:
                raise job_not_found(task_id)
            if on_interval:
                on_interval()
            left = interval if end is None else min(interval, end - time.monotonic())
            if left <= 0:
                raise exceptions.TimeoutError("The operation timed out.")
            self._follow(task_id, left)

    def _follow(self, task_id: str, seconds: float) -> None:
        try:
            for _ in self._jobs.follow([JobId(task_id)], deadline_s=seconds):
                continue
        except (NotFound, InvalidInput):  # not a job yet: nothing tells when it becomes one
            threading.Event().wait(min(seconds, _LOOK_S))
        except TimedOut:
            return

    def _forget(self, task_id: str) -> None:
        raise _read_only("forget")

    def _save_group(self, group_id: str, result: Any) -> Any:
        raise _read_only("save")

    def _restore_group(self, group_id: str) -> Any:
        raise _read_only("restore")

    def _delete_group(self, group_id: str) -> None:
        raise _read_only("delete")

    def forget(self, task_id: str) -> None:
        """Refused: jobs are forgotten by age."""
        self._forget(task_id)

    def cleanup(self) -> None:
        """Jobs are forgotten by age, without Celery's help."""


def _meta(job: Job) -> dict[str, Any]:
    status = state_of(job)
    result: Any = job.result
    if status in states.EXCEPTION_STATES:
        result = _setback(job) if status == states.RETRY else error_of(job.error)
    return {
        "task_id": str(job.job_id),
        "status": status,
        "result": result,
        "traceback": None,
        "children": [],
        "date_done": job.finished_at.isoformat() if job.finished_at else None,
        "name": job.verb.task_name,
        "args": [job.subject],
        "kwargs": dict(job.params),
        "retries": max(0, job.attempt - 1),
        "parent_id": (job.canvas or {}).get("parent_id") or job.parent,
    }


def _setback(job: Job) -> MvmError:
    last = job.setbacks[-1]
    return Failed(last["code"], last["message"])


def _read_only(what: str) -> NotAllowed:
    return NotAllowed(
        "job.read_only", f"results are the jobs' own records: there is no {what} of them", hint="see: mvm job list"
    )
