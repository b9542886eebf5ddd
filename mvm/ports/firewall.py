"""The node's own packet filter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from mvm.domain.firewall import Change, Ruleset


class PacketFilter(Protocol):
    """Our tables, and no others, in the network namespace the node's worker lives in; each call is all or nothing.

    Raises `Failed`: ``firewall.missing`` when there is no program for it, ``firewall.refused`` with the kernel's words.
    """

    def apply(self, rules: Ruleset) -> None:
        """Exactly `rules` are there, whatever was before; between old and new no packet finds neither."""
        ...

    def change(self, change: Change) -> None:
        """`change` was made to what is there; refused when that is not what it builds on."""
        ...

    def remove(self) -> None:
        """Nothing of ours is left."""
        ...

    def differences(self, rules: Ruleset) -> Sequence[str]:
        """In which lines that which is there differs from `rules`; empty when it does not."""
        ...

    def forward(self, bridges: frozenset[str], uplink: str) -> None:
        """The kernel forwards what comes in at these of our bridges and at `uplink`, and at no other of our bridges.

        What an uplink was before is remembered, and put back when `uplink` is empty or another.
        """
        ...

    def forwarding(self) -> frozenset[str]:
        """The interfaces, ours or not, at which the kernel forwards what comes in."""
        ...
