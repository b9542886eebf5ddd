"""Listening on loopback where people are and where the stack is.

A socket belongs to the network namespace of the thread that makes it, and stays there. The stack's parts run in a
namespace of their own, their parent (the supervisor) in the host's: people reach a part through a second socket
that was made over there.
"""

from __future__ import annotations

import socket

from mvm.drivers import netns
from mvm.errors import NotAllowed


def loopback_listeners(port: int, *, namespaced: bool) -> list[socket.socket]:
    """Listening sockets on 127.0.0.1:`port`: here and, if `namespaced`, in the parent process's namespace.

    Raises `NotAllowed` (``stack.port_taken``).
    """
    found = [_listen(port)]
    outside = netns.of_parent() if namespaced else None
    if outside is not None:
        with netns.entered(outside):
            found.append(_listen(port))
    return found


def _listen(port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", port))
        sock.listen(64)
    except OSError as error:
        sock.close()
        raise NotAllowed("stack.port_taken", f"127.0.0.1:{port}: {error.strerror}", port=port) from None
    sock.setblocking(False)
    return sock
