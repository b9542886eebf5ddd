from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from ipaddress import IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvm.domain.addressing import CLUSTER, NET_IDS, TenantNetwork, allocate, free_offset, parse_net_id, parse_subnet
from mvm.errors import InvalidInput, NotAllowed, QuotaExceeded
from tests.support.strategies import networks

Asked = tuple[int | None, IPv4Network | None]
asked = st.tuples(
    st.none() | st.integers(0, 12) | st.sampled_from(NET_IDS),
    st.none() | networks().map(lambda network: network.subnet),
)


# --- allocation


@given(st.lists(asked, max_size=25))
def test_networks_never_share_an_id_or_an_address(wishes: Sequence[Asked]) -> None:
    given_networks: list[TenantNetwork] = []
    for net_id, subnet in wishes:
        used = {network.net_id for network in given_networks}
        taken = [network.subnet for network in given_networks]
        try:
            new = allocate(net_id, subnet, used_ids=used, taken=taken)
        except NotAllowed as error:
            refusals = {
                "tenant.net_id_used": net_id in used,
                "tenant.subnet_overlap": subnet is not None and any(subnet.overlaps(other) for other in taken),
            }
            if not refusals[error.code]:
                raise
            continue
        assert new.net_id in NET_IDS
        assert new.net_id not in used
        assert net_id in (None, new.net_id)
        assert subnet in (None, new.subnet)
        assert new.subnet.subnet_of(CLUSTER)
        assert not any(new.subnet.overlaps(other) for other in taken)
        given_networks.append(new)


@given(st.sets(st.integers(0, 30)), st.lists(networks().map(lambda network: network.subnet), max_size=5))
def test_the_lowest_id_never_used_and_a_free_24_are_chosen(used: set[int], taken: list[IPv4Network]) -> None:
    new = allocate(None, None, used_ids=used, taken=taken)
    assert new.net_id == min(set(range(32)) - used)
    assert new.subnet.prefixlen == 24


def test_all_4096_ids_have_a_24_of_their_own() -> None:
    subnets = {allocate(net_id, None, used_ids=(), taken=()).subnet for net_id in NET_IDS}
    assert len(subnets) == 4096
    assert sum(subnet.num_addresses for subnet in subnets) == CLUSTER.num_addresses


def test_when_nothing_is_left_it_says_so() -> None:
    with pytest.raises(QuotaExceeded) as ids:
        allocate(None, None, used_ids=NET_IDS, taken=())
    assert ids.value.code == "tenant.net_ids_exhausted"
    with pytest.raises(QuotaExceeded) as subnets:
        allocate(None, None, used_ids=(), taken=[CLUSTER])
    assert subnets.value.code == "tenant.subnets_exhausted"


# --- one network


@given(networks(), st.data())
def test_a_guests_addresses_follow_from_its_offset(network: TenantNetwork, data: st.DataObject) -> None:
    offset = data.draw(st.sampled_from(network.offsets))
    ip = network.ip(offset)
    assert ip in network.subnet
    assert ip not in (network.gateway, network.subnet.network_address, network.subnet.broadcast_address)
    assert ip != network.subnet.network_address + 2, "kept for builders"
    mac = bytes.fromhex(network.mac(offset).replace(":", ""))
    assert len(mac) == 6
    assert mac[0] & 0b11 == 0b10, "unicast and locally administered"
    assert len(network.tap(offset)) <= 15, "the kernel's limit"


@given(networks())
def test_the_last_offset_is_just_before_the_broadcast_address(network: TenantNetwork) -> None:
    assert network.ip(network.offsets[-1]) == network.subnet.broadcast_address - 1
    assert len(network.bridge) <= 15
    assert network.gateway in network.subnet


places = st.tuples(st.sampled_from(NET_IDS), st.integers(3, 65534))


@given(places, places)
def test_no_two_guests_share_a_mac_a_tap_or_a_uid(one: tuple[int, int], other: tuple[int, int]) -> None:
    a, b = (TenantNetwork(net_id, IPv4Network("10.240.0.0/16")) for net_id, _ in (one, other))
    assert (a.mac(one[1]) == b.mac(other[1])) == (one == other)
    assert (a.tap(one[1]) == b.tap(other[1])) == (one == other)
    assert (a.uid(one[1]) == b.uid(other[1])) == (one == other)
    assert 0x60000000 <= a.uid(one[1]) < 0x70000000
    assert (a.bridge == b.bridge) == (one[0] == other[0])


def test_names_that_could_be_confused_are_not() -> None:
    subnet = IPv4Network("10.240.0.0/16")
    assert TenantNetwork(1, subnet).tap(11) != TenantNetwork(11, subnet).tap(1)
    assert TenantNetwork(1, subnet).mac(0x0203) != TenantNetwork(0x0102, subnet).mac(3)


@given(networks(), st.sets(st.integers(0, 70)))
def test_the_lowest_free_offset_is_found(network: TenantNetwork, taken: set[int]) -> None:
    free = [offset for offset in network.offsets if offset not in taken]
    if free:
        assert free_offset(network, taken) == free[0]
    else:
        with pytest.raises(QuotaExceeded) as full:
            free_offset(network, taken)
        assert full.value.code == "tenant.subnet_full"


# --- what people write


@given(networks())
def test_a_subnet_is_read_as_it_is_printed(network: TenantNetwork) -> None:
    assert parse_subnet(str(network.subnet)) == network.subnet


@pytest.mark.parametrize(
    "bad",
    ["", "x", "10.240.0.0/15", "10.240.0.0/12", "10.240.0.0/30", "10.240.0.0/32", "10.240.0.0", "10.240.7.1/24",
     "192.168.0.0/24", "10.239.255.0/24", "11.0.0.0/24", "::/64", "10.240.0.0/33", "10.240.0.0/-1", "10.240.0.0/ab"],
)  # fmt: skip
def test_a_subnet_that_no_tenant_can_have_is_refused(bad: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        parse_subnet(bad)
    assert refused.value.code == "tenant.invalid_subnet"
    assert "10.240" in refused.value.hint


@given(st.text(max_size=40))
def test_any_text_is_a_subnet_or_refused(text: str) -> None:
    with suppress(InvalidInput):
        assert parse_subnet(text).subnet_of(CLUSTER)


@given(st.integers())
def test_a_net_id_is_0_to_4095(value: int) -> None:
    if 0 <= value <= 4095:
        assert parse_net_id(value) == value
    else:
        with pytest.raises(InvalidInput):
            parse_net_id(value)
