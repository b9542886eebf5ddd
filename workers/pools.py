"""Pool tasks."""

from __future__ import annotations

from typing import Any

from mvm.domain.job import JobVerb
from workers.app import app
from workers.base import JobTask


@app.task(base=JobTask, bind=True, name=JobVerb.POOL_CREATE.task_name)
def create(self: JobTask, **job: Any) -> str:
    """See the service."""
    return self.run_job(job)


@app.task(base=JobTask, bind=True, name=JobVerb.POOL_UPDATE.task_name)
def update(self: JobTask, **job: Any) -> str:
    """See the service."""
    return self.run_job(job)


@app.task(base=JobTask, bind=True, name=JobVerb.POOL_BUILD.task_name)
def build(self: JobTask, **job: Any) -> str:
    """See the service."""
    return self.run_job(job)


@app.task(base=JobTask, bind=True, name=JobVerb.POOL_SCALE.task_name)
def scale(self: JobTask, **job: Any) -> str:
    """See the service."""
    return self.run_job(job)


@app.task(base=JobTask, bind=True, name=JobVerb.POOL_DESTROY.task_name)
def destroy(self: JobTask, **job: Any) -> str:
    """See the service."""
    return self.run_job(job)
