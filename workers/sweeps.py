"""Sweep tasks, and what a person asks for of a whole node."""

from __future__ import annotations

from typing import Any

from mvm.domain.job import JobVerb
from workers.app import app
from workers.base import JobTask


@app.task(base=JobTask, bind=True, name=JobVerb.SWEEP_STALE_PIDS.task_name)
def stale_pids(self: JobTask, **job: Any) -> str:
    """See the service."""
    return self.run_job(job)


@app.task(base=JobTask, bind=True, name=JobVerb.SWEEP_ORPHANS.task_name)
def orphans(self: JobTask, **job: Any) -> str:
    """See the service."""
    return self.run_job(job)


@app.task(base=JobTask, bind=True, name=JobVerb.SWEEP_RECONCILE.task_name)
def reconcile(self: JobTask, **job: Any) -> str:
    """See the service."""
    return self.run_job(job)


@app.task(base=JobTask, bind=True, name=JobVerb.NODE_RECONCILE.task_name)
def node_reconcile(self: JobTask, **job: Any) -> str:
    """See the service."""
    return self.run_job(job)


@app.task(base=JobTask, bind=True, name=JobVerb.SWEEP_IDLENESS.task_name)
def idleness(self: JobTask, **job: Any) -> str:
    """See the service."""
    return self.run_job(job)


@app.task(base=JobTask, bind=True, name=JobVerb.SWEEP_DISK.task_name)
def disk(self: JobTask, **job: Any) -> str:
    """See the service."""
    return self.run_job(job)


@app.task(base=JobTask, bind=True, name=JobVerb.NODE_CLEAN.task_name)
def clean(self: JobTask, **job: Any) -> str:
    """See the service."""
    return self.run_job(job)


@app.task(base=JobTask, bind=True, name=JobVerb.SWEEP_HEALTH.task_name)
def health(self: JobTask, **job: Any) -> str:
    """See the service."""
    return self.run_job(job)
