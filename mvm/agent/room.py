"""Room for connections: a share for each address, and for each that has shown a certificate; nobody takes all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from ipaddress import ip_address
from typing import Protocol

from mvm.domain.crowds import Allowance, Holder, gives_way
from mvm.drivers.quic.identity import Peer, Role

HANDSHAKES = 64  # at once
VERIFIED = 192
OF_ONE_NODE = 16  # connections; the coordinator's are all commands of all its people
LINGERING = 1024  # connections in all, with those that only wait for stray packets
RATE, BURST = 50.0, 100  # handshakes from one address, a second and at once; this machine's own are not counted


class Held(Protocol):
    """One connection."""

    source: str
    since: float
    peer: Peer | None

    @property
    def closing(self) -> bool:
        """It takes no place any more."""
        ...


class Room:
    """What a new connection may take, beside `connections`. `evict` closes one that has to make room."""

    def __init__(self, connections: Iterable[Held], evict: Callable[[Held, str], None]) -> None:
        self._connections = connections
        self._evict = evict
        self._pace = Allowance(RATE, BURST)

    def for_handshake(self, source: str, now: float) -> bool:
        """Whether a handshake from `source`, an address that is proven, may begin; there is room for it then.

        Who is in the middle of one and has taken long, or holds many, gives way: an address that only begins
        handshakes keeps nobody out, not even others of the same address.
        """
        if sum(1 for _ in self._connections) >= LINGERING:
            return False
        if not ip_address(source).is_loopback and not self._pace.take(source, now):
            return False
        waiting = [held for held in self._connections if not held.closing and held.peer is None]
        while waiting and len(waiting) >= HANDSHAKES:
            at = gives_way([Holder(held.source, held.since) for held in waiting])
            self._evict(waiting.pop(at), "no handshake while others waited")
        return len(waiting) < HANDSHAKES

    def for_peer(self, peer: Peer) -> bool:
        """Whether there is room for another connection of `peer`, which has shown its certificate."""
        open_ = [held.peer for held in self._connections if not held.closing and held.peer is not None]
        if peer.role is Role.NODE:
            own = sum(other.role is peer.role and other.name == peer.name for other in open_)
            return own < OF_ONE_NODE and len(open_) < VERIFIED
        return len(open_) < VERIFIED
