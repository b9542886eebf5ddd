"""Members of nftables sets, put and taken over netlink.

One message batch is one transaction. The layout is the kernel's ``linux/netfilter/nf_tables.h``.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address

from mvm.domain.firewall import Element
from mvm.domain.frames import mac_bytes
from mvm.drivers.netlink import ACK, CREATE, REQUEST, Line, attribute, frame, nested

_NETFILTER = 12  # NETLINK_NETFILTER
_NFTABLES = 10  # NFNL_SUBSYS_NFTABLES
_BEGIN, _END = 0x10, 0x11
_NEW, _DELETE = _NFTABLES << 8 | 12, _NFTABLES << 8 | 14  # NFT_MSG_NEWSETELEM, NFT_MSG_DELSETELEM
_FAMILIES = {"inet": 1, "bridge": 7}
_LIST_TABLE, _LIST_SET, _LIST_ELEMENTS, _LIST_ELEM = 1, 2, 3, 1
_KEY, _DATA, _VALUE, _VERDICT, _CODE, _CHAIN = 1, 2, 1, 2, 1, 2
_ACCEPT, _JUMP = 1, -3


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
    """What speaks to the kernel about members, in the network namespace of whichever thread uses it."""

    def __init__(self) -> None:
        self._line = Line(_NETFILTER)

    def change(self, elements: Sequence[Element], removed: Sequence[Element]) -> None:
        """`removed` are gone and `elements` there: all of it or nothing.

        Raises `OSError`, such as ENOENT when there is no such set, or no chain that a member leads to.
        """
        wanted = [(each, kind) for each in removed for kind in (_NEW, _DELETE)]
        wanted += [(each, _NEW) for each in elements]
        if not wanted:
            return
        messages = [_message(kind, number, each) for number, (each, kind) in enumerate(wanted, 1)]
        begin, end = (frame(kind, 0, REQUEST, _head(0, _NFTABLES)) for kind in (_BEGIN, _END))
        self._line.ask(b"".join([begin, *messages, end]), len(messages))


def _message(kind: int, number: int, element: Element) -> bytes:
    family, table, name = element.of.split()
    parts = element.key.split(" . ")
    key = b"".join(encode(part) for encode, part in zip(_KINDS.get(element.of, _POOL), parts, strict=True))
    inside = nested(_KEY, attribute(_VALUE, key))
    if element.verdict and kind == _NEW:
        inside += nested(_DATA, nested(_VERDICT, _verdict(element.verdict)))
    body = (
        attribute(_LIST_TABLE, table.encode() + b"\0")
        + attribute(_LIST_SET, name.encode() + b"\0")
        + nested(_LIST_ELEMENTS, nested(_LIST_ELEM, inside))
    )
    flags = REQUEST | ACK | (CREATE if kind == _NEW else 0)
    return frame(kind, number, flags, _head(_FAMILIES[family], 0) + body)


def _verdict(text: str) -> bytes:
    word, _, chain = text.partition(" ")
    if word == "accept":
        return attribute(_CODE, struct.pack("!i", _ACCEPT))
    return attribute(_CODE, struct.pack("!i", _JUMP)) + attribute(_CHAIN, chain.encode() + b"\0")


def _head(family: int, resource: int) -> bytes:
    return struct.pack("!BBH", family, 0, resource)
