"""A registry that has lost its data at run time gives nothing to a second tenant that the node's store has."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from mvm.domain.ids import NodeId, TenantId
from mvm.domain.job import JobState, JobVerb
from mvm.drivers.fake import FakeHost, ManualClock
from mvm.drivers.memory_registry import MemoryRegistry
from mvm.drivers.sqlite_store import SqliteStore
from mvm.settings import Settings
from mvm.wiring import NodePorts, NodeServices, build_node
from tests.services.conftest import Node

V = JobVerb
OTHER = NodeId("n2")


@pytest.fixture
def lost(node: Node) -> Node:
    """A node with tenant acme on net 0, whose instance runs, and a registry that has forgotten all but its jobs."""
    node.pool()
    (ref,) = node.create(1)
    node.ok(V.INSTANCE_START, ref)
    forget(node)
    return node


def forget(node: Node) -> None:
    registry: Any = node.registry
    for kept in (registry._nodes, registry._tenants, registry._net_ids, registry._pools):
        kept.clear()
    registry._rebuilt_at = None


def networks(node: Node) -> dict[str, int]:
    return {str(tenant.id): tenant.network.net_id for tenant in node.services.store.tenants()}


def test_a_new_tenant_gets_a_network_of_its_own(lost: Node) -> None:
    lost.ok(V.TENANT_CREATE, "beta")
    assert networks(lost) == {"acme": 0, "beta": 1}


@pytest.mark.parametrize(
    ("asked", "code"),
    [({"net_id": 0}, "tenant.net_id_used"), ({"subnet": "10.240.0.0/25"}, "tenant.subnet_overlap")],
)
def test_what_a_tenant_of_the_store_has_is_refused(lost: Node, asked: dict[str, Any], code: str) -> None:
    lost.fails(code, V.TENANT_CREATE, "beta", **asked)
    assert networks(lost) == {"acme": 0}
    assert lost.services.view.verify_network(active=False)["clean"], "its bridge is as it was"


def test_an_existing_tenant_is_not_created_again(lost: Node) -> None:
    before = lost.services.store.tenant(TenantId("acme"))
    lost.fails("tenant.exists", V.TENANT_CREATE, "acme", quota={"max_running": 500})
    assert lost.services.store.tenant(TenantId("acme")) == before
    assert lost.registry.tenant(TenantId("acme")) in (None, before)


def test_what_is_lost_between_reminding_and_reserving_is_refused_by_the_store(
    lost: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserve = MemoryRegistry.reserve_tenant

    def emptied(*args: Any) -> Any:
        forget(lost)
        return reserve(*args)

    monkeypatch.setattr(MemoryRegistry, "reserve_tenant", emptied)
    lost.fails("tenant.net_id_used", V.TENANT_CREATE, "beta")
    assert networks(lost) == {"acme": 0}
    assert lost.registry.networks()[1] == {0}, "what beta gave back is acme's"
    assert lost.services.view.verify_network(active=False)["bridges"][0]["ports"], "acme's guests are on their bridge"


def test_a_changed_quota_does_not_make_the_net_id_free(lost: Node) -> None:
    lost.ok(V.TENANT_UPDATE, "acme", quota={"max_running": 3})
    assert lost.registry.networks()[1] == {0}


def test_a_bridge_with_guests_of_no_tenant_keeps_its_net_id(lost: Node) -> None:
    store: Any = lost.services.store
    with store.transaction():
        store._write("DELETE FROM tenants")
        store._write("DELETE FROM net_ids")
    lost.ok(V.TENANT_CREATE, "beta")
    assert networks(lost) == {"beta": 1}


def test_two_tenants_on_one_network_are_told_and_one_goes_without_the_others_bridge(lost: Node) -> None:
    acme = lost.services.store.tenant(TenantId("acme"))
    lost.services.store.put_tenant(replace(acme, id=TenantId("twin"), created_at=lost.clock.now()))
    found = lost.services.view.verify_network(active=False)
    assert not found["clean"]
    assert any("acme and twin share a network" in finding["what"] for finding in found["findings"])
    lost.ok(V.TENANT_DESTROY, "twin")
    after = lost.services.view.verify_network(active=False)
    assert after["bridges"][0]["ports"]


@dataclass
class Cluster:
    """Two nodes over one registry; `here` has tenant acme, which the other has never heard of."""

    here: Node
    there: NodeServices
    registry: MemoryRegistry
    clock: ManualClock

    def do(self, verb: JobVerb, subject: str, **params: Any) -> tuple[JobState, str | None]:
        """What became of the job on the other node."""
        job = self.there.jobs.new(verb, subject, OTHER, params=params, actor="test")
        self.registry.record([job])
        done = self.there.runner.run(job)
        return done.state, (done.error or {}).get("code") or next((s["code"] for s in done.setbacks), None)


@pytest.fixture
def cluster(node: Node, tmp_path: Path) -> Cluster:
    settings = Settings(state_dir=tmp_path / "n2", node_id=OTHER, netns="host", redis_url="redis://127.0.0.1:1/0")
    host = FakeHost(node.clock)
    ports = NodePorts(
        SqliteStore(tmp_path / "n2.db"), node.registry, node.queue, host.locks, host.clock, host.vmm, host.guest,
        host.network, host.packets, None, host.storage, host.images, host.memory, host.audit, host.cgroups,
        host.secrets,
    )  # fmt: skip
    there = build_node(ports, settings, authorized_key="")
    node.services.heartbeat.beat()
    there.heartbeat.beat()
    node.pool()
    both = Cluster(node, there, node.registry, node.clock)
    assert both.do(V.TENANT_CREATE, "beta") == (JobState.SUCCEEDED, None)
    return both


def test_what_other_nodes_have_is_waited_for(cluster: Cluster) -> None:
    forget(cluster.here)
    kept = {each.network.net_id for each in cluster.there.store.tenants()}
    for verb, subject in ((V.TENANT_CREATE, "gamma"), (V.TENANT_DESTROY, "beta"), (V.POOL_CREATE, "beta/web")):
        params = {"flake_ref": "builtin:", "profile": "minimal"} if verb is V.POOL_CREATE else {}
        assert cluster.do(verb, subject, **params) == (JobState.QUEUED, "registry.rebuilding")
    assert kept == {each.network.net_id for each in cluster.there.store.tenants()}
    cluster.here.services.heartbeat.beat()
    assert cluster.registry.tenant(TenantId("acme")) is not None, "the next beat puts it back, not only the tenth"
    cluster.clock.advance(16)
    assert cluster.do(V.TENANT_CREATE, "gamma") == (JobState.SUCCEEDED, None)
    assert cluster.there.store.tenant(TenantId("gamma")).network.net_id == 2
