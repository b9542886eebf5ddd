"""Sweep tasks, and what a person asks for of a whole node."""

from __future__ import annotations

from mvm.domain.job import JobVerb
from workers.base import job_task

stale_pids = job_task(JobVerb.SWEEP_STALE_PIDS)
orphans = job_task(JobVerb.SWEEP_ORPHANS)
reconcile = job_task(JobVerb.SWEEP_RECONCILE)
idleness = job_task(JobVerb.SWEEP_IDLENESS)
disk = job_task(JobVerb.SWEEP_DISK)
health = job_task(JobVerb.SWEEP_HEALTH)
node_reconcile = job_task(JobVerb.NODE_RECONCILE)
clean = job_task(JobVerb.NODE_CLEAN)
