"""ports/firewall.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from mvm.domain.addressing import TenantNetwork
from mvm.domain.egress import NO_EGRESS, EgressPolicy
from mvm.domain.firewall import (
    Change,
    Element,
    GuestPort,
    Plan,
    bridge_elements,
    guest_elements,
    parse_host_ports,
    ruleset,
)
from mvm.domain.ids import PoolId
from mvm.drivers.fake import FakeHost
from mvm.drivers.nftables import Nftables
from mvm.errors import Failed
from mvm.ports.firewall import PacketFilter
from tests.support.namespace import own_namespace
from tests.support.shell import RecordingShell

ACME = TenantNetwork(7, IPv4Network("10.240.7.0/24"))
BETA = TenantNetwork(8, IPv4Network("10.240.8.0/24"))
WEB = PoolId("web")
PLAN = Plan("up0", parse_host_ports("443"))
LIST = EgressPolicy.from_dict({"policy": "allow", "allow": ["192.0.2.0/24:443/tcp"]})
NAT = EgressPolicy.from_dict({"policy": "nat"})
RULES = ruleset(PLAN, [ACME], [(ACME, WEB, LIST)], [GuestPort(ACME, 3, WEB, LIST)])
FOREIGN = "table inet theirs { chain c { type filter hook input priority 0; tcp dport 23 drop; }; }"


@dataclass
class Side:
    packets: PacketFilter
    tamper: Callable[[], object]
    shell: RecordingShell | None = None


@pytest.fixture(params=["fake", pytest.param("nftables", marks=pytest.mark.root)])
def side(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Side]:
    if request.param == "fake":
        fake = FakeHost()
        yield Side(fake.packets, lambda: fake.tampered.append("inet mvm to_host: accept"))
        return
    with own_namespace():
        shell = RecordingShell()
        yield Side(Nftables(shell, tmp_path / "mark"), lambda: nft(shell, "insert rule inet mvm to_host accept"), shell)


@pytest.fixture
def real(tmp_path: Path) -> Iterator[Side]:
    with own_namespace():
        shell = RecordingShell()
        shell.run(["ip", "-batch", "-"], stdin="link add br-tenant-7 type bridge\nlink add br-tenant-8 type bridge\n"
                                               "link add up0 type veth peer name up1\nlink set up0 up\n")  # fmt: skip
        yield Side(Nftables(shell, tmp_path / "mark"), lambda: None, shell)


def nft(shell: RecordingShell, text: str) -> str:
    return shell.run(["nft", "-f", "-"], stdin=f"{text}\n").stdout


def test_what_was_applied_is_there_however_often(side: Side) -> None:
    assert side.packets.differences(RULES)
    for _ in range(2):
        side.packets.apply(RULES)
        assert list(side.packets.differences(RULES)) == []
    other = ruleset(Plan(), [BETA], [], [])
    side.packets.apply(other)
    assert list(side.packets.differences(other)) == []
    assert side.packets.differences(RULES)


def test_a_change_may_be_repeated_and_undone(side: Side) -> None:
    side.packets.apply(RULES)
    more = (*bridge_elements(BETA), *guest_elements(PLAN, GuestPort(ACME, 4, WEB, LIST)))
    for _ in range(2):
        side.packets.change(Change(more))
        assert list(side.packets.differences(RULES.changed_by(Change(more)))) == []
    for _ in range(2):
        side.packets.change(Change(removed=more))
        assert list(side.packets.differences(RULES)) == []


def test_another_policy_takes_the_place_of_one(side: Side) -> None:
    side.packets.apply(RULES)
    there, policies = RULES, [NAT, NO_EGRESS, LIST, NO_EGRESS, NAT, LIST]
    for policy in policies:
        wanted = ruleset(PLAN, [ACME], [(ACME, WEB, policy)], [GuestPort(ACME, 3, WEB, policy)])
        for _ in range(2):
            side.packets.change(there.until(wanted))
            assert list(side.packets.differences(wanted)) == []
        there = wanted


def test_a_change_to_nothing_is_refused(side: Side) -> None:
    with pytest.raises(Failed) as refused:
        side.packets.change(Change(bridge_elements(ACME)))
    assert refused.value.code == "firewall.refused"
    assert refused.value.hint
    side.packets.apply(RULES)
    side.packets.remove()
    side.packets.remove()
    with pytest.raises(Failed):
        side.packets.change(Change(bridge_elements(ACME)))


def test_what_somebody_else_changed_is_named_and_goes(side: Side) -> None:
    side.packets.apply(RULES)
    side.tamper()
    assert list(side.packets.differences(RULES)) == ["not ours: inet mvm to_host: accept"]
    side.packets.apply(RULES)
    assert list(side.packets.differences(RULES)) == []


# --- the kernel's side


@pytest.mark.root
@pytest.mark.parametrize(
    ("command", "found"),
    [
        ("flush chain bridge mvm guest", "missing: bridge mvm guest: drop"),
        ("delete table bridge mvm", 'missing: bridge mvm prerouting: iifname "tn*" goto guest'),
        ("flush set bridge mvm guests", 'missing: bridge mvm guests: "tn7i3" . 02:6d:00:07:00:03 . 10.240.7.3'),
        ('add element inet mvm bridges { "br-tenant-7" . "br-tenant-8" }',
         'not ours: inet mvm bridges: "br-tenant-7" . "br-tenant-8"'),
        ("add chain inet mvm theirs", "not ours: inet mvm theirs: (empty)"),
        ("add rule inet mvm tenant-7 accept", "not ours: inet mvm tenant-7: accept"),
    ],
)  # fmt: skip
def test_every_change_by_hand_is_found(real: Side, command: str, found: str) -> None:
    assert real.shell is not None
    real.packets.apply(RULES)
    nft(real.shell, command)
    assert found in real.packets.differences(RULES)
    real.packets.apply(RULES)
    assert list(real.packets.differences(RULES)) == []


@pytest.mark.root
def test_what_netlink_puts_there_is_what_nft_would(real: Side) -> None:
    assert real.shell is not None
    far = TenantNetwork(4095, IPv4Network("10.241.0.0/16"))
    start = ruleset(PLAN, [], [(far, WEB, LIST)], [])
    start = start.changed_by(Change(removed=tuple(start.elements)))
    whole = ruleset(PLAN, [far], [(far, WEB, LIST)], [GuestPort(far, 65534, WEB, LIST)])
    change = start.until(whole)
    assert len(change.elements) == 5
    real.packets.apply(start)
    nft(real.shell, "\n".join(change.commands()))
    by_nft = real.shell.run(["nft", "-s", "list", "ruleset"]).stdout
    real.packets.apply(start)
    real.shell.ran.clear()
    real.packets.change(change)
    assert real.shell.ran == []
    assert real.shell.run(["nft", "-s", "list", "ruleset"]).stdout == by_nft


@pytest.mark.root
def test_a_change_is_all_or_nothing(real: Side) -> None:
    real.packets.apply(RULES)
    nowhere = Element("inet mvm egress", '"br-tenant-9"', "jump tenant-9")
    for change in (Change((*bridge_elements(BETA), nowhere)), Change(removed=(*bridge_elements(ACME), nowhere))):
        with pytest.raises(Failed) as refused:
            real.packets.change(change)
        assert refused.value.code == "firewall.refused"
        assert list(real.packets.differences(RULES)) == []


@pytest.mark.root
def test_rules_that_are_not_ours_are_left_alone(real: Side) -> None:
    assert real.shell is not None
    nft(real.shell, FOREIGN)
    listing = ["nft", "-s", "list", "table", "inet", "theirs"]
    before = real.shell.run(listing).stdout
    real.packets.apply(RULES)
    real.packets.change(Change(bridge_elements(BETA)))
    real.packets.apply(RULES)
    assert list(real.packets.differences(RULES)) == []
    real.packets.remove()
    assert real.shell.run(listing).stdout == before
    assert "mvm" not in real.shell.run(["nft", "list", "tables"]).stdout


@pytest.mark.root
def test_a_change_of_members_runs_no_program_and_of_a_chain_one(real: Side) -> None:
    assert real.shell is not None
    real.packets.apply(RULES)
    real.shell.ran.clear()
    real.packets.change(Change(guest_elements(PLAN, GuestPort(ACME, 4, WEB, LIST))))
    assert real.shell.ran == []
    real.packets.change(Change(chains={"tenant-8": ("ip saddr @pool-8-api accept",)}))
    assert len(real.shell.ran) == 1


@pytest.mark.root
def test_forwarding_is_where_it_is_needed_and_is_put_back(real: Side) -> None:
    assert real.packets.forwarding() == frozenset()
    for _ in range(2):
        real.packets.forward(frozenset({"br-tenant-7"}), "up0")
        assert real.packets.forwarding() == {"br-tenant-7", "up0"}
    real.packets.forward(frozenset({"br-tenant-8"}), "up0")
    assert real.packets.forwarding() == {"br-tenant-8", "up0"}
    real.packets.forward(frozenset(), "")
    assert real.packets.forwarding() == frozenset()


@pytest.mark.root
def test_an_uplink_that_forwarded_before_still_does(real: Side) -> None:
    Path("/proc/sys/net/ipv4/conf/up0/forwarding").write_text("1")
    real.packets.forward(frozenset({"br-tenant-7"}), "up0")
    real.packets.forward(frozenset(), "")
    assert real.packets.forwarding() == {"up0"}


@pytest.mark.root
def test_without_nft_it_says_what_to_install(
    real: Side, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:  # fmt: skip
    real.packets.apply(RULES)
    (tmp_path / "bin").mkdir()
    for program in ("unshare", "sh"):
        (tmp_path / "bin" / program).symlink_to(f"/usr/bin/{program}")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for attempt in (
        lambda: real.packets.apply(RULES),
        lambda: real.packets.change(Change(chains={"tenant-7": ()})),
        lambda: real.packets.differences(ruleset(PLAN, [], [], [])),
    ):
        with pytest.raises(Failed) as missing:
            attempt()
        assert missing.value.code == "firewall.missing"
        assert "nftables" in missing.value.hint
