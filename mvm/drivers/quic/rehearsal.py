"""Two certificates tried out on each other: the handshake that they are for, in memory, before anybody relies on it."""

from __future__ import annotations

from aioquic.quic.connection import QuicConnection
from aioquic.quic.events import StreamDataReceived

from mvm.domain.ids import NodeId
from mvm.drivers.quic.identity import Credentials, Peer, Refused
from mvm.drivers.quic.tls import ClientQuic, ServerQuic, server_configuration

_CLIENT_ADDRESS, _SERVER_ADDRESS = ("127.0.0.1", 1), ("127.0.0.1", 2)
_FLIGHTS = 100  # a handshake takes a few
_FLIGHT_S = 0.01  # of a clock of its own
_WORD = b"heard"


def rehearse(server: Credentials, client: Credentials, node: NodeId) -> Peer:
    """A mutual handshake and one request over it, without a socket; who `server` takes the client for.

    Raises `Refused` when either side would not have the other, or the server is not `node`.
    """
    caller = ClientQuic(client, node)
    now = 0.0
    caller.connect(_SERVER_ADDRESS, now=now)
    answerer = ServerQuic.adopt(
        QuicConnection(
            configuration=server_configuration(server),
            original_destination_connection_id=caller.original_destination_connection_id,
        ),
        server.store,
    )
    caller.send_stream_data(caller.get_next_available_stream_id(), _WORD, end_stream=True)
    heard = b""
    for _ in range(_FLIGHTS):
        now += _FLIGHT_S
        _carry(caller, answerer, _CLIENT_ADDRESS, now)
        _carry(answerer, caller, _SERVER_ADDRESS, now)
        _check(caller, "the node's")
        _check(answerer, "the coordinator's")
        while (event := answerer.next_event()) is not None:
            heard += event.data if isinstance(event, StreamDataReceived) else b""
        if heard == _WORD and answerer.peer is not None:
            return answerer.peer
    raise Refused("the handshake that they are for does not come to an end")


def _carry(sender: QuicConnection, receiver: QuicConnection, address: tuple[str, int], now: float) -> None:
    timer = sender.get_timer()
    if timer is not None and timer <= now:
        sender.handle_timer(now)
    for data, _ in sender.datagrams_to_send(now):
        receiver.receive_datagram(data, address, now)


def _check(quic: QuicConnection, whose: str) -> None:
    ended = quic._close_event
    if ended is not None:
        raise Refused(f"{whose} certificate is refused in a handshake: {ended.reason_phrase}")
