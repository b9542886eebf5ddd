"""Who may have how much of what all tenants share.

Of some places one tenant may have its share, and never more than are left for others: so however many tenants take all
they can, the next one finds places.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto


@dataclass(frozen=True, slots=True)
class Places:
    """For a kind of work: how many there are, one tenant's share of them, and how much of a tenant's work may wait.

    Without a share whoever comes takes what is free. What is no tenant's counts as that of one more, named "".
    """

    kind: str
    count: int
    share: int | None = None
    waiting: int = 0


class Refusal(Enum):
    """Why there is no place: the tenant has its share, or all are taken."""

    SHARE = auto()
    FULL = auto()


def refusal(places: Places, held: Mapping[str, int], tenant: str) -> Refusal | None:
    """Why `tenant` may not have one place more while `held` are taken, by tenant; None when it may."""
    own = held.get(tenant, 0)
    left = places.count - sum(held.values())
    if places.share is None:
        return None if left else Refusal.FULL
    if own >= places.share:
        return Refusal.SHARE
    if own < left:
        return None
    return Refusal.SHARE if own else Refusal.FULL
