"""Rules kept with the model, and ``net verify``, on the fake host."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from ipaddress import IPv4Network
from itertools import count
from pathlib import Path

import pytest

from mvm.domain.addressing import TenantNetwork
from mvm.domain.firewall import Change, Element
from mvm.domain.ids import InstanceRef
from mvm.domain.job import JobVerb
from mvm.domain.pool import WorkerPool
from mvm.errors import Failed
from mvm.ports.probing import ProbePort, Wire
from mvm.services.network_check import NetworkCheck
from mvm.settings import Settings
from tests.services.conftest import Node
from tests.support.command_line import CommandLine

NAT, NONE = {"policy": "nat"}, {"policy": "none"}
LIST = {"policy": "allow", "allow": ["192.0.2.0/24:443/tcp"]}
OUT = Element("inet mvm pool-0-web", "10.240.0.3")
LEAD = Element("inet mvm egress", '"br-tenant-0"', "jump tenant-0")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        state_dir=tmp_path / "state", node_id="n1", driver="fake", parallel_boots=2, orphan_grace_s=60, uplink="up0"
    )


@pytest.fixture(autouse=True)
def uplink(node: Node) -> None:
    node.host.foreign.add("up0")


def check_of(node: Node) -> NetworkCheck:
    return node.services.view._network_check


def settled(node: Node) -> bool:
    """Whether the rules are those that the store asks for, and the node is clean."""
    return bool(node.services.view.verify_network(active=False)["clean"])


def elements(node: Node) -> set[Element]:
    assert node.host.rules is not None
    return set(node.host.rules.elements)


def test_rules_come_and_go_with_tenants_pools_and_instances(node: Node) -> None:
    node.pool()
    (ref,) = node.create()
    assert not [e for e in elements(node) if e.of == "bridge mvm guests"]
    node.ok(JobVerb.INSTANCE_START, ref)
    guest = Element("bridge mvm guests", '"tn0i3" . 02:6d:00:00:00:03 . 10.240.0.3')
    assert guest in elements(node)
    assert settled(node)
    for away, back in (
        (JobVerb.INSTANCE_SLEEP, JobVerb.INSTANCE_WAKE),
        (JobVerb.INSTANCE_STOP, JobVerb.INSTANCE_START),
    ):
        node.ok(away, ref, force=True)
        assert guest not in elements(node)
        assert settled(node)
        node.ok(back, ref)
        assert guest in elements(node), "the address is kept"
        assert settled(node)
    node.ok(JobVerb.INSTANCE_DESTROY, ref)
    node.ok(JobVerb.POOL_DESTROY, "acme/web")
    assert settled(node)
    node.ok(JobVerb.TENANT_DESTROY, "acme")
    assert not elements(node)
    assert settled(node)


def test_a_policy_reaches_running_guests_and_forwarding_follows(node: Node) -> None:
    node.pool()
    (ref,) = node.create()
    node.ok(JobVerb.INSTANCE_START, ref)
    assert node.host.forwards == frozenset()
    for policy in (NAT, LIST, NAT, NONE, LIST):
        shown = node.ok(JobVerb.POOL_UPDATE, "acme/web", egress=policy)
        assert shown["egress"] == {"allow": [], **policy}
        verdict = policy is not NONE
        assert (OUT in elements(node)) is verdict
        assert (LEAD in elements(node)) is verdict
        assert node.host.forwards == (frozenset({"br-tenant-0", "up0"}) if verdict else frozenset())
        assert settled(node)
    node.ok(JobVerb.INSTANCE_DESTROY, ref)
    node.ok(JobVerb.POOL_DESTROY, "acme/web")
    assert node.host.rules is not None
    assert node.host.rules.chains == {}


def test_a_pool_may_have_its_policy_from_the_start(node: Node) -> None:
    node.ok(JobVerb.TENANT_CREATE, "acme")
    node.ok(JobVerb.POOL_CREATE, "acme/web", flake_ref="builtin:", profile="minimal", egress=LIST)
    assert node.host.rules is not None
    way_out = "ip saddr @pool-0-web ip daddr 192.0.2.0/24 tcp dport 443 accept"
    assert node.host.rules.chains == {"tenant-0": ("ct state new ct count over 8192 drop", way_out)}
    assert settled(node)


def test_tables_that_vanished_are_back_with_the_next_change(node: Node) -> None:
    node.pool()
    refs = node.create(2)
    node.ok(JobVerb.INSTANCE_START, refs[0])
    node.host.rules = None
    node.ok(JobVerb.INSTANCE_START, refs[1])
    assert settled(node)
    node.host.rules = None
    node.ok(JobVerb.INSTANCE_STOP, refs[0])
    assert settled(node)


def test_what_was_changed_by_hand_is_found_and_the_orphan_sweep_repairs_it(node: Node) -> None:
    node.pool()
    node.host.tampered.append("inet mvm to_host: accept")
    found = node.services.view.verify_network(active=False)
    assert not found["clean"]
    assert [f["what"] for f in found["findings"]] == ["rules: not ours: inet mvm to_host: accept"]
    swept = node.sweep(JobVerb.SWEEP_ORPHANS)
    assert swept["changed"]
    assert swept["repaired"] == ["not ours: inet mvm to_host: accept"]
    assert settled(node)
    assert node.sweep(JobVerb.SWEEP_ORPHANS)["repaired"] == []


def test_nothing_is_repaired_while_probes_are_out(node: Node) -> None:
    node.pool()
    node.host.tampered.append("inet mvm to_host: accept")
    with node.host.locks.hold("net probes", deadline_s=0):
        assert node.sweep(JobVerb.SWEEP_ORPHANS)["repaired"] == []
    assert node.sweep(JobVerb.SWEEP_ORPHANS)["repaired"]


class Deaf:
    """Probes that hear nothing, whatever is sent."""

    @contextmanager
    def attached(self, ports: Sequence[ProbePort], uplink: str) -> Iterator[Mapping[str, Wire]]:
        yield {name: self for name in (*(port.name for port in ports), uplink) if name}

    def reaches(self, address: str, port: int, seconds: float) -> bool:
        return False

    def wait(self, wires: Iterable[Wire], seconds: float) -> bool:
        return False

    def send(self, frame: bytes) -> None: ...

    def heard(self) -> Sequence[bytes]:
        return ()


def test_a_proof_that_nobody_waits_for_ends_and_others_may_prove_and_repair(node: Node) -> None:
    node.pool()
    (ref,) = node.create()
    node.ok(JobVerb.INSTANCE_START, ref)
    check, asked = check_of(node), count(1)
    check._proof._probing = Deaf()

    def gone() -> None:
        if next(asked) == 3:  # probes are out
            raise EOFError

    with pytest.raises(EOFError):
        node.services.view.verify_network(active=True, check=gone)
    with node.host.locks.hold("net probes", deadline_s=0):
        assert settled(node), "the probes' places are nobody's again"


@pytest.mark.parametrize("code", ["firewall.missing", "firewall.refused"])
def test_without_rules_nothing_comes_up(node: Node, code: str) -> None:
    node.pool()
    (ref,) = node.create()
    for point in ("packets.change", "packets.apply"):
        node.host.fail(point, Failed(code, "nft is not to be had", hint="install it"), times=9)
    node.fails(code, JobVerb.INSTANCE_START, ref)
    assert not node.host.taps
    node.fails(code, JobVerb.TENANT_CREATE, "beta")
    assert set(node.host.bridges) == {"br-tenant-0"}


def test_a_policy_needs_an_uplink(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.pool()
    networks = check_of(node)._networks
    monkeypatch.setattr(networks, "plan", replace(networks.plan, uplink=""))
    for verb, params in (
        (JobVerb.POOL_UPDATE, {"egress": NAT}),
        (JobVerb.POOL_UPDATE, {"egress": LIST}),
    ):
        failed = node.fails("pool.no_uplink", verb, "acme/web", **params)
        assert failed.error is not None
        assert "MVM_UPLINK" in failed.error["hint"]
    node.fails("pool.no_uplink", JobVerb.POOL_CREATE, "acme/api", flake_ref="builtin:", profile="minimal", egress=NAT)
    assert [p["egress"] for p in node.services.view.pools(None)] == [{"policy": "none", "allow": []}]


def test_a_report_names_what_is_wrong_with_each_bridge(node: Node) -> None:
    node.pool()
    node.ok(JobVerb.TENANT_CREATE, "beta")
    refs = node.create(2)
    node.ok(JobVerb.INSTANCE_START, refs[0])
    assert settled(node)
    node.host.taps["tn0i99"] = "br-tenant-0"
    node.host.taps["tn9i9"] = None
    node.host.bridges["br-tenant-9"] = ()
    node.host.bridges["br-tenant-1"] = ("10.240.1.2/24",)
    node.host.taps["tn0i3"] = None
    node.host.forwards = frozenset({"br-tenant-1"})
    node.host.foreign.discard("up0")
    report = node.services.view.verify_network(active=False)
    assert not report["clean"]
    acme, beta = report["bridges"]
    assert (acme["tenant_id"], acme["bridge"], acme["subnet"], acme["gateway"], acme["clean"]) == (
        "acme", "br-tenant-0", "10.240.0.0/24", "10.240.0.1", False,
    )  # fmt: skip
    assert [f["what"] for f in acme["findings"]] == [
        "tn0i3 of a running instance is no port", "port tn0i99 belongs to no running instance",
    ]  # fmt: skip
    assert [f["what"] for f in beta["findings"]] == [
        "the bridge lacks its address 10.240.1.1/24", "the bridge has the address 10.240.1.2/24",
    ]  # fmt: skip
    assert [f["what"] for f in report["findings"]] == [
        "the uplink up0 does not exist", "bridge br-tenant-9 belongs to no tenant",
        "TAP tn9i9 belongs to no running instance",
    ]  # fmt: skip
    assert all(f["hint"] for f in [*acme["findings"], *beta["findings"], *report["findings"]])


def test_a_registry_that_disagrees_or_is_away_is_a_finding(node: Node) -> None:
    node.pool()
    tenant = node.services.store.tenants()[0]
    node.registry.put_tenant(replace(tenant, network=TenantNetwork(0, IPv4Network("10.240.77.0/24"))))
    (report,) = node.services.view.verify_network(active=False)["bridges"]
    assert "10.240.77.0/24" in report["findings"][0]["what"]


def test_instances_in_flight_are_no_finding(node: Node) -> None:
    node.pool()
    (ref,) = node.create()
    node.ok(JobVerb.INSTANCE_START, ref)
    from mvm.domain.instance import InFlight
    from mvm.domain.lifecycle import Verb

    row = node.instance(ref)
    node.services.store.save_instance(
        replace(row, in_flight=InFlight(node.submit(JobVerb.INSTANCE_STOP, ref).job_id, Verb.STOP))
    )
    node.host.taps.clear()
    assert node.host.rules is not None
    node.host.rules = replace(node.host.rules, elements=frozenset(e for e in elements(node) if "tn0i3" not in e.key))
    assert settled(node), InstanceRef.parse(ref)


def test_the_command_shows_and_keeps_a_report(mvm: CommandLine, node: Node, tmp_path: Path) -> None:
    node.pool()
    kept = tmp_path / "report.json"
    shown = mvm.ok("net", "verify", "--report", str(kept))
    assert "br-tenant-0" in shown
    assert shown.rstrip().endswith("n1: clean")
    assert '"clean": true' in kept.read_text()
    assert set(mvm.json("net", "verify")) == {"node_id", "at", "clean", "active", "bridges", "findings", "probes"}
    node.host.tampered.append("inet mvm to_host: accept")
    result = mvm("net", "verify")
    assert result.exit_code == 1
    assert "not clean: rules: not ours: inet mvm to_host: accept" in result.stdout
    assert "hint: " in result.stdout
    assert "error[net.not_clean]" in result.stderr
    mvm.fails(2, "usage", "net", "verify", "--report", str(tmp_path / "none" / "x"))
    mvm.fails(2, "net.report_unwritable", "net", "verify", "--report", "/dev/full")
    mvm.fails(4, "net.no_probes", "net", "verify", "--active")


def test_pool_commands_take_a_policy(mvm: CommandLine, node: Node) -> None:
    node.ok(JobVerb.TENANT_CREATE, "acme")
    words = ("acme/web", "--flake", "builtin:", "--profile", "minimal")
    made = mvm.json(
        "pool", "create", *words, "--egress", "allow", "--allow", "192.0.2.1:53/udp", "--allow", "192.0.2.2"
    )
    assert made["egress"] == {"policy": "allow", "allow": ["192.0.2.1/32:53/udp", "192.0.2.2/32"]}
    assert mvm.json("pool", "update", "acme/web", "--egress", "nat")["egress"] == {"policy": "nat", "allow": []}
    assert mvm.json("pool", "update", "acme/web", "--allow", "192.0.2.3")["egress"]["policy"] == "allow"
    assert mvm.json("pool", "update", "acme/web", "--pinned")["egress"]["allow"] == ["192.0.2.3/32"]
    for wrong in (("--egress", "allow"), ("--egress", "nat", "--allow", "192.0.2.1"), ("--allow", "10.240.0.0/24")):
        mvm.fails(2, "pool.invalid_egress", "pool", "update", "acme/web", *wrong)
    assert mvm.json("pool", "info", "acme/web")["egress"]["allow"] == ["192.0.2.3/32"]


@pytest.mark.parametrize(("first", "last"), [(NAT, NONE), (NONE, NAT), (NAT, LIST)])
def test_of_two_changes_at_once_the_one_that_is_stored_holds(
    node: Node, monkeypatch: pytest.MonkeyPatch, first: dict[str, object], last: dict[str, object]
) -> None:
    node.pool()
    if first == NONE:
        node.ok(JobVerb.POOL_UPDATE, "acme/web", egress=LIST)
    (ref,) = node.create()
    node.ok(JobVerb.INSTANCE_START, ref)
    networks, redirect = node.services.networks, node.services.networks.redirect

    def overtaken(before: WorkerPool | None, after: WorkerPool | None) -> None:
        monkeypatch.setattr(networks, "redirect", redirect)
        node.ok(JobVerb.POOL_UPDATE, "acme/web", egress=last)
        redirect(before, after)

    monkeypatch.setattr(networks, "redirect", overtaken)
    node.ok(JobVerb.POOL_UPDATE, "acme/web", egress=first)
    assert settled(node)


def test_an_address_that_is_given_again_has_not_its_former_pools_way_out(node: Node) -> None:
    node.pool()
    node.ok(JobVerb.POOL_CREATE, "acme/open", flake_ref="builtin:", profile="minimal", egress=NAT)
    left = Element("inet mvm pool-0-open", "10.240.0.3")
    node.host.packets.change(Change((left,)))  # by a change of policy while a guest was on its way out
    (ref,) = node.create()
    node.ok(JobVerb.INSTANCE_START, ref)
    assert left not in elements(node)
    assert settled(node)
