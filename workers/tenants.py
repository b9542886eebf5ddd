"""Tenant tasks."""

from __future__ import annotations

from mvm.domain.job import JobVerb
from workers.base import job_task

create = job_task(JobVerb.TENANT_CREATE)
update = job_task(JobVerb.TENANT_UPDATE)
destroy = job_task(JobVerb.TENANT_DESTROY)
secrets = job_task(JobVerb.TENANT_SECRETS)
