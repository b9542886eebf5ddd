"""What sweeps find and do, as values. Their JSON form is the result of the sweep's job. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


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
    """What a cleaning removed (or, when it was only tried, would remove), and the space that is left."""

    removed: Sequence[Removed] = ()
    kept: Sequence[Kept] = ()
    free: int = 0
    level: str = "ok"
    dry_run: bool = False

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
        }  # fmt: skip
