"""Members of nftables sets, put and taken over netlink: what every start and stop needs, without a program.

One message batch is one transaction. The layout is the kernel's ``linux/netfilter/nf_tables.h``.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
import weakref
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address
from pathlib import Path

from mvm.domain.firewall import Element
from mvm.domain.frames import mac_bytes

_NETFILTER = 12  # NETLINK_NETFILTER
_NFTABLES = 10  # NFNL_SUBSYS_NFTABLES
_BEGIN, _END = 0x10, 0x11
_NEW, _DELETE = _NFTABLES << 8 | 12, _NFTABLES << 8 | 14  # NFT_MSG_NEWSETELEM, NFT_MSG_DELSETELEM
_REQUEST, _ACK, _CREATE = 0x1, 0x4, 0x400
_ERROR = 2  # NLMSG_ERROR, also an acknowledgement
_NESTED = 0x8000
_FAMILIES = {"inet": 1, "bridge": 7}
_LIST_TABLE, _LIST_SET, _LIST_ELEMENTS, _LIST_ELEM = 1, 2, 3, 1
_KEY, _DATA, _VALUE, _VERDICT, _CODE, _CHAIN = 1, 2, 1, 2, 1, 2
_ACCEPT, _JUMP = 1, -3
_ENOUGH = 1 << 16


def _name(text: str) -> bytes:
    return text.strip('"').encode().ljust(16, b"\0")


def _mac(text: str) -> bytes:
    return mac_bytes(text).ljust(8, b"\0")  # parts of a key begin at multiples of four


def _ip(text: str) -> bytes:
    return IPv4Address(text).packed


_KINDS: dict[str, Sequence[Callable[[str], bytes]]] = {
    "bridge mvm guests": (_name, _mac, _ip),
    "inet mvm bridges": (_name, _name),
    "inet mvm gateways": (_name, _ip),
    "inet mvm egress": (_name,),
}
_POOL: Sequence[Callable[[str], bytes]] = (_ip,)  # every other set's


class Members:
    """A line to the kernel, in the network namespace of whichever thread uses it.

    It is kept open: to close one is to wait until the kernel has forgotten what was removed, 10 ms and more.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._line: tuple[os.stat_result, int, weakref.finalize[[int], Members]] | None = None

    def change(self, elements: Sequence[Element], removed: Sequence[Element]) -> None:
        """`removed` are gone and `elements` there: all of it or nothing.

        Raises `OSError`, such as ENOENT when there is no such set, or no chain that a member leads to.
        """
        wanted = [(each, kind) for each in removed for kind in (_NEW, _DELETE)]
        wanted += [(each, _NEW) for each in elements]
        if not wanted:
            return
        messages = [_message(kind, number, each) for number, (each, kind) in enumerate(wanted, 1)]
        begin, end = (_frame(kind, 0, _REQUEST, _head(0, _NFTABLES)) for kind in (_BEGIN, _END))
        with self._lock:
            sock = socket.socket(fileno=self._descriptor())
            try:
                sock.sendto(b"".join([begin, *messages, end]), (0, 0))
                _check(sock, len(messages))
            finally:
                sock.detach()

    def _descriptor(self) -> int:
        here = Path("/proc/thread-self/ns/net").stat()
        if self._line is not None:
            there, known, closing = self._line
            if os.path.samestat(here, there):
                return known
            closing()
        sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETFILTER)
        sock.bind((0, 0))
        descriptor = sock.detach()
        self._line = here, descriptor, weakref.finalize(self, os.close, descriptor)
        return descriptor


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


def _message(kind: int, number: int, element: Element) -> bytes:
    family, table, name = element.of.split()
    parts = element.key.split(" . ")
    key = b"".join(encode(part) for encode, part in zip(_KINDS.get(element.of, _POOL), parts, strict=True))
    inside = _attribute(_KEY | _NESTED, _attribute(_VALUE, key))
    if element.verdict and kind == _NEW:
        inside += _attribute(_DATA | _NESTED, _attribute(_VERDICT | _NESTED, _verdict(element.verdict)))
    body = (
        _attribute(_LIST_TABLE, table.encode() + b"\0")
        + _attribute(_LIST_SET, name.encode() + b"\0")
        + _attribute(_LIST_ELEMENTS | _NESTED, _attribute(_LIST_ELEM | _NESTED, inside))
    )
    flags = _REQUEST | _ACK | (_CREATE if kind == _NEW else 0)
    return _frame(kind, number, flags, _head(_FAMILIES[family], 0) + body)


def _verdict(text: str) -> bytes:
    word, _, chain = text.partition(" ")
    if word == "accept":
        return _attribute(_CODE, struct.pack("!i", _ACCEPT))
    return _attribute(_CODE, struct.pack("!i", _JUMP)) + _attribute(_CHAIN, chain.encode() + b"\0")


def _head(family: int, resource: int) -> bytes:
    return struct.pack("!BBH", family, 0, resource)


def _frame(kind: int, number: int, flags: int, body: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, flags, number, 0) + body


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + b"\0" * (-len(value) % 4)
