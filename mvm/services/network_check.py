"""``net verify``: the networks as they are against the networks as they should be, and proof by traffic."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from mvm.domain.addressing import METADATA
from mvm.domain.ids import NodeId
from mvm.domain.instance import Instance
from mvm.domain.tenant import Tenant
from mvm.errors import Unreachable
from mvm.ports.clock import Clock
from mvm.ports.firewall import PacketFilter
from mvm.ports.network import BridgeState, HostNetwork
from mvm.ports.registry import Registry
from mvm.ports.store import NodeStore
from mvm.services.network_proof import NetworkProof
from mvm.services.networks import Networks

_SHOWN = 20  # lines of rules


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it should be, and what to do about it."""

    what: str
    hint: str

    def to_dict(self) -> dict[str, str]:
        """JSON form."""
        return {"what": self.what, "hint": self.hint}


@dataclass(slots=True)
class BridgeReport:
    """One tenant's bridge as it is, and what is wrong with it."""

    tenant: str
    bridge: str
    subnet: str
    gateway: str
    addresses: Sequence[str] = ()
    ports: Sequence[str] = ()
    findings: list[Finding] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "tenant_id": self.tenant, "bridge": self.bridge, "subnet": self.subnet, "gateway": self.gateway,
            "addresses": list(self.addresses), "ports": list(self.ports), "clean": not self.findings,
            "findings": [finding.to_dict() for finding in self.findings],
        }  # fmt: skip


class NetworkCheck:
    """Looks, and on demand tries. Changes nothing that stays."""

    def __init__(
        self, *, store: NodeStore, registry: Registry, clock: Clock, network: HostNetwork, packets: PacketFilter,
        networks: Networks, proof: NetworkProof, node_id: NodeId,
    ) -> None:  # fmt: skip
        self._store = store
        self._registry = registry
        self._clock = clock
        self._network = network
        self._packets = packets
        self._networks = networks
        self._proof = proof
        self._node_id = node_id

    def verify(self, *, active: bool, check: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """Everything found; ``clean`` when that is nothing. With `active` a table of probes, too.

        What `check` raises, several times a second, ends it.
        """
        began = self._clock.now().isoformat()
        bridges, findings = self.look()
        rows = self._proof.table(check) if active else []
        clean = not findings and all(not b.findings for b in bridges) and all(row["ok"] for row in rows)
        return {
            "node_id": str(self._node_id), "at": began, "clean": clean, "active": active,
            "bridges": [bridge.to_dict() for bridge in bridges],
            "findings": [finding.to_dict() for finding in findings],
            "probes": rows,
        }  # fmt: skip

    # --- looking
    def look(self) -> tuple[list[BridgeReport], list[Finding]]:
        """A report for each tenant, and what belongs to none."""
        states, taps = self._network.states(), self._network.taps()
        tenants, instances = self._store.tenants(), self._store.instances()
        reports = [self._bridge(tenant, states.get(tenant.network.bridge), instances) for tenant in tenants]
        findings = [*shared(tenants), *self._uplink(tenants)]
        known = {tenant.network.bridge for tenant in tenants}
        findings += [
            Finding(f"bridge {name} belongs to no tenant", "the orphan sweep removes it after its grace time")
            for name in sorted(states.keys() - known)
        ]
        wanted = {t.network.tap(i.offset) for t in tenants for i in instances if i.ref.tenant == t.id and _may_be_up(i)}
        findings += [
            Finding(f"TAP {tap} belongs to no running instance", "the orphan sweep removes it after its grace time")
            for tap, bridge in sorted(taps.items())
            if tap not in wanted and bridge not in known
        ]
        findings += self._rules(reports, tenants)
        return reports, findings

    def _bridge(self, tenant: Tenant, state: BridgeState | None, instances: Sequence[Instance]) -> BridgeReport:
        network = tenant.network
        report = BridgeReport(str(tenant.id), network.bridge, str(network.subnet), str(network.gateway))
        find = report.findings.append
        own = [i for i in instances if i.ref.tenant == tenant.id]
        running = {network.tap(i.offset) for i in own if i.has_vmm and not i.in_flight}
        try:
            known = self._registry.tenant(tenant.id)
        except Unreachable:
            find(Finding("the registry does not answer, so the subnet could not be compared", "see: mvm status"))
        else:
            if known is None or known.network != network:
                said = f"{known.network.net_id}, {known.network.subnet}" if known else "nothing"
                find(Finding(f"the registry knows {said} of net {network.net_id}, {network.subnet}",
                             "a heartbeat puts back what the registry lost; else two nodes disagree"))  # fmt: skip
        if state is None:
            if running:
                find(Finding("there is no bridge, and instances run", f"stop and start those of {tenant.id}"))
            return report
        report.addresses, report.ports = state.addresses, state.ports
        wanted = f"{network.gateway}/{network.subnet.prefixlen}"
        if not state.up:
            find(Finding("the bridge is down", f"ip link set {network.bridge} up"))
        if wanted not in state.addresses:
            find(Finding(f"the bridge lacks its address {wanted}", f"ip addr add {wanted} dev {network.bridge}"))
        for address in state.addresses:
            if address not in (wanted, f"{METADATA}/32"):
                find(Finding(f"the bridge has the address {address}", f"ip addr del {address} dev {network.bridge}"))
        for tap in sorted(running - set(state.ports)):
            find(Finding(f"{tap} of a running instance is no port", "stop and start the instance"))
        may = {network.tap(i.offset) for i in own if _may_be_up(i)}
        for port in state.ports:
            if port not in may:
                find(Finding(f"port {port} belongs to no running instance", f"if nobody needs it: ip link del {port}"))
        return report

    def _uplink(self, tenants: Sequence[Tenant]) -> Iterator[Finding]:
        uplink, wanted = self._networks.plan.uplink, self._networks.forwarded()
        if uplink and not self._network.has(uplink):
            yield Finding(f"the uplink {uplink} does not exist", "make it, or set MVM_UPLINK and start the stack again")
            return
        forwarding = self._packets.forwarding()
        ours = {tenant.network.bridge for tenant in tenants if tenant.network.bridge in self._network.bridges()}
        for name in sorted(ours & forwarding - wanted):
            yield Finding(f"{name} forwards, and no pool of its tenant needs that", "the orphan sweep puts it back")
        for name in sorted(({uplink, *ours} & wanted) - forwarding):
            yield Finding(f"{name} does not forward, and a pool's egress needs that", "the orphan sweep puts it back")

    def _rules(self, reports: Sequence[BridgeReport], tenants: Sequence[Tenant]) -> list[Finding]:
        """Lines that name a tenant's interfaces go to its report, the others are returned."""
        hint = "somebody changed them by hand; the orphan sweep puts them back"
        rest: list[Finding] = []
        for line in self._networks.differences():
            for report, tenant in zip(reports, tenants, strict=True):
                number = tenant.network.net_id
                if any(
                    word in line
                    for word in (f'"br-tenant-{number}"', f'"tn{number}i', f" tenant-{number}:", f" pool-{number}-")
                ):
                    report.findings.append(Finding(f"rules: {line}", hint))
                    break
            else:
                rest.append(Finding(f"rules: {line}", hint))
        return rest[:_SHOWN]


def shared(tenants: Sequence[Tenant]) -> list[Finding]:
    """Tenants that have a network in common: nothing separates their guests."""
    return [
        Finding(
            f"tenants {one.id} and {other.id} share a network: {one.network.bridge} {one.network.subnet}, "
            f"{other.network.bridge} {other.network.subnet}",
            f"destroy {other.id} and make it anew; before all else, for each of its pools: mvm instance stop T/P --all",
        )
        for one, other in combinations(sorted(tenants, key=lambda tenant: (tenant.created_at, tenant.id)), 2)
        if one.network.net_id == other.network.net_id or one.network.subnet.overlaps(other.network.subnet)
    ]


def _may_be_up(instance: Instance) -> bool:
    return instance.may_have_vmm
