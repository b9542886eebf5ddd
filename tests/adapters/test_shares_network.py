"""A tenant cannot use up what all share of the network: the table of connections, and the neighbours."""

from __future__ import annotations

import json
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from mvm.domain import frames
from mvm.domain.probes import PORT
from tests.adapters.test_isolation_mutation import POLICIES
from tests.support.apart import Trial, apart
from tests.support.flows import FLOWS, forget, known, outwards, tracked

pytestmark = [pytest.mark.root, pytest.mark.timeout(300)]

FLOOD = 5000  # frames of two guests that mirror each other


@pytest.mark.parametrize("bridge_netfilter", [False, True], ids=["our namespace", "a host with containers"])
def test_what_guests_do_often_takes_no_more_than_their_share(tmp_path: Path, bridge_netfilter: bool) -> None:
    with apart(tmp_path, host_ports="8443", flows=FLOWS, bridge_netfilter=bridge_netfilter) as node:
        node.tenants(2, POLICIES[:1])
        with node.trial() as trial:
            assert [row for row in trial.rows() if not row["ok"]] == []
            assert [row for row in tracked(trial) if not row["ok"]] == []


def test_two_guests_that_mirror_each_other_fill_nothing(tmp_path: Path) -> None:
    with apart(tmp_path) as node:
        node.tenants(1)
        with node.trial() as trial:
            a, b = trial.parties[0].one, trial.parties[0].two
            forget()
            for number in range(FLOOD):
                packet = frames.udp(a.ip, b.ip, b"mirrored", port=1024 + number, sport=1024 + number * 7 % 60_000)
                trial.wires[a.wire].send(frames.ethernet(b.mac, a.mac, frames.IP, packet))
            assert known() < FLOOD // 100


def test_a_tenant_with_all_its_flows_leaves_the_next_its_own(tmp_path: Path) -> None:
    with apart(tmp_path, flows=FLOWS) as node:
        node.tenants(2, POLICIES[:1])
        with node.trial() as trial:
            bad = trial.parties[0]
            forget()
            outwards(trial, bad, FLOWS * 4)
            assert FLOWS // 2 < known() <= FLOWS + FLOWS // 4
            assert not _passes(trial, 0, sport=60_001), "its share is used up"
            assert _passes(trial, 1, sport=60_002)


def _passes(trial: Trial, party: int, *, sport: int) -> bool:
    """Whether a new flow of that tenant leaves by the uplink."""
    a, uplink = trial.parties[party].one, trial.wires[trial.node.networks.plan.uplink]
    sign = f"flow {sport}".encode()
    trial.wires["up0"].heard()
    packet = frames.udp(a.ip, IPv4Address("192.0.2.77"), sign, port=PORT, sport=sport)
    trial.wires[a.wire].send(a.by_gateway(packet))
    while trial.node.probing.wait([uplink], 1.0):
        if any(sign in frame for frame in uplink.heard()):
            return True
    return False


def test_a_guest_makes_no_neighbours_by_asking_its_gateway(tmp_path: Path) -> None:
    """What is routed back into its own bridge would cost the host an entry for each address there is."""
    with apart(tmp_path) as node:
        node.tenants(1, POLICIES[:1])
        with node.trial() as trial:
            a = trial.parties[0].one
            for offset in range(10, 110):
                packet = frames.udp(a.ip, a.network.ip(offset), b"anybody", port=PORT, sport=2000)
                trial.wires[a.wire].send(a.by_gateway(packet))
            trial.node.probing.wait([trial.wires[a.wire]], 0.5)
            shown = node.shell.run(["ip", "-j", "neigh", "show", "dev", a.network.bridge]).stdout
            assert len(json.loads(shown or "[]")) < 10, shown


def test_a_guests_place_among_the_neighbours_is_its_own(tmp_path: Path) -> None:
    """A permanent entry is not one of those that the kernel has a number of, for all namespaces together."""
    with apart(tmp_path) as node:
        node.tenants(1)
        network = node.proof.parties()[0].one.network
        node.network.ensure_tap(network, 9)
        shown = node.shell.run(["ip", "-j", "neigh", "show", "dev", network.bridge]).stdout
        assert [(row["dst"], row["lladdr"], row["state"]) for row in json.loads(shown)] == [
            (str(network.ip(9)), network.mac(9), ["PERMANENT"])
        ]
