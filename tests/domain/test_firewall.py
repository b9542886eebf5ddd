from __future__ import annotations

from ipaddress import IPv4Network

import pytest

from mvm.domain.addressing import TenantNetwork
from mvm.domain.egress import NO_EGRESS, EgressPolicy
from mvm.domain.firewall import (
    Change,
    Element,
    GuestPort,
    Plan,
    Ruleset,
    guest_elements,
    parse_host_ports,
    ruleset,
)
from mvm.domain.ids import PoolId

ACME = TenantNetwork(7, IPv4Network("10.240.7.0/24"))
BETA = TenantNetwork(4095, IPv4Network("10.241.0.0/16"))
WEB = PoolId("web")
NAT = EgressPolicy.from_dict({"policy": "nat"})
LIST = EgressPolicy.from_dict({"policy": "allow", "allow": ["192.0.2.0/24:443/tcp", "198.51.100.7"]})
OUT = Plan("up0")


def text(rules: Ruleset) -> str:
    return "\n".join(rules.commands())


def test_it_is_the_same_however_the_model_is_listed() -> None:
    guests = [GuestPort(ACME, 3), GuestPort(ACME, 4), GuestPort(BETA, 65534)]
    one = ruleset(Plan(), [ACME, BETA], [], guests)
    other = ruleset(Plan(), [BETA, ACME], [], reversed(guests))
    assert one == other
    assert one.commands() == other.commands()


def test_a_guest_is_its_tap_its_mac_and_its_address() -> None:
    assert guest_elements(Plan(), GuestPort(ACME, 3, WEB, NAT)) == (
        Element("bridge mvm guests", '"tn7i3" . 02:6d:00:07:00:03 . 10.240.7.3'),
    )
    assert guest_elements(OUT, GuestPort(BETA, 65534, WEB, NAT)) == (
        Element("bridge mvm guests", '"tn4095i65534" . 02:6d:0f:ff:ff:fe . 10.241.255.254'),
        Element("inet mvm pool-4095-web", "10.241.255.254"),
    )


def test_a_tenant_with_a_way_out_has_a_chain_and_its_pools_have_sets() -> None:
    api, off = PoolId("api"), PoolId("off")
    pools = [(ACME, WEB, LIST), (ACME, api, NAT), (ACME, off, NO_EGRESS)]
    rules = ruleset(OUT, [ACME, BETA], pools, [GuestPort(ACME, 3, WEB, LIST), GuestPort(ACME, 4, off, NO_EGRESS)])
    assert rules.chains == {
        "tenant-7": (
            "ct state new ct count over 8192 drop",
            "ip saddr @pool-7-api accept",
            "ip saddr @pool-7-web ip daddr 192.0.2.0/24 tcp dport 443 accept",
            "ip saddr @pool-7-web ip daddr 198.51.100.7/32 accept",
        )
    }
    commands = rules.commands()
    order = [
        "add set inet mvm pool-7-web { type ipv4_addr; }",
        "add chain inet mvm tenant-7",
        'add element inet mvm egress { "br-tenant-7" : jump tenant-7 }',
        "add element inet mvm pool-7-web { 10.240.7.3 }",
    ]
    assert [command for command in commands if command in order] == order
    assert not [
        command for command in commands if "off" in command or ("10.240.7.4 }" in command and "pool" in command)
    ]


def test_without_an_uplink_nothing_leads_out() -> None:
    rules = ruleset(Plan(), [ACME], [(ACME, WEB, LIST)], [GuestPort(ACME, 3, WEB, LIST), GuestPort(ACME, 4, WEB, NAT)])
    assert rules.chains == {}
    assert "egress" not in text(rules)
    assert "masquerade" not in text(rules)


def test_networks_that_are_never_reached_are_named_once() -> None:
    never = tuple(IPv4Network(n) for n in ("10.240.7.0/24", "203.0.113.0/24", "203.0.113.128/25", "203.0.113.0/24"))
    assert "ip daddr { 10.240.0.0/12, 169.254.0.0/16, 203.0.113.0/24 } drop" in text(
        ruleset(Plan("up0", (), never), [], [], [])
    )


@pytest.mark.parametrize(("one", "other"), [(LIST, NAT), (NAT, LIST), (NAT, NO_EGRESS), (NO_EGRESS, LIST), (NAT, NAT)])
def test_a_change_leaves_what_the_whole_would_be(one: EgressPolicy, other: EgressPolicy) -> None:
    def rules(policy: EgressPolicy, *networks: TenantNetwork) -> Ruleset:
        return ruleset(OUT, networks, [(ACME, WEB, policy)], [GuestPort(ACME, 3, WEB, policy)])

    before, after = rules(one, ACME), rules(other, ACME, BETA)
    change = before.until(after)
    assert before.changed_by(change) == after
    assert after.changed_by(change) == after
    assert after.changed_by(after.until(before)) == before
    assert after.until(after) == Change()


def test_a_change_is_as_long_among_few_as_among_many() -> None:
    change = Change(guest_elements(OUT, GuestPort(ACME, 3, WEB, NAT)))
    assert len(change.commands()) == 2


@pytest.mark.parametrize("words", ["", "443", "443/tcp, 53/udp", " 443 443/tcp "])
def test_host_ports(words: str) -> None:
    assert [str(port) for port in parse_host_ports(words)] == {
        "": [], "443": ["443/tcp"], "443/tcp, 53/udp": ["443/tcp", "53/udp"], " 443 443/tcp ": ["443/tcp"],
    }[words]  # fmt: skip


@pytest.mark.parametrize("words", ["0", "65536", "x", "80/icmp", "80/", "-1", "80;drop"])
def test_a_bad_host_port_is_refused(words: str) -> None:
    with pytest.raises(ValueError, match=r"PORT|protocol"):
        parse_host_ports(words)
