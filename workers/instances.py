"""Instance tasks."""

from __future__ import annotations

from typing import Any

from mvm.domain.job import JobVerb
from workers.app import app
from workers.base import JobTask


@app.task(base=JobTask, bind=True, name=JobVerb.INSTANCE_CREATE.task_name)
def create(self: JobTask, **job: Any) -> str:
    """See the service."""
    return self.run_job(job)


@app.task(base=JobTask, bind=True, name=JobVerb.INSTANCE_START.task_name)
def start(self: JobTask, **job: Any) -> str:
    """See the service."""
    return self.run_job(job)


@app.task(base=JobTask, bind=True, name=JobVerb.INSTANCE_STOP.task_name)
def stop(self: JobTask, **job: Any) -> str:
    """See the service."""
    return self.run_job(job)


@app.task(base=JobTask, bind=True, name=JobVerb.INSTANCE_DESTROY.task_name)
def destroy(self: JobTask, **job: Any) -> str:
    """See the service."""
    return self.run_job(job)


@app.task(base=JobTask, bind=True, name=JobVerb.INSTANCE_WARM.task_name)
def warm(self: JobTask, **job: Any) -> str:
    """See the service."""
    return self.run_job(job)


@app.task(base=JobTask, bind=True, name=JobVerb.INSTANCE_SLEEP.task_name)
def sleep(self: JobTask, **job: Any) -> str:
    """See the service."""
    return self.run_job(job)


@app.task(base=JobTask, bind=True, name=JobVerb.INSTANCE_WAKE.task_name)
def wake(self: JobTask, **job: Any) -> str:
    """See the service."""
    return self.run_job(job)
