"""Who may have how much of what all tenants share.

A room has places. One tenant may have `Room.share` of them, and never more than are left for others: so however many
tenants take all they can, the next one finds places.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True, slots=True)
class Room:
    """A kind of work: how much of it runs at once, one tenant's share of that, and how much of a tenant's may wait.

    What is no tenant's counts as that of one more, which is named "".
    """

    name: str
    places: int
    share: int
    waiting: int = 0


class Refusal(Enum):
    """Why there is no place."""

    SHARE = "the tenant has its share"
    FULL = "the room is full"


def refusal(room: Room, held: Mapping[str, int], tenant: str) -> Refusal | None:
    """Why `tenant` may not have one place more while `held` are taken, by tenant; None when it may."""
    own = held.get(tenant, 0)
    left = room.places - sum(held.values())
    if own >= room.share:
        return Refusal.SHARE
    if own < left:
        return None
    return Refusal.SHARE if own else Refusal.FULL
