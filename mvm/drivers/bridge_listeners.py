"""Sockets that hear one bridge alone, and word of bridges that come and go."""

from __future__ import annotations

import re
import socket

from mvm.domain.addressing import METADATA

PORT = 80
_BRIDGE = re.compile(r"br-tenant-[0-9]+")
_BACKLOG = 32
_LINKS = 1  # the kernel's multicast group of interfaces


def bridges() -> dict[str, int]:
    """The tenants' bridges in this network namespace, and their numbers: one that was made anew has another."""
    return {name: index for index, name in socket.if_nameindex() if _BRIDGE.fullmatch(name)}


def listen(bridge: str) -> socket.socket:
    """A listening socket on the metadata address that takes only what arrives on `bridge`. Raises `OSError`."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, bridge.encode())
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 1)
        sock.setblocking(False)
        sock.bind((str(METADATA), PORT))
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def changes() -> socket.socket:
    """A socket that becomes readable when any interface comes, goes or changes."""
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    sock.setblocking(False)
    sock.bind((0, _LINKS))
    return sock
