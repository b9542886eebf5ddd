"""What each start asks of a bridge and a TAP, over netlink. The layout is the kernel's ``linux/if_link.h``.

Everything raises the kernel's `OSError`: ENODEV where there is no such interface, EOPNOTSUPP where it is no bridge.
"""

from __future__ import annotations

import socket
import struct
from ipaddress import IPv4Address

from mvm.domain.frames import mac_bytes
from mvm.drivers.netlink import ACK, CREATE, REPLACE, REQUEST, Line, attribute, frame, nested

_ROUTE = 0  # NETLINK_ROUTE
_NEW_LINK, _NEW_ADDRESS, _NEW_NEIGHBOUR = 16, 20, 28
_PERMANENT = 0x80  # NUD_PERMANENT
_DESTINATION, _HARDWARE = 1, 2
_UP = 1
_MAC, _MASTER, _INFO, _OF_FAMILY = 1, 10, 18, 26
_KIND, _DATA, _STP = 1, 2, 5
_GENERATES, _NONE = 8, 1  # IFLA_INET6_ADDR_GEN_MODE
_ADDRESS, _LOCAL = 1, 2


class Interfaces:
    """In the network namespace of whichever thread uses it."""

    def __init__(self) -> None:
        self._line = Line(_ROUTE)

    def bridge_up(self, name: str, mac: str) -> None:
        """The bridge `name` is up, has this address, and makes none of its own."""
        bridge = nested(_INFO, attribute(_KIND, b"bridge\0"), nested(_DATA, attribute(_STP, struct.pack("=I", 0))))
        self._change(name, attribute(_MAC, mac_bytes(mac)) + bridge)

    def port_up(self, name: str, bridge: str) -> None:
        """The interface `name` is a port of `bridge`, and up."""
        self._change(name, attribute(_MASTER, struct.pack("=I", socket.if_nametoindex(bridge))))

    def give(self, name: str, address: IPv4Address, prefix: int) -> None:
        """The interface `name` has this address."""
        head = struct.pack("=BBBBI", socket.AF_INET, prefix, 0, 0, socket.if_nametoindex(name))
        own = attribute(_LOCAL, address.packed) + attribute(_ADDRESS, address.packed)
        self._line.ask(frame(_NEW_ADDRESS, 1, REQUEST | ACK | CREATE | REPLACE, head + own), 1)

    def settle(self, bridge: str, address: IPv4Address, mac: str) -> None:
        """A guest's place among the neighbours on `bridge`, known and kept however many others there are.

        Who is asked for by ARP has to find room in a table that all namespaces of the host share.
        """
        head = struct.pack("=BxxxiHBB", socket.AF_INET, socket.if_nametoindex(bridge), _PERMANENT, 0, 0)
        place = attribute(_DESTINATION, address.packed) + attribute(_HARDWARE, mac_bytes(mac))
        self._line.ask(frame(_NEW_NEIGHBOUR, 1, REQUEST | ACK | CREATE | REPLACE, head + place), 1)

    def _change(self, name: str, attributes: bytes) -> None:
        head = struct.pack("=BxHiII", socket.AF_UNSPEC, 0, socket.if_nametoindex(name), _UP, _UP)
        silent = nested(_OF_FAMILY, nested(socket.AF_INET6, attribute(_GENERATES, bytes([_NONE]))))
        self._line.ask(frame(_NEW_LINK, 1, REQUEST | ACK, head + attributes + silent), 1)
