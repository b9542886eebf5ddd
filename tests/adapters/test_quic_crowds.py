"""However many connections one address or one peer begins, there is room for the next: and new certificates count."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import pytest

from mvm.agent import endpoint
from mvm.agent.room import OF_ONE_NODE
from mvm.domain.layout import StateLayout
from mvm.drivers.quic import certs
from mvm.drivers.quic.authority import Issued
from mvm.drivers.quic.client import Connection, open_connection
from mvm.drivers.quic.identity import Credentials
from mvm.errors import MvmError, Unreachable
from tests.adapters.test_quic_authorities import joined, made
from tests.adapters.test_quic_strangers import INFO
from tests.support.quic_agent import NODE, Agent, coordinator, make_certs, node, running_agent

MORE_THAN_THERE_ARE = 100


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Agent]:
    monkeypatch.setattr(endpoint, "HANDSHAKE_S", 120.0)  # none of them ends by itself
    with running_agent(make_certs(tmp_path)) as agent:
        yield agent


def stalled(agent: Agent, source: str) -> Connection:
    """A stranger's connection that has its address proven and a place, and then says nothing more."""

    def make() -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind((source, 0))
        return sock

    connection = open_connection(agent.address, Credentials((agent.ca.certificate,)), make)
    while connection._quic.tls._peer_certificate is None:  # the retry, and the agent's first flight
        connection._exchange()
    return connection


@pytest.mark.parametrize("source", ["127.0.0.1", "127.0.0.2"], ids=["our own address", "another address"])
def test_handshakes_that_stall_keep_nobody_out(agent: Agent, source: str) -> None:
    with ExitStack() as stack:
        for _ in range(MORE_THAN_THERE_ARE):
            stack.enter_context(closing(stalled(agent, source)))
        for _ in range(5):
            assert agent.agents.call(agent.address, "node.ping", {}, deadline_s=30) == {}


@contextmanager
def crowd(agent: Agent, source: str) -> Iterator[None]:
    """One address begins handshakes as fast as it can, and ends none, for as long as the block lasts."""
    ended = threading.Event()

    def push() -> None:
        held: list[Connection] = []
        while not ended.is_set():
            with suppress(MvmError):
                held.append(stalled(agent, source))
            if len(held) > MORE_THAN_THERE_ARE:
                held.pop(0).close()
        for connection in held:
            connection.close()

    thread = threading.Thread(target=push)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(60)


def test_an_address_that_never_stops_keeps_nobody_out(agent: Agent) -> None:
    with crowd(agent, "127.0.0.2"):
        for _ in range(20):
            assert agent.agents.call(agent.address, "node.ping", {}, deadline_s=30) == {}


def test_one_node_has_a_share_of_the_connections(agent: Agent) -> None:
    with ExitStack() as stack:

        def another(who: Issued) -> list[dict[str, object]]:
            connection = stack.enter_context(closing(agent.connect(who)))
            return list(connection.request(INFO))

        for _ in range(OF_ONE_NODE):
            assert another(node(agent.ca)) == [{"node_id": str(NODE)}]
        with pytest.raises(Unreachable) as full:
            another(node(agent.ca))
        assert "no room for another connection of node/node-a" in full.value.message
        assert another(coordinator(agent.ca)) == [{"node_id": str(NODE)}]


def test_new_certificates_are_used_without_a_new_start(tmp_path: Path) -> None:
    directory = make_certs(tmp_path)
    with running_agent(directory) as agent:
        assert agent.agents.call(agent.address, "node.ping", {}, deadline_s=30) == {}
        certs.init(StateLayout(tmp_path), NODE, joined(tmp_path / "ca.pem", *made(tmp_path, "ca")))
        fresh = Agent(agent.address, directory, agent.node)
        assert fresh.agents.call(agent.address, "node.ping", {}, deadline_s=30) == {}
        with pytest.raises(MvmError):  # the one that was issued before is another CA's now
            agent.agents.call(agent.address, "node.ping", {}, deadline_s=30)


def test_certificates_that_are_not_good_are_not_taken(tmp_path: Path) -> None:
    directory = make_certs(tmp_path)
    with running_agent(directory) as agent:
        assert agent.agents.call(agent.address, "node.ping", {}, deadline_s=30) == {}
        (directory / "node.pem").write_text("half of one")
        assert agent.agents.call(agent.address, "node.ping", {}, deadline_s=30) == {}
