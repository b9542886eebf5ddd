"""Instance tasks."""

from __future__ import annotations

from mvm.domain.job import JobVerb
from workers.base import job_task

create = job_task(JobVerb.INSTANCE_CREATE)
start = job_task(JobVerb.INSTANCE_START)
stop = job_task(JobVerb.INSTANCE_STOP)
destroy = job_task(JobVerb.INSTANCE_DESTROY)
warm = job_task(JobVerb.INSTANCE_WARM)
sleep = job_task(JobVerb.INSTANCE_SLEEP)
wake = job_task(JobVerb.INSTANCE_WAKE)
