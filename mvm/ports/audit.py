"""The tenants' audit trails: lines that are only ever added."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from mvm.domain.ids import TenantId


class AuditTrail(Protocol):
    """One tenant's trail, held by the caller alone. Lines are given and told without their line breaks.

    Its methods raise `Failed`: ``disk.full`` or ``audit.failed``.
    """

    def append(self, lines: Sequence[str]) -> None:
        """Add whole lines, durably: all, or after an error none. What is left of a broken append is cut off first."""
        ...

    def tail(self, count: int) -> Sequence[bytes]:
        """The last `count` whole lines, oldest first."""
        ...

    def half(self) -> bytes:
        """What an append that was broken off has left behind the last whole line."""
        ...

    def files(self) -> Iterator[tuple[str, bytes]]:
        """All of it, in pieces in their order, each with a name to find it by; the half line too."""
        ...


class AuditLog(Protocol):
    """Every tenant's trail. Trails outlive their tenants."""

    def hold(self, tenant: TenantId) -> AbstractContextManager[AuditTrail]:
        """The tenant's trail, empty if it has none yet, while no other thread or process holds it.

        Raises `TimedOut` (``lock.busy``) when another holds it for long.
        """
        ...
