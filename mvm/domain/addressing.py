"""Addresses, all derived from a tenant's network and an instance's offset in it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv4Network, NetmaskValueError

from mvm.errors import InvalidInput, NotAllowed, QuotaExceeded

CLUSTER = IPv4Network("10.240.0.0/12")
METADATA = IPv4Address("169.254.169.254")  # on every bridge
NET_IDS = range(4096)
BUILDER_OFFSET = 2  # of what is made for the tenant, such as templates and probes; .1 is the gateway
FIRST_OFFSET = 3
DEFAULT_PREFIX = 24  # 4096 of them fill the cluster's /12 exactly
LONGEST_PREFIX = 29  # gateway, builder and three guests
_GATEWAY_OFFSET = 1
GATEWAY_MAC, GATEWAY_MAC_MASK = "02:6d:00:00:00:01", "ff:ff:00:00:ff:ff"  # what every bridge's have in common
_TAP, _BRIDGE = re.compile(r"tn(\d{1,4})i(\d{1,5})"), re.compile(r"br-tenant-(\d{1,4})")
_UIDS = 1 << 28
_FIRST_UID = 0x6000_0000  # 28 bits from here on are nobody's on a Debian: below the signed half, above containers


@dataclass(frozen=True, slots=True)
class TenantNetwork:
    """A tenant's network id (never reused in a cluster) and its subnet."""

    net_id: int
    subnet: IPv4Network

    @property
    def gateway(self) -> IPv4Address:
        """The first address, on the bridge."""
        return self.subnet.network_address + 1

    @property
    def bridge(self) -> str:
        """The bridge's interface name, at most 14 characters of the kernel's 15."""
        return f"br-tenant-{self.net_id}"

    @property
    def offsets(self) -> range:
        """Offsets that guests may have: 3 up to the last before the broadcast address."""
        return range(FIRST_OFFSET, self.subnet.num_addresses - 1)

    def ip(self, offset: int) -> IPv4Address:
        """The address of the guest at `offset`."""
        return self.subnet.network_address + offset

    def mac(self, offset: int) -> str:
        """Locally administered, unicast: ``02:6d``, the net id's and the offset's two bytes each."""
        return _mac(self.net_id, offset)

    def uid(self, offset: int) -> int:
        """The user and group id of the guest's VMM: no other guest's, of whatever tenant."""
        return _uid(self.net_id, offset)

    def tap(self, offset: int) -> str:
        """The TAP's interface name, ``tn<net_id>i<offset>``; it never collides, being no hash."""
        return f"tn{self.net_id}i{offset}"


def _uid(net_id: int, offset: int) -> int:
    return _FIRST_UID + (net_id << 16) + offset


def _mac(net_id: int, offset: int) -> str:
    raw = (0x02, 0x6D, *net_id.to_bytes(2, "big"), *(offset & 0xFFFF).to_bytes(2, "big"))
    return ":".join(f"{byte:02x}" for byte in raw)


def is_guest_uid(uid: int) -> bool:
    """Whether it may be a VMM's."""
    return 0 <= uid - _FIRST_UID < _UIDS


def tap_uid(name: str) -> int | None:
    """The user to whom a TAP of this name belongs if it is one of ours; None: none of ours has such a name."""
    match = _TAP.fullmatch(name)
    return _uid(int(match[1]), int(match[2])) if match else None


def bridge_mac(name: str) -> str | None:
    """The MAC that a bridge of this name has if it is one of ours; None: none of ours has such a name."""
    match = _BRIDGE.fullmatch(name)
    return _mac(int(match[1]), _GATEWAY_OFFSET) if match else None


def bridge_net_id(name: str) -> int | None:
    """The net id of the tenant that a bridge of this name is for; None: it is no tenant's."""
    match = _BRIDGE.fullmatch(name)
    return int(match[1]) if match else None


def parse_net_id(value: int) -> int:
    """`value` if it is 0 to 4095; raises `InvalidInput`."""
    if value not in NET_IDS:
        raise InvalidInput(
            "tenant.invalid_net_id", f"net id {value} is out of range", hint="allowed: 0 to 4095",
            field="net_id", value=value,
        )  # fmt: skip
    return value


def parse_subnet(text: str) -> IPv4Network:
    """A subnet of the cluster's 10.240.0.0/12, /16 to /29; raises `InvalidInput`."""

    def bad(why: str) -> InvalidInput:
        return InvalidInput(
            "tenant.invalid_subnet", f"subnet {text!r} {why}",
            hint=f"allowed: a network within {CLUSTER}, /16 to /{LONGEST_PREFIX}, such as 10.240.7.0/24",
            field="subnet", value=text[:80],
        )  # fmt: skip

    try:
        subnet = IPv4Network(text, strict=True)
    except (AddressValueError, NetmaskValueError):
        raise bad("is not an IPv4 network") from None
    except ValueError:
        raise bad("has bits set behind its prefix") from None
    if not subnet.subnet_of(CLUSTER):
        raise bad("is outside the cluster's network")
    if not 16 <= subnet.prefixlen <= LONGEST_PREFIX:
        raise bad("is too large or too small")
    return subnet


def allocate(
    net_id: int | None,
    subnet: IPv4Network | None,
    *,
    used_ids: Collection[int],
    taken: Collection[IPv4Network],
) -> TenantNetwork:
    """A network for a new tenant.

    `used_ids` are all ids ever given, `taken` the subnets of today's tenants. What is not given is chosen: the
    lowest id never used, and the id's own /24 or else the lowest free /24. Raises `NotAllowed` for an id that was
    used or a subnet that overlaps, `QuotaExceeded` when nothing is left.
    """
    if net_id is None:
        used = set(used_ids)
        net_id = next((i for i in NET_IDS if i not in used), None)
        if net_id is None:
            raise QuotaExceeded(
                "tenant.net_ids_exhausted", "all 4096 tenant net ids were given and none is ever given twice",
                field="net_id",
            )  # fmt: skip
    elif net_id in used_ids:
        raise NotAllowed(
            "tenant.net_id_used", f"net id {net_id} was already given to a tenant",
            hint="net ids are never given twice; leave --net-id out to get a free one", field="net_id", value=net_id,
        )  # fmt: skip
    if subnet is None:
        own = IPv4Network((int(CLUSTER.network_address) + (net_id << 8), DEFAULT_PREFIX))
        subnet = own if not _overlap(own, taken) else _first_free(taken)
    else:
        clash = _overlap(subnet, taken)
        if clash is not None:
            raise NotAllowed(
                "tenant.subnet_overlap", f"subnet {subnet} overlaps {clash}, which another tenant has",
                hint="choose a free network, or leave --subnet out", field="subnet", value=str(subnet),
            )  # fmt: skip
    return TenantNetwork(net_id, subnet)


def free_offset(network: TenantNetwork, taken: Iterable[int]) -> int:
    """The lowest offset no instance has; raises `QuotaExceeded` when the subnet is full."""
    used = set(taken)
    for offset in network.offsets:
        if offset not in used:
            return offset
    raise QuotaExceeded(
        "tenant.subnet_full", f"subnet {network.subnet} has no free address",
        hint="destroy instances that are not needed", subnet=str(network.subnet),
    )  # fmt: skip


def _overlap(subnet: IPv4Network, taken: Iterable[IPv4Network]) -> IPv4Network | None:
    return next((other for other in taken if subnet.overlaps(other)), None)


def _first_free(taken: Collection[IPv4Network]) -> IPv4Network:
    for candidate in CLUSTER.subnets(new_prefix=DEFAULT_PREFIX):
        if _overlap(candidate, taken) is None:
            return candidate
    raise QuotaExceeded("tenant.subnets_exhausted", f"{CLUSTER} has no free /24 left", field="subnet")
