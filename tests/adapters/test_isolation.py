"""The matrix: many tenants, real bridges and rules, every probe; and what was established before the rules came."""

from __future__ import annotations

import socket
from collections import Counter
from pathlib import Path

import pytest

from mvm.cli.net import _lines
from mvm.domain.job import JobVerb
from mvm.drivers import netns
from mvm.errors import Failed, QuotaExceeded
from tests.adapters.test_isolation_mutation import POLICIES
from tests.support.apart import apart

pytestmark = [pytest.mark.root, pytest.mark.timeout(300)]

TENANTS = 6


def test_of_six_tenants_with_two_guests_each_none_reaches_another(tmp_path: Path) -> None:
    with apart(tmp_path, host_ports="8443", never="198.18.0.0/15") as node:
        node.tenants(TENANTS, POLICIES)
        report = node.check.verify(active=True)
        print("\n".join(_lines(report)))
        rows = report["probes"]
        assert [row for row in rows if not row["ok"]] == []
        assert report["clean"]
        names = [f"t{number}" for number in range(TENANTS)]
        seen = {(one, other): Counter(r["seen"] for r in rows if (r["from"], r["to"]) == (one, other))
                for one in names for other in names}  # fmt: skip
        for (one, other), results in seen.items():
            wanted = {"passes": 4} if one == other else {"blocked": 9}
            assert results == wanted, f"{one} to {other}: seven ways to its guest, two to its gateway"
        assert sum(row["expected"] == "blocked" for row in rows) > 300
        assert sum(row["expected"] == "passes" for row in rows) > 60
        with node.trial() as trial:
            assert [row for row in trial.rows() if not row["ok"]] == []
        after = node.check.verify(active=False)
        assert after["clean"], "probes leave nothing behind"
        assert [bridge["ports"] for bridge in after["bridges"]] == [[]] * TENANTS
        assert not node.probe_names()


def test_without_rules_everything_is_open_and_the_probes_say_so(tmp_path: Path) -> None:
    with apart(tmp_path) as node:
        node.tenants(2, [{"policy": "nat"}])
        with node.trial() as trial:
            node.packets.remove()
            wrong = Counter(row["kind"] for row in trial.rows() if not row["ok"])
        assert {"icmp", "udp", "tcp", "tcp answer", "spoofed mac", "spoofed ip", "vlan tag", "arp: spoofed ip"} <= set(
            wrong
        )


def test_a_connection_from_before_the_rules_does_not_live_on(tmp_path: Path) -> None:
    with apart(tmp_path) as node:
        node.tenants(2, [{"policy": "nat"}])
        with node.trial() as trial:
            node.packets.remove()
            one, two = (party.one for party in trial.parties)
            homes = {}
            for name in node.probe_names():
                with netns.entered(netns.path_of(name)):
                    for address in node.network.addresses():
                        homes[address] = netns.path_of(name)
            with (
                netns.socket_in(homes[str(two.ip)], socket.AF_INET, socket.SOCK_STREAM) as server,
                netns.socket_in(homes[str(one.ip)], socket.AF_INET, socket.SOCK_STREAM) as client,
            ):
                server.bind((str(two.ip), 7777))
                server.listen()
                client.settimeout(5)
                client.connect((str(two.ip), 7777))
                accepted, _ = server.accept()
                with accepted:
                    accepted.settimeout(5)
                    client.sendall(b"before")
                    assert accepted.recv(16) == b"before"
                    node.packets.apply(trial.rules)
                    accepted.settimeout(1.5)
                    client.settimeout(1.5)
                    client.sendall(b"after")
                    accepted.sendall(b"after")
                    for end in (client, accepted):
                        with pytest.raises(TimeoutError):
                            end.recv(16)


def test_rules_changed_by_hand_are_found_proven_and_repaired(tmp_path: Path) -> None:
    with apart(tmp_path) as node:
        node.tenants(2, [{"policy": "nat"}])
        node.nft("insert rule inet mvm forward accept\nflush chain bridge mvm guest\n")
        report = node.check.verify(active=True)
        assert not report["clean"]
        assert "rules: not ours: inet mvm forward: accept" in [f["what"] for f in report["findings"]]
        assert {"spoofed mac", "udp"} <= {row["kind"] for row in report["probes"] if not row["ok"]}
        assert node.ok(JobVerb.SWEEP_ORPHANS, "n1")["repaired"]
        assert node.check.verify(active=True)["clean"]


def test_what_a_killed_run_of_probes_left_goes_with_the_next(tmp_path: Path) -> None:
    with apart(tmp_path) as node:
        node.tenants(1)
        inode = Path("/proc/thread-self/ns/net").stat().st_ino
        left = f"mvm-probe-{inode}-0"
        netns.create(node.shell, left)
        node.shell.run(["ip", "-batch", "-"], stdin=f"link add tn0i2 type veth peer name eth0 netns {left}\n"
                                                    "link set tn0i2 master br-tenant-0 up\n")  # fmt: skip
        found = node.check.verify(active=False)
        assert [f["what"] for f in found["bridges"][0]["findings"]] == ["port tn0i2 belongs to no running instance"]
        assert all(row["ok"] for row in node.check.verify(active=True)["probes"])
        assert node.check.verify(active=False)["clean"]


def test_an_interface_that_is_not_ours_is_in_nobodys_way(tmp_path: Path) -> None:
    """A probe's name taken by a stranger: nothing is touched, and it is said."""
    with apart(tmp_path) as node:
        node.tenants(1)
        node.shell.run(["ip", "link", "add", "tn0i2", "type", "bridge"])
        with pytest.raises(Failed) as refused:
            node.check.verify(active=True)
        assert refused.value.code == "network.failed"
        assert "bridge" in node.shell.run(["ip", "-d", "link", "show", "tn0i2"]).stdout
        assert not node.probe_names()
        assert list(node.networks.differences()) == []


def test_a_tenant_without_a_free_place_is_named(tmp_path: Path) -> None:
    with apart(tmp_path) as node:
        node.ok(JobVerb.TENANT_CREATE, "small", subnet="10.240.8.0/29")
        node.ok(JobVerb.POOL_CREATE, "small/web", flake_ref="builtin:", profile="minimal")
        node.ok(JobVerb.INSTANCE_CREATE, "small/web", count=4)
        with pytest.raises(QuotaExceeded) as full:
            node.check.verify(active=True)
        assert full.value.code == "tenant.subnet_full"
        assert "10.240.8.0/29" in full.value.message
        assert node.check.verify(active=False)["clean"]


def test_each_policy_of_a_tenant_is_tried(tmp_path: Path) -> None:
    with apart(tmp_path) as node:
        node.tenants(1, [{"policy": "none"}])
        for name, policy in (("list", POLICIES[1]), ("nat", POLICIES[0])):
            node.ok(JobVerb.POOL_CREATE, f"t0/{name}", flake_ref="builtin:", profile="minimal", egress=policy)
        report = node.check.verify(active=True)
        assert report["clean"]
        tried = Counter((row["kind"], row["expected"]) for row in report["probes"] if row["kind"].startswith("egress"))
        assert set(tried) == {
            ("egress nat", "passes"), ("egress nat", "blocked"), ("egress allow", "passes"),
            ("egress allow", "blocked"), ("egress none", "blocked"),
        }  # fmt: skip
