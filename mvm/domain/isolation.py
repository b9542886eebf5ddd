"""Which probes prove that tenants are apart: pure plans of frames, and of where they must (not) arrive."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network

from mvm.domain import frames
from mvm.domain.addressing import CLUSTER, METADATA, TenantNetwork
from mvm.domain.egress import Destination, Egress, EgressPolicy, Protocol
from mvm.domain.firewall import Plan
from mvm.domain.probes import (
    OTHER_MAC,
    PORT,
    STRAY_MAC,
    TEMPLATE,
    TEMPLATE_MAC,
    TEMPLATE_NEAR,
    Call,
    Party,
    Probe,
    Tokens,
)

OUTSIDE = IPv4Address("192.0.2.77")  # kept for documents, so nobody's
LINK_LOCAL = IPv4Address("169.254.7.7")


def greetings(parties: Sequence[Party], tokens: Tokens) -> Iterator[Probe]:
    """Each place asks for its gateway: the way in is open, and the host knows where to send answers."""
    for party in parties:
        for stand in (party.one, party.two):
            network = stand.network
            yield Probe(
                "arp", stand.wire, f"{party.name} gateway", True,
                frames.arp(stand.mac, stand.mac, stand.ip, network.gateway), stand.wire,
                frames.arp_answer(stand.gateway_mac, network.gateway, stand.mac, stand.ip),
            )  # fmt: skip


def probes(parties: Sequence[Party], plan: Plan, tokens: Tokens, *, metadata: bool) -> Iterator[Probe]:
    """Everything but the ways out; `metadata` tells whether the metadata address is this host's."""
    for party in parties:
        yield from _between(party, party, _within(party, tokens))
        yield from _stray(party, tokens)
        yield from _spoofed(party, tokens)
        yield from _host(party, plan, tokens, metadata=metadata)
        for other in parties:
            if other is not party:
                yield from _between(party, other, _across(party, other, tokens))


def _between(one: Party, other: Party, tried: Iterator[Probe]) -> Iterator[Probe]:
    return (replace(probe, pair=(one.name, other.name)) for probe in tried)


def _within(party: Party, tokens: Tokens) -> Iterator[Probe]:
    a, b, token = party.one, party.two, tokens.next
    target = f"{party.name} {b.ip}"

    def direct(kind: str, packet: bytes, at: str, sign: bytes) -> Probe:
        return Probe(kind, a.wire, target, True, frames.ethernet(b.mac, a.mac, frames.IP, packet), at, sign)

    sign = token()
    yield Probe("arp", a.wire, target, True, frames.arp(a.mac, a.mac, a.ip, b.ip, sign), b.wire, sign)
    sign = token()
    yield direct("icmp", frames.echo(a.ip, b.ip, sign), a.wire, sign)
    sign = token()
    yield direct("udp", frames.udp(a.ip, b.ip, sign, port=PORT, sport=tokens.sport()), b.wire, sign)
    number = tokens.number()
    yield direct(
        "tcp", frames.tcp(a.ip, b.ip, number, port=PORT, sport=tokens.sport()), b.wire, struct.pack("!I", number)
    )
    for name, guest in party.guests.items():
        sign = token()
        frame = frames.ethernet(guest.mac, a.mac, frames.IP, frames.echo(a.ip, guest.ip, sign))
        yield Probe("icmp", a.wire, name, True, frame, a.wire, sign)


def _stray(party: Party, tokens: Tokens) -> Iterator[Probe]:
    """A port that is nobody's, and guests: nothing."""
    a, b, token = party.one, party.two, tokens.next
    sign = token()
    frame = frames.ethernet(a.mac, STRAY_MAC, frames.IP, frames.udp(b.ip, a.ip, sign, port=PORT, sport=tokens.sport()))
    yield Probe("from a stray port", party.stray, f"{party.name} {a.ip}", False, frame, a.wire, sign)
    sign = token()
    frame = frames.ethernet(STRAY_MAC, a.mac, frames.IP, frames.udp(a.ip, b.ip, sign, port=PORT, sport=tokens.sport()))
    yield Probe("to a stray port", a.wire, party.stray, False, frame, party.stray, sign)


def _spoofed(party: Party, tokens: Tokens) -> Iterator[Probe]:
    """What a guest may not send even to its own tenant; none of it arrives."""
    a, b, network = party.one, party.two, party.one.network

    def sent(kind: str, frame: bytes, sign: bytes) -> Probe:
        return Probe(kind, a.wire, f"{party.name} {b.ip}", False, frame, b.wire, sign)

    def packet(sign: bytes, source: IPv4Address = a.ip) -> bytes:
        return frames.udp(source, b.ip, sign, port=PORT, sport=tokens.sport())

    def frame(mac: str, payload: bytes, kind: int = frames.IP) -> bytes:
        return frames.ethernet(b.mac, mac, kind, payload)

    sign = tokens.next()
    yield sent("spoofed mac", frame(OTHER_MAC, packet(sign)), sign)
    sign = tokens.next()
    yield sent("spoofed ip", frame(a.mac, packet(sign, b.ip)), sign)
    sign = tokens.next()
    yield sent("spoofed gateway", frame(a.mac, packet(sign, network.gateway)), sign)
    sign = tokens.next()
    yield sent("arp: spoofed ip", frames.arp(a.mac, a.mac, network.gateway, b.ip, sign, reply=True), sign)
    sign = tokens.next()
    yield sent("arp: spoofed sender mac", frames.arp(a.mac, OTHER_MAC, a.ip, b.ip, sign, reply=True), sign)
    sign = tokens.next()
    yield sent("arp: spoofed frame mac", frames.arp(OTHER_MAC, a.mac, a.ip, b.ip, sign), sign)
    sign = tokens.next()
    yield sent("vlan tag", frames.tagged(frame(a.mac, packet(sign)), frames.VLAN, 5), sign)
    sign = tokens.next()
    yield sent("priority tag", frames.tagged(frame(a.mac, packet(sign)), frames.VLAN), sign)
    sign = tokens.next()
    yield sent("802.1ad tag", frames.tagged(frame(a.mac, packet(sign)), frames.QINQ, 5), sign)
    sign = tokens.next()
    yield sent("ipv6", frame(a.mac, b"\x60" + bytes(39) + sign, frames.IPV6), sign)
    sign = tokens.next()
    yield sent("other ethertype", frame(a.mac, sign, frames.EXPERIMENT), sign)
    sign = tokens.next()
    offer = frames.udp(a.ip, IPv4Address("255.255.255.255"), sign, port=68, sport=67)
    yield sent("dhcp server", frames.ethernet(frames.BROADCAST, a.mac, frames.IP, offer), sign)


def _host(party: Party, plan: Plan, tokens: Tokens, *, metadata: bool) -> Iterator[Probe]:
    """What of the host is reached: whatever passes is answered, so it is at the sender that we listen."""
    a, gateway, host = party.one, party.one.network.gateway, f"{party.name} gateway"

    def asked(kind: str, target: str, wanted: bool, packet: bytes, sign: bytes) -> Probe:
        return Probe(kind, a.wire, target, wanted, a.by_gateway(packet), a.wire, sign)

    def tcp(target: str, ip: IPv4Address, port: int, wanted: bool) -> Probe:
        number = tokens.number()
        packet = frames.tcp(a.ip, ip, number, port=port, sport=tokens.sport())
        return asked(f"tcp {port}", target, wanted, packet, struct.pack("!I", number + 1))

    sign = tokens.next()
    yield asked("icmp", host, True, frames.echo(a.ip, gateway, sign), sign)
    sign = tokens.next()
    yield asked(f"udp {PORT}", host, False, frames.udp(a.ip, gateway, sign, port=PORT, sport=tokens.sport()), sign)
    yield tcp(host, gateway, PORT, False)
    for each in plan.host_ports:
        if each.protocol is Protocol.TCP:
            yield tcp(host, gateway, each.port, True)
    if metadata:
        yield tcp("metadata", METADATA, 80, True)
        yield tcp("metadata", METADATA, PORT, False)
        sign = tokens.next()
        yield asked("icmp", "metadata", False, frames.echo(a.ip, METADATA, sign), sign)
    sign, b = tokens.next(), party.two
    packet = frames.udp(a.ip, b.ip, sign, port=PORT, sport=tokens.sport())
    yield Probe("by the gateway", a.wire, f"{party.name} {b.ip}", False, a.by_gateway(packet), b.wire, sign)
    sign = tokens.next()
    frame = frames.ethernet(frames.LINK_LOCAL_GROUP, a.mac, frames.IP, frames.echo(a.ip, gateway, sign))
    yield Probe("past the bridge", a.wire, host, False, frame, a.wire, sign)
    sign = tokens.next()
    frame = frames.ethernet(TEMPLATE_NEAR, TEMPLATE_MAC, frames.IP, frames.echo(a.ip, gateway, sign))
    yield Probe("from a template", TEMPLATE, host, False, frame, a.wire, sign)


def _across(party: Party, other: Party, tokens: Tokens) -> Iterator[Probe]:
    """Between two tenants: nothing."""
    a, b = party.one, other.one
    target = f"{other.name} {b.ip}"

    def tried(kind: str, frame: bytes, sign: bytes) -> Probe:
        return Probe(kind, a.wire, target, False, frame, b.wire, sign)

    sign = tokens.next()
    frame = frames.ethernet(b.mac, a.mac, frames.IP, frames.udp(a.ip, b.ip, sign, port=PORT, sport=tokens.sport()))
    yield tried("frame", frame, sign)
    sign = tokens.next()
    yield tried("arp", frames.arp(a.mac, a.mac, a.ip, b.ip, sign), sign)
    sign = tokens.next()
    yield tried("icmp", a.by_gateway(frames.echo(a.ip, b.ip, sign)), sign)
    sign = tokens.next()
    yield tried("udp", a.by_gateway(frames.udp(a.ip, b.ip, sign, port=PORT, sport=tokens.sport())), sign)
    for kind, flags in (("tcp", frames.SYN), ("tcp answer", frames.SYN | frames.ACK), ("tcp ack", frames.ACK)):
        number = tokens.number()
        packet = frames.tcp(a.ip, b.ip, number, port=PORT, sport=tokens.sport(), flags=flags)
        yield tried(kind, a.by_gateway(packet), struct.pack("!I", number))
    network = other.one.network
    asked = frames.arp(a.mac, a.mac, a.ip, network.gateway)
    answer = frames.arp_answer(a.gateway_mac, network.gateway, a.mac, a.ip)
    yield Probe("arp", a.wire, f"{other.name} gateway", False, asked, a.wire, answer)
    sign = tokens.next()
    gateway = a.by_gateway(frames.echo(a.ip, network.gateway, sign))
    yield Probe("icmp", a.wire, f"{other.name} gateway", False, gateway, a.wire, sign)
    for name, guest in other.guests.items():
        sign = tokens.next()
        yield Probe("icmp", a.wire, name, False, a.by_gateway(frames.echo(a.ip, guest.ip, sign)), a.wire, sign)


def ways_out(
    party: Party, policy: EgressPolicy, plan: Plan, tokens: Tokens, taken: Sequence[TenantNetwork]
) -> Iterator[Probe]:
    """What leaves by the uplink when the tenant's first place has `policy`."""
    a = party.one

    def tried(target: str, wanted: bool, where: Destination) -> Probe:
        sign, number = tokens.next(), tokens.number()
        port, ip = where.port or PORT, _inside(where.network)
        if where.port and where.protocol is Protocol.TCP:
            sign = struct.pack("!I", number)
            packet = frames.tcp(a.ip, ip, number, port=port, sport=tokens.sport())
        else:
            packet = frames.udp(a.ip, ip, sign, port=port, sport=tokens.sport())
        kind = f"egress {policy.kind}"
        return Probe(
            kind, a.wire, target, wanted, a.by_gateway(packet), plan.uplink, sign, a.ip.packed if wanted else b""
        )

    outside = Destination.parse(f"{OUTSIDE}:{PORT}/udp")
    listed = any(OUTSIDE in each.network and each.port in (None, PORT) for each in policy.allow)
    yield tried("outside", policy.kind is Egress.NAT or listed, outside)
    for each in policy.allow:
        yield tried(str(each), not any(_inside(each.network) in never for never in plan.never), each)
        if each.port and not any(_inside(each.network) in o.network and o is not each for o in policy.allow):
            beside = Destination(each.network, each.port % 65535 + 1, each.protocol)
            yield tried(str(beside), False, beside)
    nobodys = next(n for n in CLUSTER.subnets(new_prefix=24) if not any(n.overlaps(t.subnet) for t in taken))
    for name, ip in (("another node's tenant", nobodys[5]), ("link-local", LINK_LOCAL)):
        sign = tokens.next()
        packet = frames.udp(a.ip, ip, sign, port=PORT, sport=tokens.sport())
        yield Probe(f"egress {policy.kind}", a.wire, name, False, a.by_gateway(packet), plan.uplink, sign)
    for never in plan.never:
        sign = tokens.next()
        packet = frames.udp(a.ip, _inside(never), sign, port=PORT, sport=tokens.sport())
        yield Probe(f"egress {policy.kind}", a.wire, str(never), False, a.by_gateway(packet), plan.uplink, sign)


def calls(parties: Sequence[Party]) -> list[Call]:
    """The same for every guest: all gateways and all guests, by ping and by a connection to the SSH server."""
    found = []
    for party in parties:
        places = {f"{party.name} gateway": party.one.network.gateway, f"{party.name} {party.two.ip}": party.two.ip}
        guests = {name: guest.ip for name, guest in party.guests.items()}
        for name, ip in {**places, **guests}.items():
            ping = f"ping -c 1 -W 2 {ip}"
            found.append(Call("icmp", party.name, name, ping, f"icmp-{ip}"))
        for name, ip in guests.items():
            ssh = f"nc -w 2 {ip} 22"
            found.append(Call("tcp", party.name, name, ssh, f"tcp-{ip}"))
    return found


def _inside(network: IPv4Network) -> IPv4Address:
    """An address of it that can be sent to."""
    return OUTSIDE if OUTSIDE in network else max(network[0], min(network[-1], IPv4Address("1.1.1.1")))
