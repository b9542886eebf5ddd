"""The agents' client: aioquic's connection, which does no I/O itself, over a connected UDP socket and poll().

No event loop, and nothing heavy imported before the first request: this is on the way of ``mvm instance list``. A
connected socket hears at once (ECONNREFUSED) when nobody listens.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvm.domain.ids import NodeId
from mvm.drivers.quic.frames import FrameReader, encode, join
from mvm.drivers.quic.known_nodes import KnownNodes
from mvm.errors import Failed, Forbidden, InvalidInput, MvmError, TimedOut, Unreachable, error_from_dict

if TYPE_CHECKING:
    from mvm.drivers.quic.identity import Credentials

CONNECT_S = 3.0  # an agent that has not shaken hands by then is not there
PING_S = 2.0  # how long silence lasts before we ask; also how soon a killed agent is noticed
FRESH_S = 1.0  # so long after the agent was heard, a connection that was kept is taken for good
PROOF_S = 0.25  # for it to show after a longer time that the agent still knows it
MAX_PARTS = 1024  # of one answer
_REFUSALS = frozenset({*range(42, 50), 51, 116})  # TLS alerts about certificates


def udp_socket() -> socket.socket:
    """An IPv4 UDP socket in the caller's network namespace."""
    return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)


class QuicAgents:
    """`mvm.ports.agents.NodeAgents`, one connection per request.

    `certs_dir` holds ``ca.pem`` and the certificate and key named `identity`; they are read at the first request.
    `make_socket` makes the UDP socket, in another network namespace if need be. `known` says which node is meant by
    an address that does not say so itself. Threads may share an object.
    """

    def __init__(
        self,
        certs_dir: Path,
        make_socket: Callable[[], socket.socket] = udp_socket,
        *,
        identity: str = "coordinator",
        known: KnownNodes | None = None,
    ) -> None:
        self._known = known or KnownNodes()
        self._certs_dir = certs_dir
        self._make_socket = make_socket
        self._identity = identity
        self._credentials: Credentials | None = None

    def call(self, address: str, method: str, params: Mapping[str, Any], *, deadline_s: float) -> dict[str, Any]:
        """One request, one answer; parts of a long answer are joined. See the port for errors."""
        with self.connected(address) as agent:
            return agent.call(method, params, deadline_s=deadline_s)

    @contextmanager
    def connected(self, address: str) -> Iterator[KeptConnection]:
        """See the port."""
        agent = KeptConnection(address, lambda: self._open(address))
        try:
            yield agent
        finally:
            agent.close()

    def stream(
        self, address: str, method: str, params: Mapping[str, Any], *, deadline_s: float | None
    ) -> Iterator[dict[str, Any]]:
        """One request, sent with the first `next`; answers as they come. Closing the iterator cancels it."""
        frame, deadline = _request(method, params), None if deadline_s is None else time.monotonic() + deadline_s
        connection = self._open(address)
        try:
            yield from connection.request(frame, deadline)
        finally:
            connection.close()

    def _open(self, address: str) -> Connection:
        declared, where = parse_address(address)
        meant = declared or self._known.meant(where)
        learn = partial(self._known.learn, where, declared=declared is not None)
        return open_connection(where, self._load(), self._make_socket, meant=meant, learn=learn)

    def _load(self) -> Credentials:
        if self._credentials is None:
            from mvm.drivers.quic.quick_import import heavy_imports_deferred

            with heavy_imports_deferred():
                from mvm.drivers.quic import tls  # noqa: F401 - imported here, used below
            from mvm.drivers.quic.identity import load_credentials

            self._credentials = load_credentials(self._certs_dir, self._identity)
        return self._credentials


class KeptConnection:
    """One agent, asked again and again: a handshake only for the first request, or when the connection was lost."""

    def __init__(self, address: str, connect: Callable[[], Connection]) -> None:
        self._address = address
        self._connect = connect
        self._connection: Connection | None = None

    def call(self, method: str, params: Mapping[str, Any], *, deadline_s: float) -> dict[str, Any]:
        """See the port."""
        frame, deadline = _request(method, params), time.monotonic() + deadline_s
        if self._connection is not None and not self._connection.proven():
            self.close()
        if self._connection is None:
            self._connection = self._connect()
        whole = False
        try:
            parts: list[dict[str, Any]] = []
            for part in self._connection.request(frame, deadline):
                parts.append(part)
                if len(parts) > MAX_PARTS:
                    raise Failed("agent.protocol", f"the answer of the agent at {self._address} does not end")
            whole = True
        finally:
            if not whole:
                self.close()
        return parts[0] if len(parts) == 1 else join(parts)

    def close(self) -> None:
        """Hang up."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _request(method: str, params: Mapping[str, Any]) -> bytes:
    return encode({"id": os.urandom(8).hex(), "method": method, "params": dict(params)})


def parse_address(address: str) -> tuple[NodeId | None, str]:
    """``[NODE@]HOST:PORT``: the node that must answer there, if it is said, and where.

    Raises `InvalidInput` (``agent.invalid_address``, and that of a node's id).
    """
    name, at, where = address.rpartition("@")
    _host_and_port(where)
    return (NodeId(name) if at else None), where


def _host_and_port(where: str) -> tuple[str, int]:
    host, _, port = where.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise InvalidInput(
            "agent.invalid_address",
            f"{where!r} is not an agent's address",
            hint="write HOST:PORT, or NODE@HOST:PORT",
            field="node",
            value=where[:80],
        )
    return host, int(port)


def open_connection(
    where: str,
    credentials: Credentials,
    make_socket: Callable[[], socket.socket] = udp_socket,
    *,
    meant: NodeId | None = None,
    learn: Callable[[NodeId], None] | None = None,
) -> Connection:
    """A connection to ``HOST:PORT`` that has not spoken yet, to the node `meant` or to any.

    `learn` is told which node has answered. Raises `InvalidInput` for the address and `Unreachable` when there is
    no way to it.
    """
    host, port = _host_and_port(where)
    sock = make_socket()
    try:
        sock.setblocking(False)
        sock.connect((host, port))
    except OSError as error:
        sock.close()
        raise _unreachable(where, error.strerror or str(error)) from None
    return Connection(where, sock, credentials, meant, learn)


class Connection:
    """One QUIC connection, for one request after another. Errors are those of the port."""

    def __init__(
        self,
        address: str,
        sock: socket.socket,
        credentials: Credentials,
        meant: NodeId | None = None,
        learn: Callable[[NodeId], None] | None = None,
    ) -> None:
        from mvm.drivers.quic.tls import ClientQuic

        self._address = address
        self._socket = sock
        self._peer_address = sock.getpeername()
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._begun = time.monotonic()
        self._deadline: float | None = None
        self._heard: float | None = None  # when the last datagram came
        self._asked = self._begun
        self._pings = 0
        self._meant = meant
        self._learn = learn
        self._quic = ClientQuic(credentials, meant)
        self._quic.connect(self._peer_address, now=self._begun)

    def proven(self) -> bool:
        """Whether the agent answers on it now. A request on a lost one would wait long, and could not be repeated."""
        from aioquic.quic.events import PingAcknowledged

        if self._heard is not None and time.monotonic() < self._heard + FRESH_S:
            return True
        self._deadline = self._asked = time.monotonic()
        self._deadline += PROOF_S
        self._pings += 1
        self._quic.send_ping(self._pings)
        try:
            while True:
                self._exchange()
                while (event := self._quic.next_event()) is not None:
                    if isinstance(event, PingAcknowledged) and event.uid == self._pings:
                        return True
                self._check_closed()
        except MvmError:
            return False

    def request(self, frame: bytes, deadline: float | None = None) -> Iterator[dict[str, Any]]:
        """Send one request and yield what is answered until the agent ends the stream; by the monotonic `deadline`."""
        from aioquic.quic.events import StreamDataReceived, StreamReset

        self._deadline, self._asked = deadline, time.monotonic()
        stream = self._quic.get_next_available_stream_id()
        self._quic.send_stream_data(stream, frame, end_stream=True)  # leaves with the end of the handshake
        reader = FrameReader()
        while True:
            while (event := self._quic.next_event()) is not None:
                if isinstance(event, StreamReset):
                    raise Failed("agent.protocol", f"the agent at {self._address} broke its answer off")
                if not isinstance(event, StreamDataReceived) or event.stream_id != stream:
                    continue
                self._learn_who()
                for message in self._feed(reader, event.data):
                    yield _answer(message)
                if event.end_stream:
                    if reader.pending:
                        raise Failed("agent.protocol", f"the agent at {self._address} ended within an answer")
                    return
            self._check_closed()
            self._exchange()

    def close(self) -> None:
        """Tell the agent and be gone; nobody waits for its consent."""
        self._quic.close()
        try:
            self._send()
        except MvmError:
            pass  # it is gone already
        finally:
            self._socket.close()

    def _learn_who(self) -> None:
        """Tell, once, which node answers: it has a certificate for that, and has taken ours."""
        peer = self._quic.peer
        if self._learn is not None and peer is not None:
            self._learn(NodeId(peer.name))
            self._learn = None

    def _feed(self, reader: FrameReader, data: bytes) -> list[dict[str, Any]]:
        try:
            return reader.feed(data)
        except InvalidInput as error:
            raise Failed("agent.protocol", f"the agent at {self._address} sent {error.message}") from None

    def _exchange(self) -> None:
        """Send what is due, wait for the next datagram, timer or deadline, and take in what came."""
        self._send()
        now = time.monotonic()
        until = [t for t in (self._quic.get_timer(), self._deadline, self._patience()) if t is not None]
        if self._poll.poll(max(0.0, min(until) - now) * 1000):
            self._receive()
        now = time.monotonic()
        if self._heard is None and now >= self._begun + CONNECT_S:
            raise _unreachable(self._address, f"no answer within {CONNECT_S:g} s")
        if self._deadline is not None and now >= self._deadline:
            raise self._too_late()
        if now >= self._patience():
            self._asked = now
            self._quic.send_ping(0)
        timer = self._quic.get_timer()
        if timer is not None and now >= timer:
            self._quic.handle_timer(now)

    def _patience(self) -> float:
        return self._begun + CONNECT_S if self._heard is None else max(self._heard, self._asked) + PING_S

    def _send(self) -> None:
        for data, _ in self._quic.datagrams_to_send(time.monotonic()):
            try:
                self._socket.send(data)
            except BlockingIOError:
                return  # as if the network had lost it
            except OSError as error:
                raise _unreachable(self._address, error.strerror or str(error)) from None

    def _receive(self) -> None:
        while True:
            try:
                data = self._socket.recv(65536)
            except BlockingIOError:
                return
            except OSError as error:
                raise _unreachable(self._address, error.strerror or str(error)) from None
            self._heard = time.monotonic()
            self._quic.receive_datagram(data, self._peer_address, now=self._heard)

    def _check_closed(self) -> None:
        # aioquic reports the end of a connection only after it has drained; the cause is known at once.
        ended = self._quic._close_event
        if ended is None:
            return
        from mvm.drivers.quic.tls import CRYPTO_ERROR

        alert = ended.error_code - CRYPTO_ERROR
        if self._quic.other is not None:
            raise _other_node(self._address, self._quic.other.name, self._meant)
        if alert in _REFUSALS:
            ours = self._quic._state.name != "DRAINING"
            raise Forbidden(
                "agent.refused",
                f"the agent's certificate at {self._address} was refused: {ended.reason_phrase}" if ours
                else f"the agent at {self._address} refused this certificate: {ended.reason_phrase}",
                hint="both certificates must come from one CA and be valid now: mvm agent certs status",
                address=self._address, alert=alert,
            )  # fmt: skip
        if 0 <= alert < 0x100:
            raise Failed("agent.protocol", f"no QUIC handshake with {self._address}: {ended.reason_phrase}")
        raise _unreachable(self._address, ended.reason_phrase or "the agent closed the connection")

    def _too_late(self) -> MvmError:
        if self._heard is None:
            return _unreachable(self._address, "no answer")
        return TimedOut("agent.timeout", f"the agent at {self._address} did not answer in time", address=self._address)


def _answer(message: dict[str, Any]) -> dict[str, Any]:
    error, ok = message.get("error"), message.get("ok")
    if isinstance(error, dict):
        raise error_from_dict(error)
    if not isinstance(ok, dict):
        raise Failed("agent.protocol", "the agent's answer has neither result nor error")
    return ok


def _other_node(address: str, found: str, meant: NodeId | None) -> Forbidden:
    return Forbidden(
        "agent.other_node",
        f"node {found} answers at {address}, and node {meant} was meant; it was told nothing",
        hint=f"if the address is now that node's: {found}@{address}",
        address=address,
        node=found,
        meant=meant,
    )


def _unreachable(address: str, why: str) -> Unreachable:
    return Unreachable(
        "agent.unreachable", f"no agent answers at {address}: {why}", hint="see: mvm status",
        address=address,
    )  # fmt: skip
