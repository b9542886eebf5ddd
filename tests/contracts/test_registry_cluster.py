"""ports/registry.py: nodes, tenants, placements and sweeps."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from ipaddress import IPv4Network
from itertools import combinations

import pytest

from mvm.domain.addressing import TenantNetwork
from mvm.domain.ids import JobId, NodeId, TenantId
from mvm.domain.tenant import Quota, Tenant
from mvm.errors import NotAllowed
from mvm.ports.registry import NodeRecord, Registry
from tests.support import make
from tests.support.make import ACME, NODE, START, WEB
from tests.support.waiting import until

N2 = NodeId("n2")


def reserve(registry: Registry, name: str, net_id: int | None = None, subnet: str | None = None) -> Tenant:
    return registry.reserve_tenant(TenantId(name), net_id, IPv4Network(subnet) if subnet else None, Quota(), START)


def record(node: NodeId, seconds: float = 0, **facts: object) -> NodeRecord:
    return NodeRecord(node, "127.0.0.1:4433", START + timedelta(seconds=seconds), facts)


# --- nodes


def test_a_node_is_known_by_its_last_heartbeat(registry: Registry) -> None:
    registry.heartbeat(record(N2, vcpus=2))
    registry.heartbeat(record(NODE, vcpus=1, instances={"running": 3}))
    registry.heartbeat(record(N2, 5, vcpus=4))
    assert list(registry.nodes()) == [record(NODE, vcpus=1, instances={"running": 3}), record(N2, 5, vcpus=4)]


def test_only_nodes_seen_since_then_are_live(registry: Registry) -> None:
    registry.heartbeat(record(NODE, 10))
    registry.heartbeat(record(N2, 20))
    assert list(registry.live_nodes(START)) == [NODE, N2]
    assert list(registry.live_nodes(START + timedelta(seconds=20))) == [N2]
    assert list(registry.live_nodes(START + timedelta(seconds=21))) == []
    assert len(registry.nodes()) == 2


def test_a_forgotten_node_is_gone_until_its_next_heartbeat(registry: Registry) -> None:
    registry.heartbeat(record(NODE))
    registry.forget_node(NODE)
    registry.forget_node(NODE)
    assert list(registry.nodes()) == []
    registry.heartbeat(record(NODE, 1))
    assert list(registry.live_nodes(START)) == [NODE]


# --- tenants


def test_what_is_not_given_is_chosen(registry: Registry) -> None:
    first, second = reserve(registry, "acme"), reserve(registry, "beta")
    assert [t.network.net_id for t in (first, second)] == [0, 1]
    assert not first.network.subnet.overlaps(second.network.subnet)
    assert registry.tenant(first.id) == first
    assert registry.tenant(second.id) == second
    assert registry.tenant(TenantId("gamma")) is None


def test_what_is_given_is_kept(registry: Registry) -> None:
    quota = Quota(max_vcpus=3)
    tenant = registry.reserve_tenant(ACME, 7, IPv4Network("10.241.8.0/26"), quota, START)
    assert tenant == Tenant(ACME, TenantNetwork(7, IPv4Network("10.241.8.0/26")), quota, START)
    assert registry.tenant(ACME) == tenant


def test_a_given_net_id_is_passed_over_when_choosing(registry: Registry) -> None:
    reserve(registry, "acme", net_id=0)
    reserve(registry, "beta", net_id=2)
    assert [reserve(registry, name).network.net_id for name in ("gamma", "delta")] == [1, 3]


def test_a_tenant_exists_once(registry: Registry) -> None:
    kept = reserve(registry, "acme")
    with pytest.raises(NotAllowed) as refused:
        reserve(registry, "acme", net_id=9)
    assert refused.value.code == "tenant.exists"
    assert registry.tenant(ACME) == kept


def test_a_net_id_is_given_once(registry: Registry) -> None:
    reserve(registry, "acme", net_id=5)
    with pytest.raises(NotAllowed) as refused:
        reserve(registry, "beta", net_id=5)
    assert refused.value.code == "tenant.net_id_used"
    assert registry.tenant(TenantId("beta")) is None


@pytest.mark.parametrize("subnet", ["10.240.7.0/24", "10.240.7.128/25", "10.240.0.0/16"])
def test_subnets_do_not_overlap(registry: Registry, subnet: str) -> None:
    reserve(registry, "acme", subnet="10.240.7.0/24")
    with pytest.raises(NotAllowed) as refused:
        reserve(registry, "beta", subnet=subnet)
    assert refused.value.code == "tenant.subnet_overlap"
    assert reserve(registry, "beta").network.net_id == 1, "a refused reservation uses no net id up"


def test_an_own_subnet_that_is_taken_is_not_chosen(registry: Registry) -> None:
    taken = reserve(registry, "acme", net_id=5, subnet="10.240.0.0/24")
    assert not reserve(registry, "beta", net_id=0).network.subnet.overlaps(taken.network.subnet)


def test_a_removed_tenant_leaves_its_subnet_but_never_its_net_id(registry: Registry) -> None:
    network = reserve(registry, "acme").network
    registry.remove_tenant(ACME, NODE)
    registry.remove_tenant(ACME, NODE)
    assert registry.tenant(ACME) is None
    again = reserve(registry, "acme", subnet=str(network.subnet))
    assert again.network.subnet == network.subnet
    assert again.network.net_id != network.net_id
    with pytest.raises(NotAllowed) as refused:
        reserve(registry, "beta", net_id=network.net_id)
    assert refused.value.code == "tenant.net_id_used"


def test_a_tenant_is_replaced(registry: Registry) -> None:
    tenant = replace(reserve(registry, "acme"), quota=Quota(max_running=1))
    registry.put_tenant(tenant)
    assert registry.tenant(ACME) == tenant


def test_tenants_created_at_once_share_nothing(registry: Registry) -> None:
    names = [f"t{n}" for n in range(24)]
    with ThreadPoolExecutor(6) as pool:
        tenants = list(pool.map(lambda name: reserve(registry, name), names))
    assert sorted(t.network.net_id for t in tenants) == list(range(24))
    assert not any(a.network.subnet.overlaps(b.network.subnet) for a, b in combinations(tenants, 2))


def test_one_of_many_wins_an_id(registry: Registry) -> None:
    def attempt(name: str) -> bool:
        try:
            reserve(registry, name, net_id=9)
        except NotAllowed:
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(attempt, [f"t{n}" for n in range(12)])) == 1


# --- an emptied registry is rebuilt from its nodes


def known(name: str, net_id: int, **quota: int) -> Tenant:
    return Tenant(
        TenantId(name), TenantNetwork(net_id, IPv4Network(f"10.240.{net_id}.0/24")), Quota(**quota), START
    )  # fmt: skip


def test_restored_tenants_and_pools_are_known_again(registry: Registry) -> None:
    registry.restore([known("acme", 4)], {WEB: NODE}, frozenset({0, 1, 4}))
    assert registry.tenant(ACME) == known("acme", 4)
    assert registry.pool_node(WEB) == NODE
    assert reserve(registry, "beta").network.net_id == 2
    with pytest.raises(NotAllowed):
        reserve(registry, "gamma", net_id=1)
    with pytest.raises(NotAllowed):
        reserve(registry, "delta", subnet="10.240.4.0/24")


def test_a_restored_tenants_net_id_is_given_even_when_not_listed(registry: Registry) -> None:
    registry.restore([known("acme", 0)], {}, frozenset())
    assert reserve(registry, "beta").network.net_id == 1


def test_what_is_known_is_not_overwritten_by_a_nodes_copy(registry: Registry) -> None:
    tenant = replace(reserve(registry, "acme"), quota=Quota(max_running=1))
    registry.put_tenant(tenant)
    registry.place_pool(WEB, N2)
    registry.restore([known("acme", 0, max_running=60)], {WEB: NODE}, frozenset({0}))
    assert registry.tenant(ACME) == tenant
    assert registry.pool_node(WEB) == N2


def test_nodes_restore_one_after_the_other(registry: Registry) -> None:
    registry.restore([], {}, frozenset())
    registry.restore([known("acme", 3)], {}, frozenset({3}))
    registry.restore([known("beta", 5)], {}, frozenset({2, 5}))
    registry.restore([known("acme", 3)], {}, frozenset({3}))
    assert {reserve(registry, f"t{n}").network.net_id for n in range(4)} == {0, 1, 4, 6}


def test_a_tenant_that_has_pools_on_another_node_stays(registry: Registry) -> None:
    tenant, other = reserve(registry, "acme"), reserve(registry, "acme-2")
    registry.place_pool(WEB, N2)
    registry.remove_tenant(ACME, NODE)
    assert registry.tenant(ACME) == tenant
    registry.remove_tenant(other.id, NODE)
    assert registry.tenant(other.id) is None
    registry.remove_tenant(ACME, N2)
    assert registry.tenant(ACME) is None


# --- placement


def test_a_pool_lives_on_one_node(registry: Registry) -> None:
    assert registry.pool_node(WEB) is None
    registry.place_pool(WEB, NODE)
    registry.place_pool(WEB, N2)
    assert registry.pool_node(WEB) == N2
    registry.unplace_pool(WEB, NODE)
    assert registry.pool_node(WEB) == N2, "what another node has stays there"
    registry.unplace_pool(WEB, N2)
    registry.unplace_pool(WEB, N2)
    assert registry.pool_node(WEB) is None


# --- sweeps


def claimed(registry: Registry, job: JobId, *, verb: str = "sweep.orphans", node: NodeId = NODE, ttl_s: float = 60,
            every_s: float = 0.2) -> bool:  # fmt: skip
    """Whether it is, in a period that has only begun."""
    before = registry.tick(every_s)
    until(lambda: registry.tick(every_s) != before, 20, "the next period")
    return registry.claim_sweep(verb, node, job, tick=registry.tick(every_s), every_s=every_s, ttl_s=ttl_s)


def test_a_sweep_is_claimed_once_per_kind_and_node(registry: Registry) -> None:
    first, second = make.job().job_id, make.job().job_id
    assert claimed(registry, first)
    assert claimed(registry, first), "asked again"
    assert not claimed(registry, second)
    assert claimed(registry, second, node=N2)
    assert claimed(registry, second, verb="sweep.stale_pids")


def test_a_period_has_one_sweep_though_it_has_ended(registry: Registry) -> None:
    first, second, day = make.job().job_id, make.job().job_id, 86400.0
    tick = registry.tick(day)
    for other in (tick - 1, tick + 1):
        assert not registry.claim_sweep("sweep.orphans", NODE, first, tick=other, every_s=day, ttl_s=60)
    assert registry.claim_sweep("sweep.orphans", NODE, first, tick=tick, every_s=day, ttl_s=60)
    registry.release_sweep("sweep.orphans", NODE, first)
    assert not registry.claim_sweep("sweep.orphans", NODE, second, tick=tick, every_s=day, ttl_s=60)
    assert registry.claim_sweep("sweep.orphans", N2, second, tick=tick, every_s=day, ttl_s=60)


def test_only_its_holder_releases_a_sweep(registry: Registry) -> None:
    first, second = make.job().job_id, make.job().job_id
    claimed(registry, first)
    registry.release_sweep("sweep.orphans", NODE, second)
    assert not claimed(registry, second)
    registry.release_sweep("sweep.orphans", NODE, first)
    registry.release_sweep("sweep.orphans", NODE, first)
    assert claimed(registry, second)


def test_a_lost_sweep_expires_and_its_late_end_releases_nothing(registry: Registry) -> None:
    lost, second, third = (make.job().job_id for _ in range(3))
    claimed(registry, lost, ttl_s=0.02)
    until(lambda: claimed(registry, second), 20, "its claim is over")
    registry.release_sweep("sweep.orphans", NODE, lost)
    assert not claimed(registry, third)


def test_one_of_many_claims_a_sweep(registry: Registry) -> None:
    claims, tick = [make.job().job_id for _ in range(12)], registry.tick(86400.0)
    with ThreadPoolExecutor(6) as pool:
        won = list(pool.map(
            lambda job: registry.claim_sweep("sweep.orphans", NODE, job, tick=tick, every_s=86400.0, ttl_s=60), claims
        ))  # fmt: skip
    assert sum(won) == 1


def test_one_that_was_used_and_knows_nothing_is_being_rebuilt(registry: Registry) -> None:
    assert 4 < registry.rebuilding_s(used=True, within_s=5) <= 5
    assert 0 < registry.rebuilding_s(used=False, within_s=60) <= 5, "for all, and no longer"


def test_one_that_is_new_is_not_rebuilt(registry: Registry) -> None:
    assert registry.rebuilding_s(used=False, within_s=5) == 0
    assert registry.rebuilding_s(used=True, within_s=5) == 0, "the second node that asks has used it since"
