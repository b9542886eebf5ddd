"""What a pool's guests may reach outside their tenant."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Network
from typing import Any

from mvm.domain.addressing import CLUSTER
from mvm.errors import InvalidInput

LINK_LOCAL = IPv4Network("169.254.0.0/16")
NEVER = (CLUSTER, LINK_LOCAL)
"""What no policy opens: tenants, and the metadata addresses of this host's and of other clouds."""

MAX_DESTINATIONS = 64


class Egress(StrEnum):
    """Nothing, everything, or a list."""

    NONE = "none"
    NAT = "nat"
    ALLOW = "allow"


class Protocol(StrEnum):
    """Those that have ports."""

    TCP = "tcp"
    UDP = "udp"


@dataclass(frozen=True, slots=True)
class Destination:
    """A network, and one port of it when `port` is set."""

    network: IPv4Network
    port: int | None = None
    protocol: Protocol = Protocol.TCP

    @classmethod
    def parse(cls, text: str) -> Destination:
        """``CIDR[:PORT[/PROTO]]``; TCP unless it says otherwise. Raises `InvalidInput` (``pool.invalid_egress``)."""
        where, colon, rest = text.partition(":")
        try:
            network = IPv4Network(where)
        except ValueError:
            raise _bad(text, "is not an IPv4 network (with no bits set behind its prefix)") from None
        for never in NEVER:
            if network.subnet_of(never):
                raise _bad(text, f"is within {never}, which no guest reaches")
        if not colon:
            return cls(network)
        port, slash, protocol = rest.partition("/")
        if not (port.isascii() and port.isdecimal() and 1 <= int(port[:6]) <= 65535):
            raise _bad(text, "has a port outside 1 to 65535")
        if slash and protocol not in tuple(Protocol):
            raise _bad(text, "has a protocol other than tcp and udp")
        return cls(network, int(port), Protocol(protocol) if slash else Protocol.TCP)

    def __str__(self) -> str:
        return f"{self.network}:{self.port}/{self.protocol}" if self.port else str(self.network)


@dataclass(frozen=True, slots=True)
class EgressPolicy:
    """A pool's policy; `allow` is what the kind of that name is about."""

    kind: Egress = Egress.NONE
    allow: tuple[Destination, ...] = ()

    def __post_init__(self) -> None:
        if self.kind is Egress.ALLOW and not 1 <= len(self.allow) <= MAX_DESTINATIONS:
            raise InvalidInput(
                "pool.invalid_egress", f"--egress allow has {len(self.allow)} destinations",
                hint=f"give 1 to {MAX_DESTINATIONS} of: --allow CIDR[:PORT[/PROTO]]", field="allow",
            )  # fmt: skip
        if self.kind is not Egress.ALLOW and self.allow:
            raise InvalidInput(
                "pool.invalid_egress", f"--allow says nothing with --egress {self.kind}",
                hint="use --egress allow, or leave --allow out", field="allow",
            )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {"policy": self.kind.value, "allow": [str(each) for each in self.allow]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EgressPolicy:
        """Inverse of `to_dict`; raises `InvalidInput` (``pool.invalid_egress``)."""
        kind = data.get("policy", Egress.NONE)
        if kind not in tuple(Egress):
            raise InvalidInput(
                "pool.invalid_egress", f"there is no egress policy {str(kind)[:80]!r}",
                hint=f"allowed: {', '.join(Egress)}", field="egress",
            )  # fmt: skip
        return cls(Egress(kind), tuple(dict.fromkeys(Destination.parse(text) for text in data.get("allow", ()))))


NO_EGRESS = EgressPolicy()


def _bad(text: str, why: str) -> InvalidInput:
    return InvalidInput(
        "pool.invalid_egress", f"--allow {text[:80]!r} {why}",
        hint="write CIDR[:PORT[/PROTO]], such as 192.0.2.0/24:443/tcp", field="allow", value=text[:80],
    )  # fmt: skip
