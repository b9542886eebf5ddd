"""What the host has left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class MemoryLeft:
    """The host's memory, and what of it programs could still get without swapping, in MiB."""

    total_mib: int
    available_mib: int


class HostMemory(Protocol):
    """The host's memory. Raises `Failed` (``host.unreadable``) when it cannot be seen."""

    def left(self) -> MemoryLeft:
        """As it is now."""
        ...
