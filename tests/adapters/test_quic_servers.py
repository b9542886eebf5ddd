"""The client refuses servers that are no node of ours, and the agent refuses to serve when it is not secure."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from aioquic.asyncio import serve
from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.events import QuicEvent, StreamDataReceived
from cryptography import x509

from mvm.agent.server import listen, refuses_strangers
from mvm.domain.ids import NodeId
from mvm.drivers.quic.authority import Issued, issue
from mvm.drivers.quic.client import QuicAgents
from mvm.drivers.quic.frames import ALPN, encode
from mvm.drivers.quic.identity import load_credentials, node_dns, node_uri
from mvm.errors import Failed, Forbidden, NotFound, Unreachable
from tests.support.quic_agent import (
    CLIENT,
    NODE,
    SERVER,
    coordinator,
    days_from_now,
    free_udp_port,
    make_certs,
    node,
    running_agent,
)
from tests.support.waiting import until


class Impostor(QuicConnectionProtocol):
    """Answers every request, and notes what it gets to know."""

    seen: list[object]

    def quic_event_received(self, event: QuicEvent) -> None:
        if isinstance(event, StreamDataReceived):
            self.seen.append(event.data)
            if event.end_stream:
                self._quic.send_stream_data(event.stream_id, encode({"ok": {}}), end_stream=True)


@contextmanager
def impostor(identity: Issued, *, asks: bool = True, alpn: str = ALPN) -> Iterator[tuple[str, list[object]]]:
    """A QUIC server without our guards; `asks` for a client's certificate and takes any."""
    loop = asyncio.new_event_loop()
    started: list[str] = []
    ready, stop = threading.Event(), asyncio.Event()
    seen: list[object] = []

    class Asking(QuicConnection):
        def _initialize(self, peer_cid: bytes) -> None:
            super()._initialize(peer_cid)
            self.tls._request_client_certificate = asks

    class Noting(Impostor):
        def __init__(self, quic: QuicConnection, stream_handler: object = None) -> None:
            quic.__class__ = Asking
            self.seen = seen
            super().__init__(quic)

        def datagram_received(self, data: bytes | str, addr: tuple[str, int]) -> None:
            super().datagram_received(data, addr)
            certificate = self._quic.tls._peer_certificate
            if certificate is not None:
                seen.append(certificate)

    async def run() -> None:
        configuration = QuicConfiguration(
            is_client=False, alpn_protocols=[alpn], certificate=identity.certificate, private_key=identity.key
        )
        server = await serve("127.0.0.1", 0, configuration=configuration, create_protocol=Noting)
        assert server._transport is not None
        started.append(f"127.0.0.1:{server._transport.get_extra_info('sockname')[1]}")
        ready.set()
        await stop.wait()
        server.close()

    def main() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(run())

    thread = threading.Thread(target=main)
    thread.start()
    assert ready.wait(60)
    try:
        yield started[0], seen
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(60)


def ping(address: str, certs_dir: Path) -> dict[str, object]:
    return QuicAgents(certs_dir).call(address, "node.ping", {}, deadline_s=30)


def ca_of(certs_dir: Path) -> Issued:
    credentials = load_credentials(certs_dir, "ca")
    assert credentials.certificate is not None
    return Issued(credentials.certificate, credentials.key)


DNS, URI = x509.DNSName(node_dns(NODE)), x509.UniformResourceIdentifier(node_uri(NODE))
IMPOSTORS: dict[str, Callable[[Issued], Issued]] = {
    "client usage only": lambda ca: node(ca, usages=[CLIENT]),
    "no usage": lambda ca: node(ca, usages=[]),
    "another CA's": lambda ca: node(issue(None, "elsewhere", days=9)),
    "self-signed": lambda ca: issue(None, NODE, sans=[DNS, URI], usages=[SERVER], days=9),
    "expired": lambda ca: node(ca, not_before=days_from_now(-2), days=1),
    "not yet valid": lambda ca: node(ca, not_before=days_from_now(1)),
    "the coordinator's": lambda ca: coordinator(ca),
    "the coordinator's, for servers": lambda ca: coordinator(ca, usages=[SERVER, CLIENT]),
    "no URI": lambda ca: node(ca, sans=[DNS]),
    "no DNS name": lambda ca: node(ca, sans=[URI]),
    "another node's DNS name": lambda ca: node(ca, sans=[x509.DNSName(node_dns(NodeId("b"))), URI]),
    "without its key": lambda ca: Issued(node(ca).certificate, node(ca).key),
}


@pytest.mark.parametrize("name", IMPOSTORS)
def test_impostors_are_refused_and_learn_nothing(tmp_path: Path, name: str) -> None:
    certs_dir = make_certs(tmp_path)
    with impostor(IMPOSTORS[name](ca_of(certs_dir))) as (address, seen):
        with pytest.raises(Forbidden) as caught:
            ping(address, certs_dir)
        assert caught.value.code == "agent.refused"
    assert seen == []  # neither a request nor our certificate


def test_the_impostor_would_do_with_the_right_certificate(tmp_path: Path) -> None:
    certs_dir = make_certs(tmp_path)
    with impostor(node(ca_of(certs_dir))) as (address, seen):
        assert ping(address, certs_dir) == {}
        until(lambda: len(seen) >= 2, 60, "the request and the certificate are seen")


def test_another_protocol_is_told_apart(tmp_path: Path) -> None:
    certs_dir = make_certs(tmp_path)
    with impostor(node(ca_of(certs_dir)), alpn="h3") as (address, _), pytest.raises(Failed) as caught:
        ping(address, certs_dir)
    assert caught.value.code == "agent.protocol"


@pytest.mark.parametrize("asks", [True, False])
def test_the_self_test_finds_a_server_that_takes_strangers(tmp_path: Path, asks: bool) -> None:
    credentials = load_credentials(make_certs(tmp_path), "node")
    assert credentials.certificate is not None
    with impostor(Issued(credentials.certificate, credentials.key), asks=asks) as (address, _):
        with pytest.raises(Failed) as caught:
            refuses_strangers(address, credentials)
        assert caught.value.code == "agent.not_secure"


def test_the_agent_does_not_start_with_a_certificate_that_clients_refuse(tmp_path: Path) -> None:
    certs_dir = make_certs(tmp_path)
    for name in ("node.pem", "node.key"):
        (certs_dir / name).write_bytes((certs_dir / name.replace("node", "coordinator")).read_bytes())
    with pytest.raises(Failed) as caught, running_agent(certs_dir):
        pass
    assert caught.value.code == "agent.bad_certificate"


def test_the_agent_does_not_start_without_certificates(tmp_path: Path) -> None:
    with pytest.raises(NotFound) as caught, running_agent(tmp_path):
        pass
    assert caught.value.code == "certs.missing"


def test_a_port_in_use_is_named() -> None:
    with closing(listen("127.0.0.1", 0)) as sock, pytest.raises(Failed) as caught:
        listen("127.0.0.1", sock.getsockname()[1])
    assert caught.value.code == "agent.cannot_listen"


def test_a_socket_that_swallows_everything_is_unreachable(tmp_path: Path) -> None:
    certs_dir = make_certs(tmp_path)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(Unreachable) as caught:
            QuicAgents(certs_dir).call(address, "node.ping", {}, deadline_s=0.3)
    assert caught.value.code == "agent.unreachable"


AGENT = """
import asyncio
from mvm.agent.__main__ import run
from mvm.settings import load_settings
from tests.support.quic_agent import StubNode
asyncio.run(run(load_settings(), StubNode()))
"""


@contextmanager
def agent_process(state: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    port = free_udp_port()
    settings = {"MVM_STATE_DIR": str(state), "MVM_AGENT_PORT": str(port), "MVM_NODE_ID": NODE}
    with subprocess.Popen([sys.executable, "-c", AGENT], env=os.environ | settings, cwd=Path.cwd()) as process:
        try:
            until(lambda: _serves(state / "certs", f"127.0.0.1:{port}"), 60, "the agent serves")
            yield process, f"127.0.0.1:{port}"
        finally:
            process.kill()


def _serves(certs_dir: Path, address: str) -> bool:
    try:
        return ping(address, certs_dir) == {}
    except Unreachable:
        return False


def test_sigterm_ends_the_agent_in_good_order(tmp_path: Path) -> None:
    make_certs(tmp_path)
    with agent_process(tmp_path) as (process, address):
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        with pytest.raises(Unreachable):
            ping(address, tmp_path / "certs")


def test_a_killed_agent_is_noticed_in_the_middle_of_a_call(tmp_path: Path) -> None:
    certs_dir = make_certs(tmp_path)
    with agent_process(tmp_path) as (process, address):
        params = {"ref": "acme/web/i-7f2c91ab", "follow": True}
        stream = QuicAgents(certs_dir).stream(address, "instance.logs", params, deadline_s=None)
        next(stream)
        process.kill()
        process.wait(60)
        with pytest.raises(Unreachable) as caught:
            list(stream)
    assert caught.value.code == "agent.unreachable"
