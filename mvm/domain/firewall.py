"""The node's packet filter as a pure function of what runs on it: nftables commands, one a line.

The kernel's table of connections is shared by all tenants. What stays within a bridge, or ends at the host, is not
tracked; what leaves by the uplink has to be, and each tenant has so many flows.

Two tables, because a frame is judged where it enters: ``bridge mvm`` at the TAP (whose it is), ``inet mvm`` where it
leaves its bridge (where it may go). What differs from guest to guest is in sets and maps alone, so that a change costs
the same however many there are. Everything is by name, so that an interface that is not in a set passes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Network

from mvm.domain.addressing import CLUSTER, GATEWAY_MAC, GATEWAY_MAC_MASK, METADATA, TenantNetwork
from mvm.domain.egress import NEVER, NO_EGRESS, Destination, Egress, EgressPolicy, Protocol
from mvm.domain.ids import PoolId

TENANT_FLOWS = 8192  # of the kernel's usual 262144

_BRIDGE = f"""
add table bridge mvm
delete table bridge mvm
add table bridge mvm
add set bridge mvm guests {{ type ifname . ether_addr . ipv4_addr; }}
add chain bridge mvm prerouting {{ type filter hook prerouting priority dstnat; policy accept; }}
add chain bridge mvm guest
add rule bridge mvm prerouting iifname "tn*" goto guest
add rule bridge mvm guest ether type {{ 8021q, 8021ad }} drop
add rule bridge mvm guest udp sport 67 drop
add rule bridge mvm guest ether daddr & {GATEWAY_MAC_MASK} != {GATEWAY_MAC} notrack
add rule bridge mvm guest iifname . ether saddr . ip saddr @guests accept
add rule bridge mvm guest iifname . arp saddr ether . arp saddr ip != @guests drop
add rule bridge mvm guest iifname . ether saddr . arp saddr ip @guests accept
add rule bridge mvm guest drop
add chain bridge mvm forward {{ type filter hook forward priority filter; policy accept; }}
add rule bridge mvm forward iifname "tn*" oifname != "tn*" drop
add rule bridge mvm forward iifname != "tn*" oifname "tn*" drop
add table inet mvm
delete table inet mvm
add table inet mvm
add set inet mvm bridges {{ type ifname . ifname; }}
add set inet mvm gateways {{ type ifname . ipv4_addr; }}
add chain inet mvm prerouting {{ type filter hook prerouting priority raw; policy accept; }}
add rule inet mvm prerouting iifname "tn*" drop
add rule inet mvm prerouting iifname "mvmtmpl*" drop
add rule inet mvm prerouting iifname "br-tenant-*" ip daddr {METADATA} tcp dport 80 notrack
add rule inet mvm prerouting icmp type echo-request iifname . ip daddr @gateways notrack
add chain inet mvm output {{ type filter hook output priority raw; policy accept; }}
add rule inet mvm output oifname "br-tenant-*" ip saddr {METADATA} tcp sport 80 notrack
add chain inet mvm input {{ type filter hook input priority filter - 10; policy accept; }}
add chain inet mvm to_host
add rule inet mvm input iifname "br-tenant-*" goto to_host
add rule inet mvm to_host ct state established ct direction reply accept
add rule inet mvm to_host ip daddr {METADATA} tcp dport 80 accept
add rule inet mvm to_host icmp type echo-request iifname . ip daddr @gateways accept
""".strip().splitlines()

_FORWARD = """
add rule inet mvm to_host drop
add chain inet mvm forward { type filter hook forward priority filter - 10; policy accept; }
add chain inet mvm from_guest
add chain inet mvm to_guest
add rule inet mvm forward iifname . oifname @bridges ct state untracked accept
add rule inet mvm forward iifname "br-tenant-*" goto from_guest
add rule inet mvm forward oifname "br-tenant-*" goto to_guest
""".strip().splitlines()


@dataclass(frozen=True, slots=True)
class HostPort:
    """A port of the host that guests may reach at their gateway's address."""

    protocol: Protocol
    port: int

    def __str__(self) -> str:
        return f"{self.port}/{self.protocol}"


def parse_host_ports(text: str) -> tuple[HostPort, ...]:
    """``PORT[/PROTO]``, as many as there are, between commas or spaces; raises `ValueError`."""
    ports = []
    for word in text.replace(",", " ").split():
        port, slash, protocol = word.partition("/")
        if not (port.isascii() and port.isdecimal() and 1 <= int(port[:6]) <= 65535):
            raise ValueError(f"{word[:40]!r} is not PORT[/PROTO] with a port of 1 to 65535")
        if slash and protocol not in tuple(Protocol):
            raise ValueError(f"{word[:40]!r} has a protocol other than tcp and udp")
        ports.append(HostPort(Protocol(protocol) if slash else Protocol.TCP, int(port)))
    return tuple(dict.fromkeys(ports))


@dataclass(frozen=True, slots=True)
class Plan:
    """What the node's settings say: the interface to the outside, and what guests may (not) reach."""

    uplink: str = ""
    host_ports: tuple[HostPort, ...] = ()
    never: tuple[IPv4Network, ...] = ()
    flows: int = TENANT_FLOWS

    def commands(self) -> list[str]:
        """Everything that is the same for all tenants, in place of what is there."""
        return [*_BRIDGE, *self._host(), *_FORWARD, *self._outside()]

    def _host(self) -> list[str]:
        """What guests reach of the host. It needs no tracking: where it comes from and goes to says enough."""
        if not self.host_ports:
            return []
        ports = ", ".join(f"{p.protocol} . {p.port}" for p in self.host_ports)
        asked = f"iifname . ip daddr @gateways meta l4proto . th dport {{ {ports} }}"
        answered = f"oifname . ip saddr @gateways meta l4proto . th sport {{ {ports} }}"
        return [
            f"add rule inet mvm to_host {asked} accept",
            f"add rule inet mvm prerouting {asked} notrack",
            f"add rule inet mvm output {answered} notrack",
        ]

    def _outside(self) -> list[str]:
        drop = ["add rule inet mvm from_guest drop", "add rule inet mvm to_guest drop"]
        if not self.uplink:
            return drop
        # nft wants networks that overlap named once.
        never = [n for n in (*NEVER, *self.never) if not any(n != m and n.subnet_of(m) for m in (*NEVER, *self.never))]
        return [
            "add map inet mvm egress { type ifname : verdict; }",
            f'add rule inet mvm from_guest oifname != "{self.uplink}" drop',
            f"add rule inet mvm from_guest ip daddr {{ {', '.join(map(str, dict.fromkeys(never)))} }} drop",
            "add rule inet mvm from_guest iifname vmap @egress",
            f'add rule inet mvm to_guest iifname "{self.uplink}" ct state established,related accept',
            *drop,
            "add chain inet mvm srcnat { type nat hook postrouting priority srcnat; policy accept; }",
            f'add rule inet mvm srcnat ip saddr {CLUSTER} oifname "{self.uplink}" masquerade',
        ]


@dataclass(frozen=True, slots=True, order=True)
class Element:
    """One member of a set or, with a verdict, of a map."""

    of: str
    key: str
    verdict: str = ""

    def add(self) -> str:
        """The command that puts it there; it may be there already."""
        verdict = f" : {self.verdict}" if self.verdict else ""
        return f"add element {self.of} {{ {self.key}{verdict} }}"

    def delete(self) -> str:
        """The command that takes it away; nftables refuses it when it is not there."""
        return f"delete element {self.of} {{ {self.key} }}"


@dataclass(frozen=True, slots=True)
class Ruleset:
    """All of it: `plan`, a chain for each tenant that has a way out, and the members of the sets.

    A chain's rules name the sets of its tenant's pools, and each of those exists as long as a rule names it.
    """

    plan: Plan = Plan()
    chains: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    elements: frozenset[Element] = frozenset()

    def commands(self) -> list[str]:
        """Applied as one, they leave exactly this, whatever was there before."""
        chains = [command for name, rules in sorted(self.chains.items()) for command in _chain(name, rules)]
        return [*self.plan.commands(), *chains, *(element.add() for element in sorted(self.elements))]

    def changed_by(self, change: Change) -> Ruleset:
        """What is there after `change`."""
        chains = {name: rules for name, rules in {**self.chains, **change.chains}.items() if rules}
        gone = {(element.of, element.key) for element in change.removed}
        kept = {e for e in self.elements if (e.of, e.key) not in gone and e.of not in change.dropped}
        return Ruleset(self.plan, chains, frozenset(kept | set(change.elements)))

    def until(self, later: Ruleset) -> Change:
        """What makes `later` of this; they have the same plan."""
        names = {*self.chains, *later.chains}
        chains = {n: later.chains.get(n, ()) for n in names if self.chains.get(n) != later.chains.get(n)}
        dropped = frozenset(_sets(self.chains.values()) - _sets(later.chains.values()))
        removed = {e for e in self.elements - later.elements if e.of not in dropped}
        return Change(tuple(sorted(later.elements - self.elements)), tuple(sorted(removed)), chains, dropped)


@dataclass(frozen=True, slots=True)
class Change:
    """A few lines of a ruleset: members to add and remove, chains to have with these rules (none: not), sets to drop.

    What is there already, or is gone already, is fine: nftables takes away what was put there in the same breath.
    """

    elements: tuple[Element, ...] = ()
    removed: tuple[Element, ...] = ()
    chains: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    dropped: frozenset[str] = frozenset()

    def commands(self) -> list[str]:
        """Applied as one. What leads somewhere goes before that, and comes after it."""
        chains = sorted(self.chains.items())
        return [
            *(f"add chain inet mvm {name}" for name, _ in chains),
            *(command for element in self.removed for command in (element.add(), element.delete())),
            *(f"flush chain inet mvm {name}" for name, _ in chains),
            *(c for name, rules in chains if rules for c in _chain(name, rules)),
            *(f"delete chain inet mvm {name}" for name, rules in chains if not rules),
            *(c for of in sorted(self.dropped) for c in (f"add set {of} {_MEMBERS}", f"delete set {of}")),
            *(element.add() for element in self.elements),
        ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class GuestPort:
    """A guest that is to have its way: its place in a tenant's network, and its pool's policy."""

    network: TenantNetwork
    offset: int
    pool: PoolId | None = None
    egress: EgressPolicy = NO_EGRESS


def bridge_elements(network: TenantNetwork) -> tuple[Element, ...]:
    """What a tenant's bridge needs."""
    name = f'"{network.bridge}"'
    return (
        Element("inet mvm bridges", f"{name} . {name}"),
        Element("inet mvm gateways", f"{name} . {network.gateway}"),
    )


def guest_elements(plan: Plan, guest: GuestPort) -> tuple[Element, ...]:
    """What a guest's TAP needs: whose it is, and membership in its pool if that has a way out."""
    network, ip = guest.network, guest.network.ip(guest.offset)
    own = Element("bridge mvm guests", f'"{network.tap(guest.offset)}" . {network.mac(guest.offset)} . {ip}')
    if not plan.uplink or guest.egress.kind is Egress.NONE or guest.pool is None:
        return (own,)
    return (own, Element(_set_of(network, guest.pool), str(ip)))


def ways_out(plan: Plan, network: TenantNetwork, pools: Iterable[tuple[PoolId, EgressPolicy]]) -> Ruleset:
    """A tenant's chain, and what leads its bridge there; nothing when none of its pools has a way out."""
    rules = tuple(rule for pool, egress in sorted(pools) for rule in _rules(network, pool, egress) if plan.uplink)
    if not rules:
        return Ruleset(plan)
    rules = (f"ct state new ct count over {plan.flows} drop", *rules)
    chain = f"tenant-{network.net_id}"
    # A member that leads to a chain has the kernel walk all of them, so it is one for a tenant, not one for a guest.
    lead = Element("inet mvm egress", f'"{network.bridge}"', f"jump {chain}")
    return Ruleset(plan, {chain: rules}, frozenset({lead}))


def ruleset(
    plan: Plan,
    networks: Iterable[TenantNetwork],
    pools: Iterable[tuple[TenantNetwork, PoolId, EgressPolicy]],
    guests: Iterable[GuestPort],
) -> Ruleset:
    """All rules of a node."""
    policies: dict[TenantNetwork, list[tuple[PoolId, EgressPolicy]]] = {}
    for network, pool, egress in pools:
        policies.setdefault(network, []).append((pool, egress))
    chains: dict[str, tuple[str, ...]] = {}
    elements = {each for network in networks for each in bridge_elements(network)}
    elements |= {each for guest in guests for each in guest_elements(plan, guest)}
    for network, own in policies.items():
        out = ways_out(plan, network, own)
        chains |= out.chains
        elements |= out.elements
    return Ruleset(plan, chains, frozenset(elements))


_MEMBERS = "{ type ipv4_addr; }"
_SET = re.compile(r"@(pool-[a-z0-9-]+)")


def _set_of(network: TenantNetwork, pool: PoolId) -> str:
    return f"inet mvm pool-{network.net_id}-{pool}"


def _rules(network: TenantNetwork, pool: PoolId, egress: EgressPolicy) -> list[str]:
    members = f"ip saddr @{_set_of(network, pool).split()[-1]}"
    if egress.kind is Egress.NAT:
        return [f"{members} accept"]
    return [f"{members} {_destination(each)} accept" for each in egress.allow]


def _destination(destination: Destination) -> str:
    port = f" {destination.protocol} dport {destination.port}" if destination.port else ""
    return f"ip daddr {destination.network}{port}"


def _sets(chains: Iterable[Iterable[str]]) -> set[str]:
    """The pools' sets that rules name."""
    return {f"inet mvm {name}" for rules in chains for rule in rules for name in _SET.findall(rule)}


def _chain(name: str, rules: tuple[str, ...]) -> list[str]:
    return [
        *(f"add set {of} {_MEMBERS}" for of in sorted(_sets([rules]))),
        f"add chain inet mvm {name}",
        *(f"add rule inet mvm {name} {rule}" for rule in rules),
    ]
