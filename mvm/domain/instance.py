"""Instances: one microVM each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, NamedTuple

from mvm.domain.ids import InstanceRef, JobId, NodeId, Revision
from mvm.domain.lifecycle import TRANSITIONS, Status, Verb
from mvm.domain.vmm import Ending, VmmState


class ProcessIdentity(NamedTuple):
    """A process: its pid *and* its start time, in clock ticks since boot (field 22 of /proc/PID/stat).

    A pid alone is reused; the pair is not, within one boot.
    """

    pid: int
    start_ticks: int


class InFlight(NamedTuple):
    """The job that holds an instance now."""

    job_id: JobId
    verb: Verb


@dataclass(frozen=True, slots=True)
class Instance:
    """What the node's store says of one instance.

    `generation` grows by one with every write; a write names the generation it read (compare-and-set).
    `offset` is its place in the tenant's subnet; addresses derive from it. `cloned` says that it began as a clone of
    its pool's template at `revision`, and not by a boot. `lease` grows whenever a job takes it: who had it before may
    not act on it any more. Until `manual_override_until` it stays as a person left it, who spoke at
    `manual_override_at`: reconcile does not touch it, unless its pool was scaled since (`held_until`). `ended` says
    how its last run did, if nobody here ended it; `stalled` what its VMM says, if its guest stands still though it
    should run.
    """

    ref: InstanceRef
    node_id: NodeId
    offset: int
    status: Status
    created_at: datetime
    generation: int = 0
    revision: Revision | None = None
    cloned: bool = False
    process: ProcessIdentity | None = None
    in_flight: InFlight | None = None
    last_error: str | None = None
    last_started_at: datetime | None = None
    last_stopped_at: datetime | None = None
    manual_override_until: datetime | None = None
    manual_override_at: datetime | None = None
    lease: int = 0
    ended: Ending | None = None
    stalled: VmmState | None = None

    @property
    def lands_on(self) -> Status:
        """Where it rests once its job, if it has one, has succeeded."""
        if self.in_flight is None:
            return self.status
        return TRANSITIONS.get((self.status, self.in_flight.verb), self.status)

    def held_until(self, now: datetime, scaled_at: datetime | None = None) -> datetime | None:
        """Until when it stays as a person left it, in a pool that was scaled at `scaled_at`; None: nothing holds it.

        Whoever scales a pool speaks of all its instances, and the last word counts.
        """
        until, spoke = self.manual_override_until, self.manual_override_at
        if until is None or until <= now:
            return None
        if scaled_at is not None and (spoke is None or spoke <= scaled_at):
            return None
        return until

    @property
    def has_vmm(self) -> bool:
        """Whether it rests with a VMM."""
        return self.status.has_vmm

    @property
    def may_have_vmm(self) -> bool:
        """Whether there may be a VMM, or something of one: it rests with one, or a job is at it."""
        return self.has_vmm or self.in_flight is not None

    @property
    def run(self) -> str:
        """Names the time since it was last started or woken."""
        return _iso(self.last_started_at) or ""

    def moved(self, to: Status, **changes: Any) -> Instance:
        """A copy that rests at `to`, with no job in flight; how an earlier run went is of the past."""
        return replace(self, **{"status": to, "in_flight": None, "ended": None, "stalled": None, **changes})

    def to_dict(self) -> dict[str, Any]:
        """JSON form, as stored."""
        return {
            "ref": str(self.ref),
            "node_id": str(self.node_id),
            "offset": self.offset,
            "status": self.status.value,
            "created_at": self.created_at.isoformat(),
            "revision": self.revision,
            "cloned": self.cloned,
            "process": list(self.process) if self.process else None,
            "in_flight": [str(self.in_flight.job_id), self.in_flight.verb.value] if self.in_flight else None,
            "last_error": self.last_error,
            "last_started_at": _iso(self.last_started_at),
            "last_stopped_at": _iso(self.last_stopped_at),
            "manual_override_until": _iso(self.manual_override_until),
            "manual_override_at": _iso(self.manual_override_at),
            "lease": self.lease,
            "ended": self.ended.value if self.ended else None,
            "stalled": self.stalled.value if self.stalled else None,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], generation: int) -> Instance:
        """Inverse of `to_dict`; the generation is a column of its own."""
        in_flight = data["in_flight"]
        return cls(
            ref=InstanceRef.parse(data["ref"]),
            node_id=NodeId(data["node_id"]),
            offset=data["offset"],
            status=Status(data["status"]),
            created_at=datetime.fromisoformat(data["created_at"]),
            generation=generation,
            revision=Revision(data["revision"]) if data["revision"] else None,
            cloned=data.get("cloned", False),
            process=ProcessIdentity(*data["process"]) if data["process"] else None,
            in_flight=InFlight(JobId(in_flight[0]), Verb(in_flight[1])) if in_flight else None,
            last_error=data["last_error"],
            last_started_at=_time(data["last_started_at"]),
            last_stopped_at=_time(data["last_stopped_at"]),
            manual_override_until=_time(data.get("manual_override_until")),
            manual_override_at=_time(data.get("manual_override_at")),
            lease=data.get("lease", 0),
            ended=Ending(data["ended"]) if data.get("ended") else None,
            stalled=VmmState(data["stalled"]) if data.get("stalled") else None,
        )


def _iso(when: datetime | None) -> str | None:
    return when.isoformat() if when else None


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None
