"""The agent's QUIC endpoint: nothing reaches the dispatcher before the peer's certificate is verified."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import cast

import structlog
from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.asyncio.server import QuicServer
from aioquic.quic import events
from aioquic.quic.connection import NetworkAddress, QuicConnection
from cryptography.x509.verification import Store

from mvm.agent.dispatch import Dispatcher, Reply, error_frame
from mvm.agent.refusals import Refusals
from mvm.agent.renewal import Renewal
from mvm.agent.room import Room
from mvm.drivers.quic.frames import FrameReader
from mvm.drivers.quic.identity import Peer
from mvm.drivers.quic.tls import ServerQuic, server_configuration
from mvm.errors import InvalidInput

log = structlog.get_logger(__name__)

HANDSHAKE_S = 5.0
WATCH_S = 0.3  # how often a client is asked for a sign that has something at work which must end with it
DOUBT_S = 0.25  # how long one has for that whose host says that nobody listens there
MAX_HELD = 4 << 20  # bytes of unfinished requests on one connection
_UNIDIRECTIONAL = 2  # this bit of a stream's id
_GIVEN_UP = 1  # application code of a stream we no longer read


class _Peering(QuicConnectionProtocol):
    """One connection."""

    def __init__(self, quic: QuicConnection, endpoint: Endpoint, source: str) -> None:
        self._guarded = ServerQuic.adopt(quic, endpoint.store)
        super().__init__(quic)
        self._endpoint = endpoint
        self._requests: dict[int, _Incoming] = {}
        self._replies: dict[int, Reply] = {}
        self._deaf: set[int] = set()  # answered before the request had ended; the rest is not read
        self._limit = self._loop.call_later(HANDSHAKE_S, partial(self.expire, "no handshake in time"))
        self._heard = self._loop.time()
        self._watching = False
        self.peer: Peer | None = None
        self.source = source
        self.since = self._loop.time()

    @property
    def closing(self) -> bool:
        """Ended by either side; it only lingers to answer stray packets."""
        return self._quic._close_event is not None

    @property
    def address(self) -> NetworkAddress | None:
        """Where the other side is."""
        paths = self._quic._network_paths
        return paths[0].addr if paths else None

    def datagram_received(self, data: bytes | str, addr: NetworkAddress) -> None:
        self._heard = self._loop.time()
        super().datagram_received(data, addr)
        if self.closing:  # aioquic tells it only after a while
            self._hang_up()

    def doubt(self) -> None:
        """Its host says that nobody listens there. Anybody may have said so; whoever lives gives a sign."""
        if self._replies and not self.closing:  # nothing else is in a hurry
            self._ask()
            self._loop.call_later(DOUBT_S, self._judge, self._loop.time())

    def quic_event_received(self, event: events.QuicEvent) -> None:
        match event:
            case events.HandshakeCompleted():
                self._verified()
            case events.StreamDataReceived() if self.peer is not None:
                self._take(self.peer, event)
            case events.StreamReset() | events.StopSendingReceived():
                self._cancel(event.stream_id)
            case events.ConnectionTerminated():
                self._ended(event)

    def transmit(self) -> None:
        super().transmit()
        for reply in list(self._replies.values()):
            reply.check_room()

    def answered(self, stream: int, reply: Reply) -> None:
        """The reply's thread has ended."""
        self._replies.pop(stream, None)
        self._endpoint.answering.discard(reply)
        self._endpoint.changed.set()

    def _verified(self) -> None:
        self._limit.cancel()
        peer = self._guarded.peer
        if peer is None:  # the guards let nobody come so far
            self.expire("unverified")
            return
        if not self._endpoint.room.for_peer(peer):
            self.expire(f"no room for another connection of {peer}")
            return
        self.peer = peer
        # A certificate is looked at once; no connection outlives it.
        left = (self.peer.not_after - datetime.now(UTC)).total_seconds()
        self._limit = self._loop.call_later(max(left, 0.0), partial(self.expire, "the certificate has expired"))

    def _take(self, peer: Peer, event: events.StreamDataReceived) -> None:
        stream = event.stream_id
        if stream & _UNIDIRECTIONAL:
            self.expire("unidirectional streams are not used")
            return
        if stream in self._deaf:
            if event.end_stream:
                self._deaf.discard(stream)
            return
        incoming = self._requests.setdefault(stream, _Incoming())
        incoming.held += len(event.data)
        if sum(request.held for request in self._requests.values()) > MAX_HELD:
            self.expire("too many unfinished requests")
            return
        try:
            incoming.messages += incoming.reader.feed(event.data)
            if not event.end_stream and len(incoming.messages) <= 1:
                return
            if incoming.reader.pending or len(incoming.messages) != 1:
                raise InvalidInput("agent.bad_frame", "a request is one frame and then the stream's end")
        except InvalidInput as error:
            if not event.end_stream:
                self._deaf.add(stream)
                self._quic.stop_stream(stream, _GIVEN_UP)
            self._begin(stream).finish(error_frame(error))
        else:
            self._endpoint.dispatcher.begin(peer, incoming.messages[0], self._begin(stream))
            if not self._watching:
                self._watch()

    def _watch(self) -> None:
        """Talk to a client whose work must end with it: of one that says nothing nobody hears that it has gone."""
        self._watching = not self.closing and any(reply.ends_with_client for reply in self._replies.values())
        if self._watching:
            if self._loop.time() > self._heard + WATCH_S / 2:
                self._ask()
            self._loop.call_later(WATCH_S, self._watch)

    def _ask(self) -> None:
        self._quic.send_ping(id(self))
        self.transmit()

    def _judge(self, asked: float) -> None:
        if self._heard < asked:
            self.expire("nobody listens there any more")

    def _hang_up(self) -> None:
        for reply in self._replies.values():
            reply.cancel()

    def _begin(self, stream: int) -> Reply:
        self._requests.pop(stream, None)
        reply = Reply(self._loop, _Outlet(self, self._quic, stream), partial(self.answered, stream))
        self._replies[stream] = reply
        self._endpoint.answering.add(reply)
        return reply

    def _cancel(self, stream: int) -> None:
        self._requests.pop(stream, None)
        self._deaf.discard(stream)
        if stream in self._replies:
            self._replies[stream].cancel()

    def expire(self, why: str) -> None:
        """End it, and tell the other side why."""
        if not self.closing:
            log.info("agent.connection_closed", peer=str(self.peer), why=why)
        self.close(reason_phrase=why)
        self._hang_up()

    def _ended(self, event: events.ConnectionTerminated) -> None:
        self._limit.cancel()
        self._endpoint.connections.discard(self)
        if self.peer is None:
            log.info("agent.peer_refused", code=hex(event.error_code), why=event.reason_phrase)
        self._requests.clear()
        self._hang_up()


class _NoRoom(Exception):
    """A new connection is one too many."""


class _Incoming:
    """A request that has not come whole."""

    def __init__(self) -> None:
        self.reader = FrameReader()
        self.messages: list[dict[str, object]] = []
        self.held = 0


class _Outlet:
    """The sending side of one stream of a connection."""

    def __init__(self, peering: _Peering, quic: QuicConnection, stream: int) -> None:
        self._peering = peering
        self._quic = quic
        self._stream = stream
        self._written = 0

    def write(self, data: bytes, *, end: bool) -> None:
        if self._quic._close_event is None and self._quic._stream_can_send(self._stream):
            self._quic.send_stream_data(self._stream, data, end_stream=end)
            self._written += len(data)
            self._peering.transmit()

    def unsent(self) -> int:
        stream = self._quic._streams.get(self._stream)
        return self._written - stream.sender.highest_offset if stream is not None else 0


class Endpoint(QuicServer):
    """All connections of one UDP socket, a bounded number, each address proven (retry) before it costs memory."""

    def __init__(self, renewal: Renewal, dispatcher: Dispatcher, sock: socket.socket) -> None:
        configuration = server_configuration(renewal.credentials)
        super().__init__(configuration=configuration, create_protocol=self._connect, retry=True)
        self._refusals = Refusals(sock)
        self._renewal = renewal
        self.store: Store = renewal.credentials.store
        self._source = ""
        self.dispatcher = dispatcher
        self.connections: set[_Peering] = set()
        self.answering: set[Reply] = set()
        self.changed = asyncio.Event()
        self.room = Room(self.connections, lambda held, why: cast(_Peering, held).expire(why))

    def datagram_received(self, data: bytes | str, addr: NetworkAddress) -> None:
        """Drop what would open one connection too many. New ones see the certificates of now."""
        assert isinstance(data, bytes)
        if self._opens(data):
            self._source = str(addr[0])
            if self._renewal.renewed():
                self._configuration = server_configuration(self._renewal.credentials)
                self.store = self._renewal.credentials.store
        with suppress(_NoRoom):
            super().datagram_received(data, addr)

    def error_received(self, exc: Exception) -> None:
        """The network has told of an error. It may do so while a connection sends, so what follows comes later."""
        refused = self._refusals.take()
        for connection in self.connections:
            if connection.address in refused:
                self._loop.call_soon(connection.doubt)

    async def drain(self, *, grace_s: float) -> None:
        """Take no new requests, end the streams, give the others `grace_s` to finish, and close."""
        self.dispatcher.stopping = True
        loop = asyncio.get_running_loop()
        deadline = loop.time() + grace_s
        for reply in list(self.answering):
            reply.stop()
        while self.answering and loop.time() < deadline:
            self.changed.clear()
            try:
                await asyncio.wait_for(self.changed.wait(), deadline - loop.time())
            except TimeoutError:
                log.warning("agent.requests_abandoned", count=len(self.answering))
        self.close()

    def _opens(self, data: bytes) -> bool:
        """Whether this datagram, with a long header, is of a connection we do not know."""
        return len(data) > 6 and data[0] & 0x80 != 0 and data[6 : 6 + data[5]] not in self._protocols

    def _connect(self, quic: QuicConnection, stream_handler: Callable[..., None] | None = None) -> _Peering:
        """A connection whose address has been proven by a retry token, before anything of it is kept."""
        if not self.room.for_handshake(self._source, asyncio.get_running_loop().time()):
            raise _NoRoom
        peering = _Peering(quic, self, self._source)
        self.connections.add(peering)
        return peering
