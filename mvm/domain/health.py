"""Whether a guest is well: what checks saw of it, one after the other. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from mvm.domain.instance import Instance


@dataclass(frozen=True, slots=True)
class Health:
    """Of one run of an instance: how many checks in a row have failed, since when, and why the last one did."""

    run: str
    misses: int = 0
    since: str | None = None
    reason: str | None = None

    def seen(self, run: str, at: datetime, reason: str | None) -> Health:
        """What is known after a check of `run` that failed for `reason`, or did not (None)."""
        if reason is None:
            return Health(run)
        if self.run != run or not self.misses:
            return Health(run, 1, at.isoformat(), reason)
        return Health(run, self.misses + 1, self.since, reason)

    def why_ill(self, instance: Instance, limit: int) -> str | None:
        """Why `instance` counts as not well: it is up, and `limit` checks of this run have failed; or None."""
        ill = instance.has_vmm and self.run == instance.run and self.misses >= limit
        return f"{self.reason}, in {self.misses} checks in a row since {self.since}" if ill else None

    def proves(self, instance: Instance) -> bool:
        """Whether `instance` passed its last check, in this run."""
        return self.run == instance.run and not self.misses

    def to_dict(self) -> dict[str, Any]:
        """JSON form, as stored."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Health:
        """Inverse of `to_dict`."""
        return cls(**data)
