"""``net verify``: the networks as they are against the networks as they should be, and proof by traffic."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import structlog

from mvm.domain.addressing import BUILDER_OFFSET
from mvm.domain.egress import Egress, EgressPolicy
from mvm.domain.firewall import METADATA, GuestPort
from mvm.domain.ids import InstanceRef, NodeId
from mvm.domain.instance import Instance
from mvm.domain.isolation import (
    PORT,
    STRAY,
    STRAY_MAC,
    TEMPLATE,
    TEMPLATE_MAC,
    TEMPLATE_NEAR,
    Call,
    Party,
    Probe,
    Stand,
    Tokens,
    calls,
    greetings,
    probes,
    ways_out,
)
from mvm.domain.lifecycle import Status
from mvm.domain.tenant import Tenant
from mvm.errors import MvmError, NotAllowed, QuotaExceeded, Unreachable
from mvm.ports.clock import Clock
from mvm.ports.firewall import PacketFilter
from mvm.ports.guest import GuestChannel
from mvm.ports.network import BridgeState, HostNetwork
from mvm.ports.probing import ProbePort, Probing, Wire
from mvm.ports.registry import Registry
from mvm.ports.storage import NodeStorage
from mvm.ports.store import NodeStore
from mvm.services.networks import Networks

log = structlog.get_logger("mvm.network_check")

_UP = (Status.RUNNING, Status.WARM)
_SETTLE_S = 0.5  # what was not heard by then did not pass
_PATIENCE_S = 5.0
_GUESTS_AT_ONCE = 8
_INSIDE_S = 30.0
_SHOWN = 20  # lines of rules
_WIDEST = (Egress.NAT, Egress.ALLOW, Egress.NONE)


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
        networks: Networks, probing: Probing | None, guest: GuestChannel, storage: NodeStorage, node_id: NodeId,
    ) -> None:  # fmt: skip
        self._store = store
        self._registry = registry
        self._clock = clock
        self._network = network
        self._packets = packets
        self._networks = networks
        self._probing = probing
        self._guest = guest
        self._storage = storage
        self._node_id = node_id

    def verify(self, *, active: bool) -> dict[str, Any]:
        """Everything found; ``clean`` when that is nothing. With `active` a table of probes, too."""
        began = self._clock.now().isoformat()
        bridges, findings = self.look()
        rows = self.prove() if active else []
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
        findings = list(self._uplink(tenants))
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
        running = {network.tap(i.offset) for i in own if i.status in _UP and not i.in_flight}
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
                if f'"{tenant.network.bridge}"' in line or f'"tn{tenant.network.net_id}i' in line:
                    report.findings.append(Finding(f"rules: {line}", hint))
                    break
            else:
                rest.append(Finding(f"rules: {line}", hint))
        return rest[:_SHOWN]

    # --- proving
    def prove(self) -> list[dict[str, Any]]:
        """The table of probes: every tenant from two places of its own, against itself, the host, and all others."""
        if self._probing is None:
            raise NotAllowed("net.no_probes", "this driver has no real network to try", hint="leave --active out")
        with self._networks.proving():
            return self._prove(self._probing)

    def _prove(self, probing: Probing) -> list[dict[str, Any]]:
        parties = self.parties()
        if not parties:
            return []
        plan, tokens = self._networks.plan, Tokens(self._clock.random(16))
        rounds = max(len(party.policies) for party in parties) if plan.uplink else 1
        rows: list[dict[str, Any]] = []
        with ExitStack() as stack:
            stack.enter_context(self._networks.probing([GuestPort(p.two.network, p.two.offset) for p in parties]))
            wires: Mapping[str, Wire] = {}
            for number in range(rounds):
                turns = [(p, *p.policies[min(number, len(p.policies) - 1)]) for p in parties]
                places = [GuestPort(p.one.network, p.one.offset, pool, policy) for p, pool, policy in turns]
                with self._networks.probing(places):
                    if not wires:
                        wires = stack.enter_context(probing.attached(probe_ports(parties), self._uplink_there()))
                        rows += run(self._clock, probing, wires, list(greetings(parties, tokens)))
                        metadata = METADATA in self._network.addresses()
                        rows += run(self._clock, probing, wires, list(probes(parties, plan, tokens, metadata=metadata)))
                        rows += [called(probing, party.name, party.one) for party in parties]
                        rows += self._from_inside(parties)
                    if plan.uplink in wires:
                        taken = [party.one.network for party in parties]
                        out = [x for party, _, policy in turns for x in ways_out(party, policy, plan, tokens, taken)]
                        rows += run(self._clock, probing, wires, out)
        return rows

    def parties(self) -> list[Party]:
        """Every tenant whose bridge is there; raises `QuotaExceeded` when one has no place left for a probe."""
        bridges, instances = self._network.bridges(), self._store.instances()
        pools = self._store.pools()
        parties = []
        for tenant in self._store.tenants():
            if tenant.network.bridge not in bridges:
                continue
            own = [i for i in instances if i.ref.tenant == tenant.id]
            used = {i.offset for i in own}
            free = next((offset for offset in reversed(tenant.network.offsets) if offset not in used), None)
            if free is None:
                raise QuotaExceeded(
                    "tenant.subnet_full", f"subnet {tenant.network.subnet} has no free address for a probe",
                    hint="destroy instances that are not needed", subnet=str(tenant.network.subnet),
                )  # fmt: skip
            guests = {str(i.ref): Stand(tenant.network, i.offset) for i in own if i.status is Status.RUNNING}
            different = {p.egress: p.ref.pool for p in pools if p.ref.tenant == tenant.id}
            # The widest first: with it everything else is tried.
            order = sorted(different.items(), key=lambda item: _WIDEST.index(item[0].kind))
            policies = tuple((pool, egress) for egress, pool in order) or ((None, EgressPolicy()),)
            parties.append(Party(
                str(tenant.id), Stand(tenant.network, BUILDER_OFFSET), Stand(tenant.network, free), guests, policies,
                f"{STRAY}{tenant.network.net_id}",
            ))  # fmt: skip
        return parties

    def _from_inside(self, parties: Sequence[Party]) -> list[dict[str, Any]]:
        """What the guests that run reach themselves."""
        asked = [(ref, party) for party in parties for ref in party.guests]
        with ThreadPoolExecutor(_GUESTS_AT_ONCE) as pool:
            answers = pool.map(lambda each: self._ask(each[0], calls(parties)), asked)
            return [
                _row(f"{call.kind} from inside", ref, call.target, call.tenant == party.name, call.word in answer)
                for (ref, party), answer in zip(asked, answers, strict=True)
                for call in calls(parties)
            ]  # fmt: skip

    def _ask(self, ref: str, all_calls: Sequence[Call]) -> set[str]:
        """The words of those calls that were answered; a guest that cannot be asked reaches nothing."""
        instance, tried = InstanceRef.parse(ref), [f"({c.command} && echo {c.word}) &" for c in all_calls]
        command = f"{{ {' '.join(tried)} wait; }} 2>/dev/null"
        try:
            done = self._guest.execute(instance, self._storage.directory(instance), command, deadline_s=_INSIDE_S)
        except MvmError as error:
            log.warning("guest not asked", instance=ref, why=error.message)
            return set()
        return set(done.stdout.decode(errors="replace").split())

    def _uplink_there(self) -> str:
        uplink = self._networks.plan.uplink
        return uplink if uplink and self._network.has(uplink) else ""


def run(
    clock: Clock, probing: Probing, wires: Mapping[str, Wire], wanted: Sequence[Probe], *, settle_s: float = _SETTLE_S,
    patience_s: float = _PATIENCE_S,
) -> list[dict[str, Any]]:  # fmt: skip
    """Send everything, then listen: until all that is wanted was heard, and long enough for what is not."""
    seen: set[int] = set()
    waiting: dict[str, list[int]] = {}
    for number, probe in enumerate(wanted):
        waiting.setdefault(probe.at, []).append(number)
    for probe in wanted:
        wires[probe.source].send(probe.frame)
    began = clock.monotonic()
    missing = {number for number, probe in enumerate(wanted) if probe.wanted}
    while (passed := clock.monotonic() - began) < patience_s and (missing - seen or passed < settle_s):
        probing.wait([wires[at] for at in waiting], settle_s / 5)
        for at, numbers in waiting.items():
            for frame in wires[at].heard():
                seen |= {number for number in numbers if wanted[number].seen_in(frame)}
    return [_row(p.kind, p.source, p.target, p.wanted, number in seen) for number, p in enumerate(wanted)]


def called(probing: Probing, name: str, stand: Stand) -> dict[str, Any]:
    """The node reaches a guest, and hears its answer."""
    return _row("tcp", "node", f"{name} {stand.ip}", True, probing.reaches(str(stand.ip), PORT, _PATIENCE_S / 5))


def _row(kind: str, source: str, target: str, wanted: bool, seen: bool) -> dict[str, Any]:
    return {
        "kind": kind, "source": source, "target": target, "expected": _word(wanted), "seen": _word(seen),
        "ok": wanted == seen,
    }  # fmt: skip


def _word(passes: bool) -> str:
    return "passes" if passes else "blocked"


def _may_be_up(instance: Instance) -> bool:
    return instance.status in _UP or instance.in_flight is not None


def probe_ports(parties: Sequence[Party]) -> list[ProbePort]:
    """What probes stand on: two places in each tenant, a port that is nobody's, and a template's TAP."""
    ports = [ProbePort(TEMPLATE, "", TEMPLATE_MAC, near_mac=TEMPLATE_NEAR)]
    for party in parties:
        for stand in (party.one, party.two):
            network = stand.network
            address = f"{stand.ip}/{network.subnet.prefixlen}"
            ports.append(ProbePort(stand.wire, network.bridge, stand.mac, address, str(network.gateway)))
        if party.stray:
            ports.append(ProbePort(party.stray, party.one.network.bridge, STRAY_MAC))
    return ports
