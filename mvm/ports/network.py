"""The node's side of tenant networks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from mvm.domain.addressing import TenantNetwork


@dataclass(frozen=True, slots=True)
class BridgeState:
    """A bridge as it is: its addresses with their prefixes, and its ports."""

    up: bool
    addresses: tuple[str, ...]
    ports: tuple[str, ...]


class HostNetwork(Protocol):
    """Bridges and TAPs, in the network namespace the node's worker lives in.

    Raises `Failed` (``network.failed``) with the kernel's words, `NotAllowed` (``network.foreign``) when an
    interface of that name is not of the kind we make.
    """

    def ensure_bridge(self, network: TenantNetwork) -> None:
        """The tenant's bridge is up and has the gateway's address, and that of the metadata service."""
        ...

    def remove_bridges(self, names: frozenset[str]) -> None:
        """None of these bridges is left."""
        ...

    def ensure_tap(self, network: TenantNetwork, offset: int) -> None:
        """The TAP of the guest at `offset` is up, a port of the tenant's bridge (which is made if needed)."""
        ...

    def remove_taps(self, names: frozenset[str]) -> None:
        """None of these TAPs is left."""
        ...

    def taps(self) -> Mapping[str, str | None]:
        """Every TAP of ours, by name (``tn<net>i<offset>``) and owner, with the bridge it is a port of."""
        ...

    def states(self) -> Mapping[str, BridgeState]:
        """Every bridge named as ours are, as it is."""
        ...

    def has(self, interface: str) -> bool:
        """Whether there is an interface of that name."""
        ...

    def addresses(self) -> frozenset[str]:
        """Every IPv4 address of the node, whatever interface has it."""
        ...

    def bridges(self) -> frozenset[str]:
        """Every bridge of ours, by name (``br-tenant-<net>``) and MAC."""
        ...

    def strangers(self) -> Mapping[str, str]:
        """Interfaces that are named as ours are and are not, each with what tells so."""
        ...
