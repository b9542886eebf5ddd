"""Hosts that say that nobody listens where a datagram was sent: how a client is missed that was killed.

Linux tells a socket so (ICMP's "port unreachable") only when it has asked for it, and then whom it is about.
"""

from __future__ import annotations

import socket
from typing import Any

_IP_RECVERR = 11  # not in Python's socket module
_MSG_ERRQUEUE = socket.MSG_ERRQUEUE
_DATAGRAM = 64  # of what was sent nothing is needed
_ABOUT = 512


class Refusals:
    """The errors of one IPv4 UDP socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        sock.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, 1)

    def take(self) -> set[Any]:
        """The addresses about which there were errors since the last time. All are taken, or epoll would not rest."""
        refused: set[Any] = set()
        while True:
            try:
                *_, address = self._sock.recvmsg(_DATAGRAM, _ABOUT, _MSG_ERRQUEUE)
            except BlockingIOError:
                return refused
            refused.add(address)
