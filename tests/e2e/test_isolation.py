"""Tenants with real guests: ``net verify --active`` from inside and outside of them, egress, and repair.

``MVM_TEST_TENANTS=6 MVM_TEST_GUESTS=2`` runs the whole matrix; here it is smaller, because each guest boots.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.stack import Stack, running_stack
from tests.support.waiting import until

pytestmark = [pytest.mark.root, pytest.mark.guest, pytest.mark.redis, pytest.mark.timeout(900)]

TENANTS = int(os.environ.get("MVM_TEST_TENANTS", "2"))
GUESTS = int(os.environ.get("MVM_TEST_GUESTS", "2"))


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack(MVM_UPLINK="up0", MVM_ORPHAN_GRACE_S="1") as running:
        name = json.loads(running.layout.connection.read_text())["netns"]
        running.in_namespace("ip", "link", "add", "up0", "type", "veth", "peer", "name", "far0")
        for words in ("link set up0 up", "link set far0 up", "addr add 198.51.100.1/24 dev up0",
                      "neigh add 198.51.100.2 lladdr 02:6f:00:00:00:02 dev up0",
                      "route add default via 198.51.100.2"):  # fmt: skip
            running.in_namespace("ip", *words.split())
        assert name
        for number in range(TENANTS):
            running.mvm("tenant", "create", f"t{number}")
            egress = ("--egress", "nat") if number == 0 else ()
            words = ("--flake", "builtin:", "--profile", "minimal", "--mem", "96", "--pinned", *egress)
            running.mvm("pool", "create", f"t{number}/web", *words)
            running.mvm("pool", "build", f"t{number}/web", timeout_s=600)
            refs = running.json("instance", "create", f"t{number}/web", "--count", str(GUESTS))
            for ref in refs:
                running.mvm("instance", "start", ref["ref"])
        yield running


def test_no_guest_reaches_another_tenant_and_all_reach_their_own(stack: Stack, tmp_path: Path) -> None:
    shown = stack.mvm("net", "verify", "--active", "--report", str(tmp_path / "report.json"), timeout_s=300)
    print(shown)
    (report,) = json.loads((tmp_path / "report.json").read_text())
    assert report["clean"]
    inside = [row for row in report["probes"] if row["kind"].endswith("from inside")]
    forbidden = [row for row in inside if row["expected"] == "blocked"]
    wanted = [row for row in inside if row["expected"] == "passes"]
    guests = TENANTS * GUESTS
    assert len(forbidden) == guests * (TENANTS - 1) * (2 + 2 * GUESTS)
    assert len(wanted) == guests * (2 + 2 * GUESTS)
    assert all(row["seen"] == row["expected"] for row in report["probes"])


def test_a_tap_is_its_vmms_own(stack: Stack) -> None:
    links = json.loads(stack.in_namespace("ip", "-j", "-d", "link", "show", "type", "tun"))
    owners = {link["ifname"]: link["linkinfo"]["info_data"].get("user") for link in links if link}
    assert len(owners) == TENANTS * GUESTS
    assert len(set(owners.values())) == len(owners)
    assert None not in owners.values()


def test_rules_changed_by_hand_are_found_and_repaired(stack: Stack) -> None:
    stack.in_namespace("nft", "flush chain inet mvm to_host")
    stack.in_namespace("nft", "add rule bridge mvm guest accept")

    def clean() -> bool:
        return stack.run("net", "verify").returncode == 0

    until(clean, 60, "the orphan sweep has repaired the rules")


def test_a_root_in_its_guest_cannot_take_anothers_place(stack: Stack) -> None:
    one, two = (i["ref"] for i in stack.json("instance", "list", "--pool", "t0/web")[:2])
    info = stack.json("instance", "info", two)
    script = (
        "ip addr add 10.240.0.200/24 dev eth0; ping -c 1 -W 2 -I 10.240.0.200 {ip} >/dev/null 2>&1 && echo leaked;"
        " ip addr del 10.240.0.200/24 dev eth0;"
        " ip link set eth0 address 02:6d:00:00:00:77; ping -c 1 -W 2 {ip} >/dev/null 2>&1 && echo leaked;"
        " ip link set eth0 address {mac}; echo done"
    ).format(ip=info["guest_ip"], mac=stack.json("instance", "info", one)["mac"])
    assert stack.mvm("instance", "exec", one, "--", "sh", "-c", script).split() == ["done"]
    stack.mvm("instance", "exec", one, "--", "sh", "-c", f"ping -c 1 -W 3 {info['guest_ip']}")


def test_sleep_and_wake_keep_the_address_and_the_rules(stack: Stack) -> None:
    ref = stack.json("instance", "list", "--pool", "t0/web")[0]["ref"]
    before = stack.json("instance", "info", ref)["guest_ip"]
    stack.mvm("instance", "sleep", ref, "--force")
    assert stack.run("net", "verify").returncode == 0
    stack.mvm("instance", "wake", ref)
    assert stack.json("instance", "info", ref)["guest_ip"] == before
    assert stack.run("net", "verify").returncode == 0
    stack.mvm("instance", "exec", ref, "--", "ping", "-c", "1", "-W", "3", "10.240.0.1")
