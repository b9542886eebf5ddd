"""What every task is made of."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from celery import Task
from celery.exceptions import Retry

from mvm.domain.ids import JobId, NodeId
from mvm.domain.job import Job, JobState, JobVerb, Lane, Reason
from mvm.errors import Failed, InvalidInput, MvmError, error_from_dict
from mvm.wiring import NodeServices, open_node
from workers.app import settings

_lock = threading.Lock()
_services: NodeServices | None = None


def services() -> NodeServices:
    """This process's services, wired on first use."""
    global _services
    with _lock:
        if _services is None:
            _services = open_node(settings)
        return _services


class JobTask(Task):  # type: ignore[misc]
    """A task that carries a job: its id is the job's id, its name the job's verb, its arguments the rest.

    The job's own record keeps its error; it is raised here so that Flower shows the task as failed.
    """

    throws = (MvmError,)
    ignore_result = True

    def run_job(self, words: Mapping[str, Any]) -> str:
        """Run the job this task delivers; returns what became of it, for Flower."""
        job = job_of(self.name, self.request.id, words)
        after = services().runner.run(job)
        if after.retry_at is not None and not after.state.final:
            raise Retry(after.setbacks[-1]["message"], when=after.retry_at)  # a message of its next try is on its way
        if after.state is not JobState.SUCCEEDED:
            raise error_from_dict(after.error or Failed("job.failed", "no reason was recorded").to_dict())
        return after.state.value


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
