"""What Celery joins to a task, kept with its job: whatever message of the job is sent later has it, too. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mvm.domain.job import Job

FOLLOWING = ("callbacks", "chain", "chord", "group", "group_index")


def names(job: Job, task_id: str) -> bool:
    """Whether the task is the job, or one that is to follow it."""
    return task_id == job.job_id or task_id in json.dumps(job.canvas)


def canvas_of(request: Mapping[str, Any], job_id: str, parent: str | None) -> Mapping[str, Any] | None:
    """What is joined to a task, of its options or its request's fields; None for a job that stands by itself.

    A job's root and parent are its bulk job, or it is its own root: only others are told.
    """
    kept = {name: request[name] for name in FOLLOWING if request.get(name) not in (None, [], ())}
    if request.get("root_id") not in (None, parent or job_id):
        kept["root_id"] = request["root_id"]
    if request.get("parent_id") not in (None, parent):
        kept["parent_id"] = request["parent_id"]
    return kept or None
