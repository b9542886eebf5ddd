"""What sweeps find and do, as values. Their JSON form is the result of the sweep's job. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from mvm.domain.vmm import Ending, VmmState


@dataclass(frozen=True, slots=True)
class Removed:
    """Something that was removed from the disk, and the bytes that it took."""

    kind: str
    name: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Kept:
    """Something that stays, and why."""

    name: str
    why: str


@dataclass(frozen=True, slots=True)
class DiskResult:
    """What a cleaning removed, or would remove if it was only tried; free space after it, bytes by kind before it."""

    removed: Sequence[Removed] = ()
    kept: Sequence[Kept] = ()
    free: int = 0
    level: str = "ok"
    dry_run: bool = False
    kinds: Mapping[str, int] = field(default_factory=dict)

    @property
    def freed(self) -> int:
        """Bytes."""
        return sum(each.bytes for each in self.removed)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "changed": bool(self.removed) and not self.dry_run, "dry_run": self.dry_run,
            "removed": [asdict(each) for each in self.removed], "freed_bytes": self.freed,
            "kept": [asdict(each) for each in self.kept], "free_bytes": self.free, "level": self.level,
            "kinds": dict(self.kinds),
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Ill:
    """A guest that did not pass so many checks in a row; `ill` once that is too many."""

    ref: str
    failed_checks: int
    ill: bool
    reason: str


class Then(StrEnum):
    """What came of a guest that stood still though it should run."""

    STOPPED = "stopped"
    """Its run is over, and that is recorded."""

    GOES_ON = "goes on"
    NO_ROOM = "waits for room on the disk"
    STANDS_STILL = "stands still"

    CHANGED = "changed meanwhile"
    """It is not as it was when its VMM was asked: nothing was recorded."""

    LEFT = "left for the next sweep"
    """A job holds it, or its VMM does not answer."""

    @property
    def still(self) -> bool:
        """Whether the guest stands still."""
        return self in (Then.NO_ROOM, Then.STANDS_STILL, Then.LEFT)


@dataclass(frozen=True, slots=True)
class Stalled:
    """A guest that stood still though it should run, what its VMM said, and what came of that.

    `ended` is how its run did, if that was recorded; `why` what kept the sweep from it, if something did.
    """

    ref: str
    state: VmmState
    then: Then
    ended: Ending | None = None
    why: str = ""


@dataclass(frozen=True, slots=True)
class HealthResult:
    """How many guests were checked, those that are not well, and those that stood still."""

    checked: int
    failing: Sequence[Ill] = ()
    stalled: Sequence[Stalled] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "changed": any(each.ill for each in self.failing) or bool(self.stalled), "checked": self.checked,
            "failing": [asdict(each) for each in self.failing], "stalled": [asdict(each) for each in self.stalled],
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class StalePid:
    """An instance recorded as running whose process is gone, how that is known, and how its run `ended`."""

    ref: str
    reason: str
    ended: str = "crashed"


@dataclass(frozen=True, slots=True)
class StalePidResult:
    """Those that were recorded as stopped, and refs of those whose jobs had ended in the middle and that rest now."""

    stopped: Sequence[StalePid] = ()
    settled: Sequence[str] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "changed": bool(self.stopped or self.settled), "stopped": [asdict(each) for each in self.stopped],
            "settled": list(self.settled),
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class OrphanFound:
    """Something on the host that no record owns. `why` tells why it stays, though it has been so for `age_s`."""

    kind: str
    name: str
    age_s: float
    removed: bool = False
    why: str | None = None


@dataclass(frozen=True, slots=True)
class Missing:
    """Something that is recorded and not on the host, and what is done, or can be done, about it."""

    kind: str
    name: str
    ref: str | None
    then: str


@dataclass(frozen=True, slots=True)
class OrphanResult:
    """How ledger and host differ: what only the host has, and what only the ledger has."""

    orphans: Sequence[OrphanFound] = ()
    missing: Sequence[Missing] = ()
    sent_again: Sequence[str] = ()
    repaired: Sequence[str] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON form; ``found`` and ``removed`` are the orphans' names."""
        removed = [each.name for each in self.orphans if each.removed]
        return {
            "changed": bool(removed or self.sent_again or self.repaired),
            "found": [each.name for each in self.orphans], "removed": removed,
            "orphans": [asdict(each) for each in self.orphans], "missing": [asdict(each) for each in self.missing],
            "sent_again": list(self.sent_again), "repaired": list(self.repaired),
        }  # fmt: skip
