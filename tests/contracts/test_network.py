"""ports/network.py."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import pytest

from mvm.domain.addressing import METADATA, TenantNetwork
from mvm.drivers import netns
from mvm.drivers.fake import FakeHost
from mvm.drivers.linux_network import LinuxNetwork
from mvm.errors import Failed, NotAllowed
from mvm.ports.network import BridgeState, HostNetwork
from tests.support.namespace import own_namespace
from tests.support.shell import RecordingShell

ACME = TenantNetwork(7, IPv4Network("10.240.7.0/24"))
BETA = TenantNetwork(4095, IPv4Network("10.241.0.0/16"))


@dataclass
class Side:
    """A network under test, and a stranger's hand on the same host."""

    network: HostNetwork
    fake: FakeHost | None = None
    shell: RecordingShell | None = None

    def make_foreign(self, name: str, kind: str) -> None:
        if self.fake:
            self.fake.foreign.add(name)
        elif self.shell:
            add = ["link", "add", name, "type", "bridge"] if kind == "bridge" else ["tuntap", "add", name, "mode", kind]
            self.shell.run(["ip", *add])

    def show(self, name: str) -> dict[str, Any]:
        assert self.shell is not None
        return dict(json.loads(self.shell.run(["ip", "-j", "-d", "addr", "show", "dev", name]).stdout)[0])


@pytest.fixture(params=["fake", pytest.param("linux", marks=pytest.mark.root)])
def side(request: pytest.FixtureRequest) -> Iterator[Side]:
    if request.param == "fake":
        fake = FakeHost()
        yield Side(fake.network, fake=fake)
    else:
        with own_namespace():
            shell = RecordingShell()
            yield Side(LinuxNetwork(shell), shell=shell)


@pytest.fixture
def linux() -> Iterator[Side]:
    with own_namespace():
        shell = RecordingShell()
        yield Side(LinuxNetwork(shell), shell=shell)


def test_an_empty_host_has_none(side: Side) -> None:
    assert side.network.taps() == {}
    assert side.network.bridges() == frozenset()


def test_a_bridge_is_made_and_removed_however_often(side: Side) -> None:
    for _ in range(2):
        side.network.ensure_bridge(ACME)
        side.network.ensure_bridge(BETA)
        assert side.network.bridges() == {"br-tenant-7", "br-tenant-4095"}
    side.network.remove_bridges(frozenset())
    for _ in range(2):
        side.network.remove_bridges(frozenset({ACME.bridge, "br-tenant-9"}))
        assert side.network.bridges() == {"br-tenant-4095"}


def test_a_tap_is_a_port_of_its_tenants_bridge(side: Side) -> None:
    for _ in range(2):
        side.network.ensure_tap(ACME, 3)
        side.network.ensure_tap(ACME, 254)
        side.network.ensure_tap(BETA, 65534)
        assert side.network.taps() == {
            "tn7i3": "br-tenant-7", "tn7i254": "br-tenant-7", "tn4095i65534": "br-tenant-4095",
        }  # fmt: skip
    assert side.network.bridges() == {"br-tenant-7", "br-tenant-4095"}


def test_taps_are_removed_together_and_only_they(side: Side) -> None:
    for offset in (3, 4, 5):
        side.network.ensure_tap(ACME, offset)
    for _ in range(2):
        side.network.remove_taps(frozenset({"tn7i3", "tn7i5", "tn9i9"}))
        assert side.network.taps() == {"tn7i4": "br-tenant-7"}
    side.network.remove_taps(frozenset())
    assert side.network.taps() == {"tn7i4": "br-tenant-7"}


def test_a_tap_outlives_its_bridge_and_joins_the_next(side: Side) -> None:
    side.network.ensure_tap(ACME, 3)
    side.network.remove_bridges(frozenset({ACME.bridge}))
    assert side.network.taps() == {"tn7i3": None}
    side.network.ensure_tap(ACME, 3)
    assert side.network.taps() == {"tn7i3": "br-tenant-7"}


@pytest.mark.parametrize("kind", ["tap", "tun"])
def test_a_bridges_name_that_a_stranger_has_is_refused(side: Side, kind: str) -> None:
    side.make_foreign("br-tenant-7", kind)
    for attempt in (
        lambda: side.network.ensure_bridge(ACME),
        lambda: side.network.ensure_tap(ACME, 3),
        lambda: side.network.remove_bridges(frozenset({ACME.bridge})),
    ):
        with pytest.raises(NotAllowed) as refused:
            attempt()
        assert refused.value.code == "network.foreign"
    assert side.network.taps() == {}
    assert side.network.bridges() == frozenset()


@pytest.mark.parametrize("kind", ["bridge", "tun"])
def test_a_taps_name_that_a_stranger_has_is_refused(side: Side, kind: str) -> None:
    side.make_foreign("tn7i3", kind)
    with pytest.raises(NotAllowed) as refused:
        side.network.ensure_tap(ACME, 3)
    assert refused.value.code == "network.foreign"
    with pytest.raises(NotAllowed):
        side.network.remove_taps(frozenset({"tn7i3"}))
    assert side.network.taps() == {}


@pytest.mark.parametrize(("name", "kind"), [("tn7i3", "tap"), ("br-tenant-7", "bridge")])
def test_what_only_has_the_name_is_not_ours(side: Side, name: str, kind: str) -> None:
    """A TAP without our user, a bridge without our address."""
    side.network.ensure_tap(BETA, 3)
    assert side.network.strangers() == {}
    side.make_foreign(name, kind)
    assert set(side.network.strangers()) == {name}
    assert (set(side.network.taps()), side.network.bridges()) == ({"tn4095i3"}, {"br-tenant-4095"})


def test_a_full_bridge_takes_no_more(side: Side) -> None:
    offsets = range(3, 3 + 1022)
    if side.shell:  # as the driver would, but in one go
        side.network.ensure_bridge(BETA)
        lines = "tuntap add dev tn4095i{0} mode tap user {1}\nlink set dev tn4095i{0} master br-tenant-4095\n"
        side.shell.run(["ip", "-batch", "-"], stdin="".join(lines.format(n, BETA.uid(n)) for n in offsets))
    else:
        for offset in offsets:
            side.network.ensure_tap(BETA, offset)
    side.network.ensure_tap(BETA, 2000)
    before = side.network.taps()
    assert len(before) == 1023
    with pytest.raises(Failed) as full:
        side.network.ensure_tap(BETA, 2001)
    assert full.value.code == "network.failed"
    assert "1023 ports" in full.value.hint
    assert side.network.taps() == before


def test_it_says_what_it_has(side: Side) -> None:
    assert side.network.states() == {}
    side.network.ensure_bridge(BETA)
    side.network.ensure_tap(ACME, 3)
    side.network.ensure_tap(ACME, 254)
    metadata = f"{METADATA}/32"
    assert side.network.states() == {
        "br-tenant-7": BridgeState(up=True, addresses=("10.240.7.1/24", metadata), ports=("tn7i254", "tn7i3")),
        "br-tenant-4095": BridgeState(up=True, addresses=("10.241.0.1/16", metadata), ports=()),
    }
    assert side.network.addresses() >= {"10.240.7.1", "10.241.0.1"}
    assert [side.network.has(name) for name in ("tn7i3", "br-tenant-7", "tn7i4")] == [True, True, False]


# --- the kernel's side


@pytest.mark.root
def test_a_tap_is_owned_by_its_places_uid(linux: Side) -> None:
    linux.network.ensure_tap(BETA, 65534)
    data = linux.show("tn4095i65534")["linkinfo"]["info_data"]
    assert (data["user"], data["group"]) == (BETA.uid(65534), BETA.uid(65534))


@pytest.mark.root
def test_a_bridge_answers_for_its_own_address_alone(linux: Side) -> None:
    linux.network.ensure_tap(ACME, 3)
    linux.network.ensure_bridge(BETA)
    for bridge in (ACME.bridge, BETA.bridge):
        assert Path(f"/proc/sys/net/ipv4/conf/{bridge}/arp_ignore").read_text().strip() == "1"


@pytest.mark.root
def test_the_bridge_is_up_with_the_gateways_address(linux: Side) -> None:
    linux.network.ensure_tap(BETA, 3)
    bridge, tap = linux.show(BETA.bridge), linux.show("tn4095i3")
    assert {(a["local"], a["prefixlen"]) for a in bridge["addr_info"]} == {("10.241.0.1", 16), ("169.254.169.254", 32)}
    assert "UP" in bridge["flags"]
    assert "UP" in tap["flags"]
    assert tap["linkinfo"]["info_data"]["persist"]
    assert tap["addr_info"] == []
    assert bridge["address"] == BETA.mac(1)


@pytest.mark.root
def test_what_was_undone_by_hand_is_mended(linux: Side) -> None:
    assert linux.shell is not None
    linux.network.ensure_tap(ACME, 3)
    linux.shell.run(
        ["ip", "-batch", "-"], stdin="addr flush dev br-tenant-7\nlink set br-tenant-7 down\nlink set tn7i3 down\n"
    )
    linux.network.ensure_tap(ACME, 3)
    assert "UP" in linux.show("br-tenant-7")["flags"]
    assert "UP" in linux.show("tn7i3")["flags"]
    assert linux.show("br-tenant-7")["addr_info"][0]["local"] == "10.240.7.1"


@pytest.mark.root
def test_a_start_in_a_tenant_that_has_its_bridge_runs_no_program(linux: Side) -> None:
    assert linux.shell is not None
    linux.network.ensure_bridge(ACME)
    linux.shell.ran.clear()
    linux.network.ensure_tap(ACME, 3)
    assert not linux.shell.ran


@pytest.mark.root
def test_many_at_once_get_all_of_theirs() -> None:
    with own_namespace() as name:
        network = LinuxNetwork(RecordingShell())

        def start(offset: int) -> None:
            with netns.entered(netns.path_of(name)):
                network.ensure_tap(ACME if offset % 2 else BETA, offset)

        def stop(offset: int) -> None:
            with netns.entered(netns.path_of(name)):
                network.remove_taps(frozenset({(ACME if offset % 2 else BETA).tap(offset)}))

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(start, range(3, 27)))
            assert len(network.taps()) == 24
            assert None not in network.taps().values()
            list(pool.map(stop, range(3, 27)))
        assert network.taps() == {}
