"""Listening on bridges, and speaking HTTP with guests of which some mean harm: everything is bounded.

One listening socket per bridge, bound to the device: what arrives there came from a guest of that tenant. Nothing that
is sent lives for more than one hop, so it ends in the guest that asked.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from contextlib import suppress
from ipaddress import IPv4Address

import h11
import structlog

from mvm.domain.metadata import Self
from mvm.errors import MvmError
from mvm.metadata.answers import Answer, Answers

log = structlog.get_logger(__name__)

HEADER_BYTES = 8192
REQUEST_S = 5.0  # for a whole request to arrive, and for the next one on a connection
CONNECTIONS, PER_BRIDGE, PER_GUEST = 256, 64, 8  # a tenant of many guests leaves room for others
REQUESTS = 100  # on one connection
LINGER_S, LINGER_BYTES = 2.0, 4 << 20
RATE, BURST = 50.0, 100  # connections and requests of one bridge, per second and at once
_PIECE = 4096

Asker = Callable[[str, IPv4Address], Self | None]


class Pace:
    """No more than `rate` per second, but for a `burst`."""

    def __init__(self, rate: float = RATE, burst: int = BURST) -> None:
        self._rate, self._burst = rate, burst
        self._left, self._at = float(burst), time.monotonic()

    async def turn(self) -> None:
        """Wait for one's turn."""
        now = time.monotonic()
        self._left = min(self._burst, self._left + (now - self._at) * self._rate) - 1
        self._at = now
        if self._left < 0:
            await asyncio.sleep(-self._left / self._rate)


class Server:
    """Answers on any number of listening sockets. `asker` says who a guest is; it is called in `threads`."""

    def __init__(self, answers: Answers, asker: Asker, threads: Executor) -> None:
        self._answers = answers
        self._asker = asker
        self._threads = threads
        self._open: Counter[tuple[str, str]] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()

    async def listen(self, listener: socket.socket, bridge: str) -> None:
        """Serve `listener`, which is closed at the end, until cancelled.

        Those of one bridge wait for each other: who floods is the only one to feel it.
        """
        loop, pace = asyncio.get_running_loop(), Pace()
        with listener:
            while True:
                await pace.turn()
                try:
                    connection, (address, _) = await loop.sock_accept(listener)
                except OSError:  # it has gone before it was there
                    continue
                guest = (bridge, str(address))
                if self._is_full(guest):
                    connection.close()
                    continue
                self._open[guest] += 1
                task = asyncio.create_task(self._serve(connection, guest, pace))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    def _is_full(self, guest: tuple[str, str]) -> bool:
        of_bridge = sum(count for (bridge, _), count in self._open.items() if bridge == guest[0])
        return self._open[guest] >= PER_GUEST or of_bridge >= PER_BRIDGE or self._open.total() >= CONNECTIONS

    async def _serve(self, connection: socket.socket, guest: tuple[str, str], pace: Pace) -> None:
        try:
            connection.setblocking(False)
            with connection, suppress(OSError, TimeoutError, h11.LocalProtocolError):
                await _Conversation(connection, lambda request: self._answer(guest, request)).run(pace)
        finally:
            self._open[guest] -= 1
            self._open += Counter()  # forgets those that have none

    async def _answer(self, guest: tuple[str, str], request: h11.Request) -> Answer:
        bridge, address = guest
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in request.headers}
        try:
            who = await asyncio.get_running_loop().run_in_executor(
                self._threads, self._asker, bridge, IPv4Address(address)
            )
        except MvmError as error:
            log.warning("metadata.store_failed", code=error.code, error=error.message)
            return Answer(503, "try again\n")
        answer = self._answers.to(who, request.method.decode("latin-1"), request.target.decode("latin-1"), headers)
        if answer.status == 403:
            log.info("metadata.refused", bridge=bridge, address=address)
        return answer


class _Conversation:
    """One connection."""

    def __init__(self, sock: socket.socket, answer: Callable[[h11.Request], Awaitable[Answer]]) -> None:
        self._sock = sock
        self._answer = answer
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=HEADER_BYTES)

    async def run(self, pace: Pace) -> None:
        """Answer until either side has had enough. Raises `TimeoutError` and `OSError`."""
        for number in range(REQUESTS):
            if number:
                await pace.turn()
            try:
                async with asyncio.timeout(REQUEST_S):
                    request = await self._request()
            except h11.RemoteProtocolError as error:
                await self._send("GET", Answer(error.error_status_hint, "", {"Connection": "close"}))
                await self._hear_out()
                return
            if request is None:
                return
            answer = await self._answer(request)
            await self._send(request.method.decode("latin-1"), answer)
            if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
                return
            self._http.start_next_cycle()

    async def _hear_out(self) -> None:
        """Throw away what still comes, for a while: closed at once, the answer would be lost on its way."""
        self._sock.shutdown(socket.SHUT_WR)
        left = LINGER_BYTES
        async with asyncio.timeout(LINGER_S):
            while left > 0 and (data := await asyncio.get_running_loop().sock_recv(self._sock, 65536)):
                left -= len(data)

    async def _request(self) -> h11.Request | None:
        """The next request, which has no body; None when there will be none."""
        request = None
        while True:
            event = self._http.next_event()
            if event is h11.NEED_DATA:
                if self._http.they_are_waiting_for_100_continue:
                    raise h11.RemoteProtocolError("no bodies here", error_status_hint=413)
                self._http.receive_data(await asyncio.get_running_loop().sock_recv(self._sock, _PIECE))
            elif isinstance(event, h11.Request):
                _check_framing(event)
                request = event
            elif isinstance(event, h11.Data):
                raise h11.RemoteProtocolError("no bodies here", error_status_hint=413)
            elif isinstance(event, h11.EndOfMessage):
                return request
            else:  # it has closed its side, or wants another protocol
                return None

    async def _send(self, method: str, answer: Answer) -> None:
        body = answer.body.encode()
        headers = {"Content-Length": str(len(body)), "Content-Type": "text/plain; charset=utf-8", **answer.headers}
        response = h11.Response(status_code=answer.status, headers=list(headers.items()), reason=b"")
        pieces = [self._http.send(response)]
        if method != "HEAD":
            pieces.append(self._http.send(h11.Data(data=body)))
        pieces.append(self._http.send(h11.EndOfMessage()))
        async with asyncio.timeout(REQUEST_S):
            await asyncio.get_running_loop().sock_sendall(self._sock, b"".join(filter(None, pieces)))


def _check_framing(request: h11.Request) -> None:
    """Raises `h11.RemoteProtocolError` when it is told twice where the request ends: somebody reads it otherwise."""
    names = {name for name, _ in request.headers}
    if {b"content-length", b"transfer-encoding"} <= names:
        raise h11.RemoteProtocolError("Content-Length beside Transfer-Encoding", error_status_hint=400)
