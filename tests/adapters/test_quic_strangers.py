"""The agent refuses whoever has no certificate of ours, before a handler runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
from aioquic import tls
from cryptography import x509

from mvm.agent import endpoint, room
from mvm.drivers.quic.authority import Issued, issue
from mvm.drivers.quic.client import Connection
from mvm.drivers.quic.frames import encode
from mvm.drivers.quic.tls import _ClientTls
from mvm.errors import Forbidden, MvmError, TimedOut, Unreachable
from tests.support.quic_agent import REF, SERVER, Agent, coordinator, days_from_now, make_certs, node, running_agent
from tests.support.waiting import until

INFO = encode({"id": "1", "method": "node.info", "params": {}})
BAD, REQUIRED, DECRYPT, UNEXPECTED = 42, 116, 51, 10


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    with running_agent(make_certs(tmp_path_factory.mktemp("state"))) as agent:
        yield agent


def ask(connection: Connection) -> list[dict[str, Any]]:
    """Send a request; it leaves in the same flight as the client's Finished, before the server has judged."""
    with closing(connection):
        return list(connection.request(INFO))


def answers(agent: Agent) -> None:
    """The agent is well, and serves the right certificate."""
    assert agent.agents.call(agent.address, "node.ping", {}, deadline_s=30) == {}


def test_right_certificates_are_served(agent: Agent) -> None:
    assert ask(agent.connect(coordinator(agent.ca))) == [{"node_id": "node-a"}]
    assert ask(agent.connect(node(agent.ca))) == [{"node_id": "node-a"}]


def uri(text: str) -> list[x509.GeneralName]:
    return [x509.UniformResourceIdentifier(text)]


STRANGERS: dict[str, tuple[Callable[[Issued], Issued | None], int]] = {
    "no certificate": (lambda ca: None, REQUIRED),
    "another CA's": (lambda ca: coordinator(issue(None, "elsewhere", days=9)), BAD),
    "another CA's, of the same name": (
        lambda ca: coordinator(
            issue(None, ca.certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)[0].value, days=9)
        ),
        BAD,
    ),
    "self-signed": (lambda ca: coordinator(None), BAD),
    "expired": (lambda ca: coordinator(ca, not_before=days_from_now(-2), days=1), BAD),
    "not yet valid": (lambda ca: coordinator(ca, not_before=days_from_now(1)), BAD),
    "server usage only": (lambda ca: coordinator(ca, usages=[SERVER]), BAD),
    "no usage": (lambda ca: coordinator(ca, usages=[]), BAD),
    "no name": (lambda ca: coordinator(ca, sans=[]), BAD),
    "a DNS name only": (lambda ca: coordinator(ca, sans=[x509.DNSName("coordinator")]), BAD),
    "another trust domain": (lambda ca: coordinator(ca, sans=uri("spiffe://evil/coordinator")), BAD),
    "a name that only begins right": (lambda ca: coordinator(ca, sans=uri("spiffe://mvm/coordinator/x")), BAD),
    "a node without an id": (lambda ca: coordinator(ca, sans=uri("spiffe://mvm/node/")), BAD),
    "a node with a path": (lambda ca: coordinator(ca, sans=uri("spiffe://mvm/node/a/b")), BAD),
    "two names": (
        lambda ca: coordinator(ca, sans=uri("spiffe://mvm/node/a") + uri("spiffe://mvm/coordinator")),
        BAD,
    ),
    "the CA's own": (lambda ca: ca, BAD),
    "under a certificate that is no CA": (lambda ca: coordinator(coordinator(ca)), BAD),
    "stolen, without its key": (lambda ca: Issued(coordinator(ca).certificate, coordinator(ca).key), DECRYPT),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_strangers_are_refused_and_no_handler_runs(agent: Agent, name: str) -> None:
    make, alert = STRANGERS[name]
    before = list(agent.node.calls)
    with pytest.raises(Forbidden) as caught:
        ask(agent.connect(make(agent.ca)))
    assert (caught.value.code, caught.value.fields["alert"]) == ("agent.refused", alert)
    answers(agent)
    assert agent.node.calls == before


class OmitsCertificate(_ClientTls):
    """Answers the server's certificate request with nothing but Finished."""

    def _client_handle_finished(self, input_buf: Any, output_buf: Any) -> None:
        self._certificate_request = None
        super()._client_handle_finished(input_buf, output_buf)


class OmitsProof(_ClientTls):
    """Shows a certificate and does not prove that it has the key."""

    def _client_handle_finished(self, input_buf: Any, output_buf: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tls, "push_certificate_verify", lambda buf, verify: None)
            super()._client_handle_finished(input_buf, output_buf)


class OmitsFinished(_ClientTls):
    """Shows all but Finished, and goes on to send application data."""

    def _client_handle_finished(self, input_buf: Any, output_buf: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tls, "push_finished", lambda buf, finished: None)
            super()._client_handle_finished(input_buf, output_buf)


@pytest.mark.parametrize("cheat", [OmitsCertificate, OmitsProof])
def test_a_handshake_that_leaves_something_out_is_refused(agent: Agent, cheat: type[_ClientTls]) -> None:
    before = list(agent.node.calls)
    connection = agent.connect(coordinator(agent.ca))
    connection._quic.context = cheat  # in place by the time the agent has asked for a retry
    with pytest.raises(MvmError):
        ask(connection)
    answers(agent)
    assert agent.node.calls == before


def test_an_unfinished_handshake_ends_at_its_deadline(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "HANDSHAKE_S", 0.3)
    before = list(agent.node.calls)
    connection = agent.connect(coordinator(agent.ca))
    connection._quic.context = OmitsFinished
    with pytest.raises(Unreachable) as caught:
        ask(connection)
    assert "closed the connection" in caught.value.message
    answers(agent)
    assert agent.node.calls == before


def test_a_session_ticket_admits_nobody(agent: Agent) -> None:
    given: list[bytes] = []

    class KeepsTickets(_ClientTls):
        def _client_handle_new_session_ticket(self, input_buf: Any) -> None:
            given.append(input_buf.data)

    connection = agent.connect(coordinator(agent.ca))
    connection._quic.context = KeepsTickets
    assert ask(connection) == [{"node_id": "node-a"}]
    assert given == []  # the agent gives none, so one is forged
    context = connection._quic.tls
    form = tls.NewSessionTicket(86400, 1, b"", b"t" * 64, 0xFFFFFFFF, [])
    ticket = context._build_session_ticket(form, context.received_extensions or [])

    before = list(agent.node.calls)
    for holder, served in ((None, False), (coordinator(agent.ca), True)):
        resuming = agent.connect(holder)
        resuming._quic.configuration.session_ticket = ticket
        resuming._quic.configuration.server_name = ticket.server_name
        early: list[bool] = []
        setup = resuming._quic._update_traffic_key
        resuming._quic._update_traffic_key = lambda *a, s=setup, e=early: (e.append(a[1] is tls.Epoch.ZERO_RTT), s(*a))
        if served:
            assert ask(resuming) == [{"node_id": "node-a"}]
        else:
            with pytest.raises(Forbidden) as caught:
                ask(resuming)
            assert caught.value.fields["alert"] == REQUIRED
            assert agent.node.calls == before
        assert any(early), "early data was tried"
        assert not resuming._quic.tls.session_resumed
    answers(agent)


def test_a_connection_does_not_outlive_its_certificate(agent: Agent) -> None:
    brief = coordinator(agent.ca, not_before=days_from_now(-1), days=1 + 4 / 86400)
    connection = agent.connect(brief)
    follow = {"id": "1", "method": "instance.logs", "params": {"ref": REF, "follow": True}}
    with closing(connection), pytest.raises(Unreachable) as caught:
        list(connection.request(encode(follow)))
    assert "expired" in caught.value.message
    assert agent.node.log_closed.wait(60)
    agent.node.calls.clear()


def test_the_number_of_handshakes_is_bounded(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "HANDSHAKES", 0)
    with pytest.raises(TimedOut):
        agent.agents.call(agent.address, "node.ping", {}, deadline_s=0.2)
    monkeypatch.undo()
    until(lambda: not _fails(agent), 60, "the agent serves again")


def _fails(agent: Agent) -> bool:
    try:
        answers(agent)
    except (TimedOut, Unreachable):
        return True
    return False


def test_random_datagrams_do_no_harm(agent: Agent) -> None:
    import random
    import socket

    noise = random.Random(7)
    host, _, port = agent.address.partition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for size in (0, 1, 5, 6, 7, 20, 1199, 1200, 1500) * 20:
            first = noise.choice((0xC3, 0xC0, 0xE0, 0xF0, 0x40, 0x00))
            body = noise.choice((b"\x00\x00\x00\x01", b"\x6b\x33\x43\xcf", noise.randbytes(4))) + noise.randbytes(size)
            sock.sendto(bytes([first]) + body if size else b"", (host, int(port)))
    answers(agent)
