"""Pool tasks."""

from __future__ import annotations

from mvm.domain.job import JobVerb
from workers.base import job_task

create = job_task(JobVerb.POOL_CREATE)
update = job_task(JobVerb.POOL_UPDATE)
build = job_task(JobVerb.POOL_BUILD)
scale = job_task(JobVerb.POOL_SCALE)
destroy = job_task(JobVerb.POOL_DESTROY)
