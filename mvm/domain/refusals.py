"""Errors that more than one room raises, so that each has one wording."""

from __future__ import annotations

from collections.abc import Sequence

from mvm.domain.ids import InstanceRef, TenantId
from mvm.domain.job import Job
from mvm.errors import Failed, GuestGone, GuestRefused, GuestSilent, NotAllowed, NotFound, Unreachable

_LISTS = {"tenant": "mvm tenant list", "pool": "mvm pool list", "instance": "mvm instance list"}


def not_found(what: str, name: object) -> NotFound:
    """A ``tenant``, ``pool`` or ``instance`` that does not exist: ``<what>.not_found``."""
    return NotFound(
        f"{what}.not_found", f"there is no {what} {name}", hint=f"see: {_LISTS[what]}", field=what, value=str(name)
    )


def job_not_found(job_id: str) -> NotFound:
    """A job nobody knows."""
    return NotFound("job.not_found", f"there is no job {job_id}", hint="see: mvm job list", field="job", value=job_id)


def id_used(known: Job) -> NotAllowed:
    """A job's id with other words than that job's."""
    return NotAllowed(
        "job.id_used", f"{known.job_id} is the id of a job that asks for something else: {known.verb} {known.subject}",
        hint=f"leave task_id out, or choose another one; see: mvm job show {known.job_id}", field="task_id",
        value=str(known.job_id),
    )  # fmt: skip


def out_of_memory(ref: InstanceRef) -> Failed:
    """Its VMM wanted more memory than its guest's and its own share, and the host's kernel ended it."""
    return Failed(
        "vmm.out_of_memory", f"the VMM of {ref} reached its memory limit and was ended by the host's kernel",
        hint=f"see: mvm instance explain {ref}", subject=str(ref),
    )  # fmt: skip


def out_of_room(ref: InstanceRef) -> Unreachable:
    """Its VMM has paused it, since what it writes finds no room on the host's disk."""
    return Unreachable(
        "vmm.io_error", f"the guest of {ref} stands still: the host's disk is full, so its VMM has paused it",
        hint="make room: mvm disk report, mvm disk clean; it then goes on by itself", subject=str(ref),
    )  # fmt: skip


def tenant_exists(tenant: TenantId) -> NotAllowed:
    """A tenant id that is taken."""
    return NotAllowed(
        "tenant.exists", f"tenant {tenant} exists already", hint=f"see: mvm tenant info {tenant}",
        field="tenant", value=str(tenant),
    )  # fmt: skip


def guest_gone(ref: InstanceRef) -> GuestGone:
    """Nobody can answer."""
    return GuestGone(
        "guest.gone", f"the VMM of {ref} does not run", hint=f"see: mvm instance info {ref}", subject=str(ref)
    )


def guest_silent(ref: InstanceRef) -> GuestSilent:
    """It has not answered by the deadline."""
    return GuestSilent(
        "guest.silent", f"the guest of {ref} did not answer in time",
        hint=f"its console may tell why: mvm instance logs {ref}", subject=str(ref),
    )  # fmt: skip


def guest_refused(ref: InstanceRef, words: str, missing: Sequence[str] = ()) -> GuestRefused:
    """It answered, but not as it should; `missing` are the parts of a request that it has not acknowledged."""
    return GuestRefused(
        "guest.refused", f"the guest of {ref} refused: {words[:500]}",
        hint=f"its console may tell more: mvm instance logs {ref}", subject=str(ref), missing=list(missing),
    )  # fmt: skip
