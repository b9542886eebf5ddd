"""The names of the node's locks. Whoever means the same lock asks for its name here.

Locks are files and outlive an upgrade: an mvm of another version that is still at work means the same by a name.
"""

from __future__ import annotations

from typing import Final

from mvm.domain.ids import InstanceRef, JobId, TenantId
from mvm.domain.job import JobVerb
from mvm.domain.pool import ImageSource

BACKUP: Final = "backup"
"""One backup at a time."""
DISK: Final = "disk"
"""Whoever takes room on the disk, until it is written down that it is taken."""
FIREWALL: Final = "firewall"
"""Whoever changes the packet filter."""
IMAGES: Final = "images"
"""Whoever removes revisions, or records one as a pool's."""
MEMBERSHIP: Final = "membership"
"""Whoever takes a tenant or a pool out of the registry and the store."""
NET_PROBES: Final = "net probes"
"""Whoever is in guests' places, and keeps the rules from being repaired meanwhile."""
RECONCILE: Final = "reconcile"
"""Whoever looks at what there is and asks for what lacks."""
SUSPECTS: Final = "suspects"
"""Jobs in which workers have died: one at a time."""
URGENT_WAKES: Final = "urgent wakes"
"""Held while any is under way."""


def instance(ref: InstanceRef) -> str:
    """Whoever changes an instance, or a template by the ref that it is made under."""
    return f"instance {ref}"


def job(job_id: JobId) -> str:
    """Whoever runs a job."""
    return f"job {job_id}"


def sweep(verb: JobVerb) -> str:
    """One sweep of a kind at a time."""
    return f"sweep {verb}"


def build(source: ImageSource) -> str:
    """Whoever builds an image from `source`."""
    return f"build {source.flake_ref} {source.profile}"


def secrets(tenant: TenantId) -> str:
    """Whoever changes a tenant's secrets."""
    return f"secrets {tenant}"


def trail(tenant: TenantId) -> str:
    """Whoever writes to a tenant's audit trail, or has to see it whole."""
    return f"audit {tenant}"


def worker(role: str) -> str:
    """The one worker of the node in this role."""
    return f"worker {role}"
