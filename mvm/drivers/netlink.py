"""Messages to the kernel over netlink, as every start and stop needs them: a program costs milliseconds.

The layout is that of the kernel's ``linux/netlink.h``.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
import weakref
from pathlib import Path

REQUEST, ACK, REPLACE, CREATE = 0x1, 0x4, 0x100, 0x400
_ERROR = 2  # NLMSG_ERROR, also an acknowledgement
_NESTED = 0x8000
_ENOUGH = 1 << 16


class Line:
    """A line to the kernel, in the network namespace of whichever thread uses it.

    It is kept open: to close one is to wait until the kernel has forgotten what was removed, 10 ms and more.
    """

    def __init__(self, protocol: int) -> None:
        self._protocol = protocol
        self._lock = threading.Lock()
        self._open: tuple[os.stat_result, int, weakref.finalize[[int], Line]] | None = None

    def ask(self, messages: bytes, answers: int) -> None:
        """The kernel has done what `messages` ask for, and acknowledged it so many times. Raises its `OSError`."""
        with self._lock:
            sock = socket.socket(fileno=self._descriptor())
            try:
                sock.sendto(messages, (0, 0))
                _check(sock, answers)
            finally:
                sock.detach()

    def _descriptor(self) -> int:
        here = Path("/proc/thread-self/ns/net").stat()
        if self._open is not None:
            there, known, closing = self._open
            if os.path.samestat(here, there):
                return known
            self._open = None
            closing()
        sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, self._protocol)
        sock.bind((0, 0))
        descriptor = sock.detach()
        self._open = here, descriptor, weakref.finalize(self, os.close, descriptor)
        return descriptor


def frame(kind: int, number: int, flags: int, body: bytes) -> bytes:
    """One message."""
    return struct.pack("=IHHII", 16 + len(body), kind, flags, number, 0) + body


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute of a message."""
    return struct.pack("=HH", 4 + len(value), kind) + value + b"\0" * (-len(value) % 4)


def nested(kind: int, *attributes: bytes) -> bytes:
    """An attribute that holds others."""
    return attribute(kind | _NESTED, b"".join(attributes))


def _check(sock: socket.socket, expected: int) -> None:
    """The kernel has done all of it, or says what it would not; it has answered when `sendto` returns."""
    codes: list[int] = []
    while True:
        try:
            data = sock.recv(_ENOUGH, socket.MSG_DONTWAIT)
        except BlockingIOError:
            break
        while data:
            length, kind = struct.unpack_from("=IH", data)
            if kind == _ERROR:
                codes += struct.unpack_from("=i", data, 16)
            data = data[(length + 3) & ~3 :]
    refused = next((-code for code in codes if code), 0 if len(codes) == expected else errno.EPROTO)
    if refused:
        raise OSError(refused, os.strerror(refused))
