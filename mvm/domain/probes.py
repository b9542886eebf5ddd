"""A probe, its place in a tenant's network, and signs to know it by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from ipaddress import IPv4Address

from mvm.domain import frames
from mvm.domain.addressing import TenantNetwork
from mvm.domain.egress import NO_EGRESS, EgressPolicy
from mvm.domain.ids import PoolId

PORT = 9  # discard
STRAY, STRAY_MAC = "mvmstray", "02:6e:00:00:00:01"
TEMPLATE, TEMPLATE_MAC, TEMPLATE_NEAR = "mvmtmpl999", "02:6e:00:00:00:02", "02:6e:00:00:00:03"
ANSWERS = '*"bytes from"*|SSH-*'  # a line that says so, as a pattern of the shell
OTHER_MAC = "02:6e:00:00:00:04"


@dataclass(frozen=True, slots=True)
class Probe:
    """`frame` goes out by wire `source`; a frame with `sign` (and not `without`) is heard on wire `at`, or is not.

    `pair` are the tenants from which and to which, where it is about that.
    """

    kind: str
    source: str
    target: str
    wanted: bool
    frame: bytes
    at: str
    sign: bytes
    without: bytes = b""
    pair: tuple[str, str] = ("", "")

    def seen_in(self, frame: bytes) -> bool:
        """Whether `frame` is what was waited for."""
        return self.sign in frame and not (self.without and self.without in frame)


@dataclass(frozen=True, slots=True)
class Stand:
    """A probe's place in a tenant's network: as if a guest were at `offset`."""

    network: TenantNetwork
    offset: int

    @property
    def wire(self) -> str:
        """The interface's name."""
        return self.network.tap(self.offset)

    @property
    def mac(self) -> str:
        """A guest's there."""
        return self.network.mac(self.offset)

    @property
    def ip(self) -> IPv4Address:
        """A guest's there."""
        return self.network.ip(self.offset)

    @property
    def gateway_mac(self) -> str:
        """The bridge's."""
        return self.network.mac(1)

    def by_gateway(self, packet: bytes) -> bytes:
        """An IP packet on its way out of the bridge."""
        return frames.ethernet(self.gateway_mac, self.mac, frames.IP, packet)


@dataclass(frozen=True, slots=True)
class Party:
    """A tenant under test: two places of its own, the guests that run, and its pools' policies."""

    name: str
    one: Stand
    two: Stand
    guests: Mapping[str, Stand]
    policies: tuple[tuple[PoolId | None, EgressPolicy], ...] = ((None, NO_EGRESS),)
    stray: str = ""


class Tokens:
    """Signs that no other frame has, the same in every run for the same `seed`."""

    def __init__(self, seed: bytes) -> None:
        self._seed, self._count = seed, 0

    def next(self) -> bytes:
        """Eight bytes, never zero ones at the end."""
        self._count += 1
        return sha256(self._seed + self._count.to_bytes(4, "big")).digest()[:7] + b"!"

    def sport(self) -> int:
        """A source port that the last run did not have, so that the kernel knows no such connection."""
        return 20_000 + int.from_bytes(self.next()[:2], "big") % 40_000

    def number(self) -> int:
        """A TCP sequence number that can be told from others."""
        return int.from_bytes(self.next()[:4], "big") & 0x7FFFFFFF


@dataclass(frozen=True, slots=True)
class Call:
    """What a guest tries itself: `command` prints `ANSWERS` if `target`, of `tenant`, answers; `word` stands for it."""

    kind: str
    tenant: str
    target: str
    command: str
    word: str
