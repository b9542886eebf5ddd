"""The metadata service's bounds, over the loopback interface: two sockets stand for two tenants' bridges."""

from __future__ import annotations

import asyncio
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, suppress

from mvm.domain.metadata import Self
from mvm.metadata.answers import Answers
from mvm.metadata.server import BURST, PER_BRIDGE, PER_GUEST, Server

_GUESTS = BURST // PER_GUEST
_REQUEST = b"GET / HTTP/1.1\r\nHost: 169.254.169.254\r\nConnection: close\r\n\r\n"
_DEADLINE_S = 4.0  # the server's own for a request is 5 s


def listener() -> socket.socket:
    sock = socket.create_server(("127.0.0.1", 0), backlog=BURST)
    sock.setblocking(False)
    return sock


async def connected(stack: AsyncExitStack, port: int, guest: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(f"127.0.1.{guest}", 0))
    stack.callback(writer.close)
    return reader, writer


async def flood() -> tuple[int, bytes]:
    """How many connections of a tenant that opens many are kept, and what another tenant's guest is told."""
    with ThreadPoolExecutor(1) as threads, ExitStack() as sockets:
        server = Server(Answers(b"key"), lambda bridge, _: Self(bridge, {}), threads)
        ears = {name: sockets.enter_context(listener()) for name in ("bad", "good")}
        tasks = [asyncio.create_task(server.listen(ear, name)) for name, ear in ears.items()]
        async with AsyncExitStack() as stack:
            ports = {name: ear.getsockname()[1] for name, ear in ears.items()}
            many = [await connected(stack, ports["bad"], 1 + n % _GUESTS) for n in range(_GUESTS * PER_GUEST)]
            ends = [asyncio.ensure_future(reader.read(1)) for reader, _ in many]
            while sum(end.done() for end in ends) < len(many) - PER_BRIDGE:
                await asyncio.wait([end for end in ends if not end.done()], return_when=asyncio.FIRST_COMPLETED)
            kept = sum(not end.done() for end in ends)
            reader, writer = await connected(stack, ports["good"], 1)
            writer.write(_REQUEST)
            told = await reader.readline()
            for each in (*ends, *tasks):
                each.cancel()
            for each in (*ends, *tasks):
                with suppress(asyncio.CancelledError, OSError):
                    await each
    return kept, told


def test_a_tenant_with_many_guests_leaves_room_for_others() -> None:
    async def bounded() -> tuple[int, bytes]:
        async with asyncio.timeout(_DEADLINE_S):
            return await flood()

    kept, told = asyncio.run(bounded())
    assert kept == PER_BRIDGE < _GUESTS * PER_GUEST
    assert told.split()[1] == b"401"
