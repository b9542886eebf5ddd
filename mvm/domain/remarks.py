"""What keeps a pool or a tenant from what is asked of it, as values. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from mvm.domain.ids import InstanceRef, PoolRef, TenantId
from mvm.domain.job import JobVerb

_SHOWN = 20  # instances that a remark names in its JSON form


class Cause(StrEnum):
    """The kind of a remark. Programs go by this; the words for people may change."""

    UNDER_WAY = "under_way"
    """Jobs that are queued or run."""

    NEXT_PASS = "next_pass"
    """The next pass asks for it."""

    HELD = "held"
    """A person has changed instances, which stay as they are for a while."""

    QUOTA = "quota"
    """The tenant's quota has no room."""

    POOL_QUOTA = "pool_quota"
    """The tenant's quota has no room for a pool, or is smaller than one instance of it."""

    SUBNET = "subnet"
    """The tenant's subnet has no free address."""

    HOST = "host"
    """The host is smaller than one instance."""

    DISK = "disk"
    """The disk is too full to build an image."""

    NO_IMAGE = "no_image"
    """The pool has no image yet, and nobody has asked for one."""

    NO_UPLINK = "no_uplink"
    """The pool's egress policy needs an uplink, which the node has not."""

    NETWORK = "network"
    """The net id or the subnet of a tenant to be made was given to another one."""

    FAILED = "failed"
    """What was asked for last has failed; it is asked for again after a pause."""

    PINNED = "pinned"
    """The pool is pinned: what is too much stays."""

    CRITICAL = "critical"
    """The pool is critical: what was stopped is not started."""

    CRITICAL_SURPLUS = "critical_surplus"
    """The pool is critical: what is too much stays."""

    CRITICAL_STATES = "critical_states"
    """The pool is critical: as many are up as are wanted, and each stays in the state that it is in."""

    RESTED = "rested"
    """Guests ended by themselves, and the pool lets such instances be."""

    SLEEPLESS = "sleepless"
    """Instances cannot sleep in the run that they are in."""

    HEALTH_CHECK = "health_check"
    """A rollout waits until a new instance has passed a health check."""

    NOT_WELL = "not_well"
    """A rollout has halted: an instance with the new revision is not well."""

    PINNED_REVISION = "pinned_revision"
    """There is no rollout: the pool is pinned, and what is up keeps the revision that it has."""

    NOT_PRUNED = "not_pruned"
    """The pool is not asked for, and may not be destroyed."""

    RESTART = "restart"
    """A new image will restart instances."""

    @property
    def passes(self) -> bool:
        """Whether it is only that work takes its time; that is no news where it is watched."""
        return self in (Cause.UNDER_WAY, Cause.NEXT_PASS)

    @property
    def blocks(self) -> bool:
        """Whether what is asked for cannot be done now, and will be once something else has changed."""
        return self in _BLOCKS

    @property
    def counts(self) -> bool:
        """Whether it keeps a pool from the counts that are asked for."""
        return self not in _NOT_OF_COUNTS


_BLOCKS = (
    Cause.QUOTA,
    Cause.POOL_QUOTA,
    Cause.SUBNET,
    Cause.HOST,
    Cause.DISK,
    Cause.NO_UPLINK,
    Cause.NETWORK,
    Cause.FAILED,
)
_NOT_OF_COUNTS = (Cause.HEALTH_CHECK, Cause.NOT_WELL, Cause.PINNED_REVISION, Cause.NOT_PRUNED, Cause.RESTART)


@dataclass(frozen=True, slots=True)
class Failure:
    """A job that failed, and the code of its error."""

    verb: JobVerb
    subject: str
    code: str

    def __str__(self) -> str:
        return f"{self.verb} of {self.subject} failed [{self.code}]"


@dataclass(frozen=True, slots=True)
class Remark:
    """One cause, and what it is about.

    `count` is how many instances it concerns, `refs` are those of them that are known by name. `limit` names a quota,
    `until` when it ends by itself, `failure` what has failed. `detail` is data that has no form of its own yet, in
    words; what the cause itself says is among the texts.
    """

    subject: TenantId | PoolRef
    cause: Cause
    count: int = 0
    refs: tuple[InstanceRef, ...] = ()
    until: datetime | None = None
    limit: str | None = None
    detail: str = ""
    failure: Failure | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON form; ``text`` is for people."""
        return {
            "subject": str(self.subject),
            "cause": self.cause.value,
            "count": self.count,
            "instances": [str(ref) for ref in self.refs[:_SHOWN]],
            "until": self.until.isoformat() if self.until else None,
            "limit": self.limit,
            "failure": asdict(self.failure) if self.failure else None,
            "text": self.text,
        }

    @property
    def text(self) -> str:
        """A clause for people."""
        if self.cause is Cause.UNDER_WAY and not self.refs:
            return "a job is under way"
        if self.cause is Cause.NEXT_PASS and not self.count:
            return "the next pass destroys it"
        return _TEXTS[self.cause].format(
            count=self.count,
            first=self.refs[0].instance if self.refs else "one",
            until=f"{self.until:%H:%M:%S} UTC" if self.until else "some time",
            limit=self.limit or "quota",
            detail=self.detail,
            pool=self.subject,
            failure=self.failure,
        )

    def __str__(self) -> str:
        return f"{self.subject}: {self.text}"


_TEXTS = {
    Cause.UNDER_WAY: "{count} have a job under way",
    Cause.NEXT_PASS: "{count} are asked for by the next pass",
    Cause.HELD: (
        "{count} stay as a person left them until {until} ({first} first); to end that: mvm pool scale {pool} {detail}"
    ),
    Cause.QUOTA: "{count} more cannot be had: no room in the tenant's quota ({limit})",
    Cause.POOL_QUOTA: "not created: no room in the tenant's quota ({limit})",
    Cause.SUBNET: "{count} more cannot be created: the tenant's subnet has no free address",
    Cause.HOST: "{count} more cannot start: this host has less memory than one of them needs",
    Cause.DISK: "its image is not built: the disk is low; see: mvm disk report",
    Cause.NO_IMAGE: "no image yet: mvm pool build {pool}",
    Cause.NO_UPLINK: "{detail}: its egress needs an uplink, and this node has none (MVM_UPLINK)",
    Cause.NETWORK: "not created: {detail}",
    Cause.FAILED: "{failure}; it is asked for again at {until}",
    Cause.PINNED: "{count} too many are up, and stay: the pool is pinned",
    Cause.CRITICAL: "{count} are stopped, and stay: the pool is critical",
    Cause.CRITICAL_SURPLUS: "{count} too many are up, and stay: the pool is critical",
    Cause.CRITICAL_STATES: "{count} are up in other states than the counts ask for, and stay: the pool is critical",
    Cause.RESTED: "{count} ended by themselves and rest: the pool's on_exit is stop; mvm instance start {pool} --all",
    Cause.SLEEPLESS: "{count} cannot sleep, and stay up: the template they were cloned from is gone",
    Cause.HEALTH_CHECK: "{count} keep another revision until {first} with the new one has passed a health check",
    Cause.NOT_WELL: "{count} keep another revision: {first} with the new revision is not well",
    Cause.PINNED_REVISION: "{count} keep another revision: the pool is pinned",
    Cause.NOT_PRUNED: "not asked for, and stays: {detail}",
    Cause.RESTART: "{count} restart with the new image, {detail}; what they have in memory is lost",
}


def told(remarks: Iterable[Remark]) -> tuple[Remark, ...]:
    """Those that are news: not that work takes its time."""
    return tuple(remark for remark in remarks if not remark.cause.passes)
