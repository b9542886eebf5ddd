"""Tenant tasks."""

from __future__ import annotations

from typing import Any

from mvm.domain.job import JobVerb
from workers.app import app
from workers.base import JobTask


@app.task(base=JobTask, bind=True, name=JobVerb.TENANT_CREATE.task_name)
def create(self: JobTask, **job: Any) -> str:
    """See the service."""
    return self.run_job(job)


@app.task(base=JobTask, bind=True, name=JobVerb.TENANT_UPDATE.task_name)
def update(self: JobTask, **job: Any) -> str:
    """See the service."""
    return self.run_job(job)


@app.task(base=JobTask, bind=True, name=JobVerb.TENANT_DESTROY.task_name)
def destroy(self: JobTask, **job: Any) -> str:
    """See the service."""
    return self.run_job(job)


@app.task(base=JobTask, bind=True, name=JobVerb.TENANT_SECRETS.task_name)
def secrets(self: JobTask, **job: Any) -> str:
    """See the service."""
    return self.run_job(job)
