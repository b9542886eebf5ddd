"""A node's certificate is good for that node: no other one passes for it, and none other is told a tenant's secrets."""

from __future__ import annotations

from base64 import b64encode
from pathlib import Path

import pytest
from click.testing import CliRunner
from cryptography import x509

from mvm.cli.main import cli
from mvm.domain.ids import NodeId
from mvm.domain.layout import StateLayout
from mvm.drivers.quic.authority import Issued
from mvm.drivers.quic.client import QuicAgents, parse_address
from mvm.drivers.quic.identity import node_dns, node_uri
from mvm.drivers.quic.known_nodes import KnownNodes
from mvm.errors import Forbidden, InvalidInput
from mvm.wiring import open_client
from tests.adapters.test_quic_servers import ca_of, impostor
from tests.support.quic_agent import NODE, make_certs, node, running_agent

OTHER = NodeId("node-b")
SECRETS = {"tenant": "acme", "actor": "me", "content": b64encode(b"KEY=value").decode()}


def other(ca: Issued) -> Issued:
    """The certificate of another node of the same CA, good in every way."""
    return node(ca, sans=[x509.DNSName(node_dns(OTHER)), x509.UniformResourceIdentifier(node_uri(OTHER))])


def test_a_tenants_secrets_reach_no_other_node_than_this_one(tmp_path: Path) -> None:
    certs_dir = make_certs(tmp_path)
    with impostor(other(ca_of(certs_dir))) as (address, seen):
        stack = {"node_id": str(NODE), "agent_address": address}
        agents = open_client(stack, StateLayout(tmp_path)).agents
        with pytest.raises(Forbidden) as caught:
            agents.call(address, "tenant.set_secrets", SECRETS, deadline_s=30)
        assert (caught.value.code, caught.value.fields["node"]) == ("agent.other_node", OTHER)
        assert seen == [], "neither the secrets nor our certificate"
    with impostor(node(ca_of(certs_dir))) as (address, seen):
        agents = open_client({**stack, "agent_address": address}, StateLayout(tmp_path)).agents
        assert agents.call(address, "tenant.set_secrets", SECRETS, deadline_s=30) == {}


@pytest.mark.parametrize("way", ["call", "stream", "connected"])
def test_a_declared_node_is_the_only_one(tmp_path: Path, way: str) -> None:
    with running_agent(make_certs(tmp_path)) as agent:

        def ask(address: str) -> object:
            if way == "call":
                return agent.agents.call(address, "node.info", {}, deadline_s=30)
            if way == "stream":
                return list(agent.agents.stream(address, "node.info", {}, deadline_s=30))
            with agent.agents.connected(address) as kept:
                return kept.call("node.info", {}, deadline_s=30)

        assert ask(f"{NODE}@{agent.address}")
        agent.node.calls.clear()
        with pytest.raises(Forbidden) as caught:
            ask(f"{OTHER}@{agent.address}")
        assert caught.value.code == "agent.other_node"
        assert f"{NODE}@{agent.address}" in caught.value.hint
        assert agent.node.calls == []


def test_who_answered_once_is_meant_from_then_on(tmp_path: Path) -> None:
    certs_dir = make_certs(tmp_path)
    learnt = tmp_path / "known-nodes"
    with running_agent(certs_dir) as agent:
        agents = QuicAgents(certs_dir, known=KnownNodes(learnt))
        assert agents.call(agent.address, "node.ping", {}, deadline_s=30) == {}
        port = int(agent.address.rpartition(":")[2])
    assert {path.name: path.read_text() for path in learnt.iterdir()} == {agent.address: f"{NODE}\n"}
    make_certs(tmp_path, OTHER)
    with running_agent(certs_dir, port=port) as agent:
        agents = QuicAgents(certs_dir, known=KnownNodes(learnt))
        for _ in range(2):
            with pytest.raises(Forbidden) as caught:
                agents.call(agent.address, "node.ping", {}, deadline_s=30)
            assert caught.value.code == "agent.other_node"
        assert agents.call(f"{OTHER}@{agent.address}", "node.ping", {}, deadline_s=30) == {}
        assert agents.call(agent.address, "node.ping", {}, deadline_s=30) == {}, "what was declared is what is meant"


def test_the_command_takes_a_plain_address_and_a_node_at_one(tmp_path: Path) -> None:
    with running_agent(make_certs(tmp_path)) as agent:

        def status(node_at: str) -> tuple[int, str]:
            words = ["--state-dir", str(tmp_path), "coordinator", "status", "--node", node_at, "-o", "json"]
            result = CliRunner().invoke(cli, words)
            return result.exit_code, result.stdout

        assert status(f"{OTHER}@{agent.address}")[0] == 7
        assert '"agent.other_node"' in status(f"{OTHER}@{agent.address}")[1]
        assert status(agent.address)[0] == status(f"{NODE}@{agent.address}")[0] == 0


def test_a_document_goes_to_no_other_node_than_its_own(tmp_path: Path) -> None:
    certs_dir = make_certs(tmp_path)
    document = tmp_path / "fleet.json"
    document.write_text(f'{{"schema_version": 1, "node_id": "{NODE}", "tenants": []}}')
    with impostor(other(ca_of(certs_dir))) as (address, seen):
        words = ["--state-dir", str(tmp_path), "coordinator", "push", "--desired", str(document), "--node", address]
        result = CliRunner().invoke(cli, words)
    assert result.exit_code == 7, result.output
    assert seen == []


def test_addresses() -> None:
    assert parse_address("10.0.0.5:4433") == (None, "10.0.0.5:4433")
    assert parse_address("node-b@10.0.0.5:4433") == (OTHER, "10.0.0.5:4433")
    for wrong in ("10.0.0.5", "@10.0.0.5:4433", "A B@10.0.0.5:4433", "node-b@", "node-b@10.0.0.5:0"):
        with pytest.raises(InvalidInput):
            parse_address(wrong)


def test_a_place_that_cannot_be_written_learns_nothing_and_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    known = KnownNodes(tmp_path / "file")
    known.learn("10.0.0.5:4433", NODE, declared=True)
    assert known.meant("10.0.0.5:4433") is None
