"""Ethernet frames as bytes: what a guest may send, and what it may not."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address

IP, ARP, VLAN, QINQ, IPV6, EXPERIMENT = 0x0800, 0x0806, 0x8100, 0x88A8, 0x86DD, 0x88B5
BROADCAST = "ff:ff:ff:ff:ff:ff"
LINK_LOCAL_GROUP = "01:80:c2:00:00:03"  # a bridge keeps frames to it for the port's own host
_ICMP, _TCP, _UDP = 1, 6, 17
_ECHO = 8
_REQUEST, _REPLY = 1, 2
SYN, ACK = 0x02, 0x10


def mac_bytes(mac: str) -> bytes:
    """Six of them."""
    return bytes.fromhex(mac.replace(":", ""))


def ethernet(to: str, source: str, kind: int, payload: bytes) -> bytes:
    """A frame, padded to the least length."""
    return (mac_bytes(to) + mac_bytes(source) + struct.pack("!H", kind) + payload).ljust(60, b"\0")


def tagged(frame: bytes, kind: int = VLAN, vlan: int = 0) -> bytes:
    """The same frame with a VLAN tag."""
    return frame[:12] + struct.pack("!HH", kind, vlan) + frame[12:]


def arp(
    source: str, sender_mac: str, sender: IPv4Address, target: IPv4Address, token: bytes = b"", *, reply: bool = False
) -> bytes:
    """Who has `target`, or that `sender` is at `sender_mac`; broadcast. `token` lies behind the packet."""
    body = struct.pack("!HHBBH", 1, IP, 6, 4, _REPLY if reply else _REQUEST)
    body += mac_bytes(sender_mac) + sender.packed + bytes(6) + target.packed
    return ethernet(BROADCAST, source, ARP, body + token)


def arp_answer(mac: str, address: IPv4Address, to_mac: str, to: IPv4Address) -> bytes:
    """What is in the answer that `address` is at `mac`."""
    return struct.pack("!H", _REPLY) + mac_bytes(mac) + address.packed + mac_bytes(to_mac) + to.packed


def echo(source: IPv4Address, to: IPv4Address, token: bytes, *, ident: int = 1) -> bytes:
    """An ICMP echo request in an IP packet; one `ident` is one conversation."""
    head = struct.pack("!BBHHH", _ECHO, 0, 0, ident, 1)
    body = struct.pack("!BBHHH", _ECHO, 0, _checksum(head + token), ident, 1) + token
    return _packet(_ICMP, source, to, body)


def udp(source: IPv4Address, to: IPv4Address, token: bytes, *, port: int, sport: int) -> bytes:
    """A datagram in an IP packet; without a checksum, which IPv4 allows."""
    return _packet(_UDP, source, to, struct.pack("!HHHH", sport, port, 8 + len(token), 0) + token)


def tcp(source: IPv4Address, to: IPv4Address, number: int, *, port: int, sport: int, flags: int = SYN) -> bytes:
    """A segment in an IP packet, with `number` as its sequence number."""
    head = struct.pack("!HHIIBBHHH", sport, port, number, 0, 5 << 4, flags, 8192, 0, 0)
    pseudo = source.packed + to.packed + struct.pack("!BBH", 0, _TCP, len(head))
    checked = head[:16] + struct.pack("!H", _checksum(pseudo + head)) + head[18:]
    return _packet(_TCP, source, to, checked)


def _packet(protocol: int, source: IPv4Address, to: IPv4Address, body: bytes) -> bytes:
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(body), 0, 0, 64, protocol, 0, source.packed, to.packed)
    return head[:10] + struct.pack("!H", _checksum(head)) + head[12:] + body


def _checksum(data: bytes) -> int:
    data += b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
