"""Backups: what one says of itself, and how what it holds comes back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from enum import Enum, auto
from hashlib import sha256
from typing import Any, NamedTuple

from mvm.domain.ids import NodeId
from mvm.domain.instance import Instance
from mvm.domain.job import Job, JobState
from mvm.domain.lifecycle import Status
from mvm.domain.migration import refuse_newer
from mvm.errors import Failed, NotAllowed

FORMAT = 1


class Found(Enum):
    """How an instance's disks are when they are copied."""

    ASLEEP = auto()
    """Nobody writes to them, and they belong to its snapshot: it can be woken."""
    AT_REST = auto()
    """Nobody writes to them."""
    LOST = auto()
    """Nobody writes to them; it slept, and what it held in memory cannot be woken any more."""
    IN_USE = auto()
    """Its VMM has them open: they are copied as they are at one instant, and what is in memory only is not kept."""


def found(instance: Instance, *, has_vmm: bool, wakes: bool) -> Found:
    """How the disks of `instance` are, whose job, if it has one, is not at work now. `wakes` says whether what it
    slept in is whole.
    """
    if has_vmm:
        return Found.IN_USE
    if instance.status is not Status.SLEEPING:
        return Found.AT_REST
    return Found.ASLEEP if wakes else Found.LOST


def as_restored(instance: Instance, how: Found, taken_at: datetime, lost: str = "") -> Instance:
    """What `instance` is when it comes back from a backup: nothing runs, and no job is at it.

    `lost` says why one that is `Found.LOST` cannot be woken.
    """
    rests = replace(instance, process=None, in_flight=None)
    if how is Found.ASLEEP or instance.status not in (Status.RUNNING, Status.WARM, Status.SLEEPING):
        return rests
    note = f"restored from a backup of {taken_at:%Y-%m-%d %H:%M:%S} UTC; it was {instance.status} then"
    if how is Found.LOST:
        note += f", and what it held when it slept is lost: {lost}"
    note += " [backup.restored]"
    return replace(rests, status=Status.STOPPED, last_error=note, last_stopped_at=taken_at)


def job_as_restored(job: Job, taken_at: datetime) -> Job:
    """An unfinished job is not taken up again: what it worked on is as it was at another moment."""
    error = Failed(
        "backup.restored", "the node was restored from a backup that was taken while the job was under way",
        hint=f"mvm job retry {job.job_id}",
    )  # fmt: skip
    return job.with_(state=JobState.FAILED, error=error.to_dict(), finished_at=taken_at, retry_at=None)


class Entry(NamedTuple):
    """A file: its size in bytes, its mode and time, and the digest of what is stored of it (`sha256`, hex)."""

    size: int
    mode: int
    mtime_ns: int
    sha256: str


@dataclass(frozen=True, slots=True)
class About:
    """What a backup says of itself first. `state_version` is the state directory's.

    `shared`: the node had its registry or its broker together with others. Older backups do not say it.
    """

    node_id: NodeId
    taken_at: datetime
    state_version: int
    format: int = FORMAT
    shared: bool = False

    def to_json(self) -> bytes:
        """As it is written."""
        data = {
            "format": self.format,
            "state_version": self.state_version,
            "node_id": str(self.node_id),
            "taken_at": self.taken_at.isoformat(),
            "shared": self.shared,
        }
        return json.dumps(data).encode()

    @classmethod
    def from_json(cls, raw: bytes) -> About:
        """Inverse of `to_json`.

        Raises `ValueError` for anything else, and `NotAllowed` (``backup.newer``, ``state.version``) for what only a
        newer mvm can restore.
        """
        try:
            data: Any = json.loads(raw)
            form, state = int(data["format"]), int(data["state_version"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"not what a backup says of itself: {error}") from None
        if form > FORMAT:
            raise NotAllowed(
                "backup.newer", f"the backup is of format {form}; this mvm knows formats up to {FORMAT}",
                hint="restore it with the mvm that made it", found=form, expected=FORMAT,
            )  # fmt: skip
        refuse_newer("the backup's state", state)
        taken_at, shared = datetime.fromisoformat(data["taken_at"]), data.get("shared") is True
        return cls(NodeId(data["node_id"]), taken_at, state, form, shared)


def manifest(entries: Mapping[str, Entry]) -> bytes:
    """Every file of a backup by its path, and in a second line the digest of the first."""
    line = json.dumps({name: list(entry) for name, entry in entries.items()}, sort_keys=True).encode()
    return line + b"\n" + sha256(line).hexdigest().encode() + b"\n"


def read_manifest(raw: bytes) -> dict[str, Entry]:
    """Inverse of `manifest`; raises `ValueError`."""
    line, _, digest = raw.partition(b"\n")
    if digest != sha256(line).hexdigest().encode() + b"\n":
        raise ValueError("the list of files is damaged")
    try:
        return {name: Entry(*entry) for name, entry in json.loads(line).items()}
    except (TypeError, AttributeError) as error:
        raise ValueError(f"not a list of files: {error}") from None
