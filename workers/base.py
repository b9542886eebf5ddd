"""What every task is made of."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from celery import Task
from celery.exceptions import Ignore, Retry
from celery.worker.request import Request

from mvm.domain.calls import Call, read_call
from mvm.domain.canvas import canvas_of
from mvm.domain.ids import JobId, NodeId
from mvm.domain.job import Job, JobState, JobVerb, Lane, Reason
from mvm.errors import Cancelled, Failed, InvalidInput, MvmError, NotAllowed, error_from_dict
from mvm.wiring import NodeServices, open_node
from workers.app import app, settings

_lock = threading.Lock()
_services: NodeServices | None = None


def services() -> NodeServices:
    """This process's services, wired on first use."""
    global _services
    with _lock:
        if _services is None:
            _services = open_node(settings)
        return _services


class JobRequest(Request):  # type: ignore[misc]
    """A task as its worker holds it. To terminate it is to cancel its job: there is no process to kill."""

    def terminate(self, pool: Any, signal: Any = None) -> None:
        """``celery control terminate`` and ``revoke(terminate=True)``."""
        cancel(self.id)


class JobTask(Task):  # type: ignore[misc]
    """A task that carries a job: its id is the job's id, its name the job's verb, its arguments the rest.

    The job's own record keeps its error; it is raised here so that Flower shows the task as failed.
    """

    throws = (MvmError,)
    ignore_result = False  # it is in the job's record, which the result backend reads
    Request = JobRequest

    def run_job(self, args: Sequence[Any], words: Mapping[str, Any]) -> Mapping[str, Any]:
        """Run the job this task delivers; returns its result."""
        if self.request.called_directly or self.request.is_eager:
            raise NotAllowed(
                "job.called_directly",
                f"{self.name} is done by its node's worker alone",
                hint="call delay or apply_async",
            )
        job = self._delivered(args, words)
        after = services().runner.run(job)
        if after.retry_at is not None and not after.state.final:
            raise Retry(after.setbacks[-1]["message"], when=after.retry_at)  # a message of its next try is on its way
        if after.state is JobState.CANCELLED:
            self._end_as_revoked(after)
        if after.state is not JobState.SUCCEEDED:
            raise error_from_dict(after.error or Failed("job.failed", "no reason was recorded").to_dict())
        return dict(after.result or {})

    def _delivered(self, args: Sequence[Any], words: Mapping[str, Any]) -> Job:
        """The job that the task's message is about. What cannot be one is refused, and its id tells so."""
        try:
            job_id = JobId(self.request.id)
            canvas = canvas_of(self.request.__dict__, job_id, words.get("parent"))
            if self.request.errbacks:
                raise InvalidInput("job.option_refused", f"{self.name} takes no link_error", hint="see docs/celery.md")
            if "submitted_at" in words:
                return job_of(self.name, job_id, words).with_(canvas=canvas)
            call = read_call(JobVerb(self.name.removeprefix("mvm.")), args, words)
            return app.jobs.accept(self._called(job_id, call).with_(canvas=canvas))
        except InvalidInput as error:
            app.jobs.refuse(self.request.id, error)
            raise

    def _called(self, job_id: JobId, call: Call) -> Job:
        """Sent by another program, which knows nothing of jobs: one is made of it."""
        if call.node not in (None, settings.node):
            raise InvalidInput("job.wrong_node", f"job {job_id} is for node {call.node}, this is {settings.node}")
        job = app.jobs.new(
            call.verb, call.subject, settings.node, params=call.params, actor=call.actor or "celery", lane=call.lane
        )
        return job.with_(job_id=job_id)

    def _end_as_revoked(self, job: Job) -> None:
        """Whoever looks at tasks finds it revoked, and what was to follow it as never asked for."""
        self.send_event("task-revoked", terminated=False, signum=None, expired=False)
        cancelled = Cancelled("job.chain_broken", f"job {job.job_id}, which came before it, was cancelled")
        for link in self.request.chain or ():
            task_id = (link.get("options") or {}).get("task_id")
            if task_id:
                app.jobs.refuse(task_id, cancelled)
        raise Ignore


def job_task(verb: JobVerb) -> JobTask:
    """The task that carries jobs of `verb`."""

    def run(self: JobTask, *args: Any, **words: Any) -> Mapping[str, Any]:
        return self.run_job(args, words)

    run.__doc__ = f"A job {verb}; see docs/celery.md for its words."
    run.__module__ = __name__
    task: JobTask = app.task(run, base=JobTask, bind=True, name=verb.task_name)
    return task


def cancel(task_id: str) -> None:
    """Somebody wants the task gone: its job is cancelled. One that is no job yet never becomes one."""
    try:
        if app.jobs.find(JobId(task_id)) is None:
            app.jobs.refuse(task_id, Cancelled("job.cancelled", "revoked before it became a job"))
        else:
            app.jobs.cancel(JobId(task_id))
    except (InvalidInput, NotAllowed):  # no task of ours, or it has ended
        return


def job_of(task_name: str, task_id: str, words: Mapping[str, Any]) -> Job:
    """The job that a task's name, id and arguments describe. Raises `InvalidInput` for a message not ours."""
    node = NodeId(str(words.get("node", "")))
    if node != settings.node:
        raise InvalidInput("job.wrong_node", f"job {task_id} is for node {node}, this is {settings.node}")
    try:
        return Job(
            job_id=JobId(task_id),
            verb=JobVerb(task_name.removeprefix("mvm.")),
            subject=str(words["subject"]),
            node_id=node,
            actor=str(words["actor"]),
            reason=Reason(words["reason"]),
            submitted_at=datetime.fromisoformat(words["submitted_at"]),
            params=words.get("params") or {},
            lane=Lane(words.get("lane", Lane.NORMAL)),
            parent=JobId(words["parent"]) if words.get("parent") else None,
            expires_at=datetime.fromisoformat(words["expires_at"]) if words.get("expires_at") else None,
            retry_of=JobId(words["retry_of"]) if words.get("retry_of") else None,
        )
    except (KeyError, ValueError, TypeError) as error:
        raise InvalidInput("job.invalid_message", f"the message of job {task_id} is damaged: {error!r}") from None
