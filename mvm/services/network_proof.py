"""The proof of ``net verify``: traffic from guests' places, and by the guests that run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import Any

import structlog

from mvm.domain.addressing import BUILDER_OFFSET, METADATA
from mvm.domain.commands import ExecPart, collected
from mvm.domain.egress import NO_EGRESS, Egress
from mvm.domain.firewall import GuestPort
from mvm.domain.ids import InstanceRef
from mvm.domain.isolation import calls, greetings, probes, ways_out
from mvm.domain.lifecycle import Status
from mvm.domain.probes import (
    ANSWERS,
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
)
from mvm.errors import MvmError, NotAllowed, NotFound, QuotaExceeded, TimedOut
from mvm.ports.clock import Clock
from mvm.ports.guest import GuestChannel
from mvm.ports.network import HostNetwork
from mvm.ports.probing import ProbePort, Probing, Wire
from mvm.ports.storage import NodeStorage
from mvm.ports.store import NodeStore
from mvm.services.networks import Networks

log = structlog.get_logger("mvm.network_proof")
Check = Callable[[], None]

_SETTLE_S = 0.5  # what was not heard by then did not pass
_PATIENCE_S = 5.0
_GUESTS_AT_ONCE = 4
_INSIDE_S = 120.0
_CALLS_AT_ONCE = 6  # more processes than that, and a small guest kills some for want of memory
_TRIES = 3  # of what should pass: a guest on a busy host may be late
_DONE = "done"  # a guest's last word
_SCRIPT = """
dir=/run/mvm/proof.$$
mkdir $dir
{{ {calls}
}} 2>/dev/null
for file in $dir/*; do
while read -r line; do case $line in {answers}) echo ${{file##*/}}; break ;; esac; done <$file
done
rm -r $dir
echo done"""
_WIDEST = (Egress.NAT, Egress.ALLOW, Egress.NONE)


class NetworkProof:
    """Two places in each tenant, and what may be sent and received there. Nothing of it stays."""

    def __init__(
        self, *, store: NodeStore, clock: Clock, network: HostNetwork, networks: Networks, probing: Probing | None,
        guest: GuestChannel, storage: NodeStorage,
    ) -> None:  # fmt: skip
        self._store = store
        self._clock = clock
        self._network = network
        self._networks = networks
        self._probing = probing
        self._guest = guest
        self._storage = storage

    def table(self, check: Check = lambda: None) -> list[dict[str, Any]]:
        """The table of probes: every tenant from two places of its own, against itself, the host, and all others.

        What `check` raises, several times a second, ends it: nobody else may probe or repair meanwhile.
        """
        if self._probing is None:
            raise NotAllowed("net.no_probes", "this driver has no real network to try", hint="leave --active out")
        with self._networks.proving():
            return self._prove(self._probing, check)

    def _prove(self, probing: Probing, check: Check) -> list[dict[str, Any]]:
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
                        rows += run(self._clock, probing, wires, list(greetings(parties, tokens)), check=check)
                        metadata = str(METADATA) in self._network.addresses()
                        wanted = list(probes(parties, plan, tokens, metadata=metadata))
                        rows += run(self._clock, probing, wires, wanted, check=check)
                        for party in parties:
                            check()
                            rows.append(called(probing, party.name, party.one))
                        rows += self._from_inside(parties, check)
                    if plan.uplink in wires:
                        taken = [party.one.network for party in parties]
                        out = [x for party, _, policy in turns for x in ways_out(party, policy, plan, tokens, taken)]
                        rows += run(self._clock, probing, wires, out, check=check)
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
            policies = tuple((pool, egress) for egress, pool in order) or ((None, NO_EGRESS),)
            parties.append(Party(
                str(tenant.id), Stand(tenant.network, BUILDER_OFFSET), Stand(tenant.network, free), guests, policies,
                f"{STRAY}{tenant.network.net_id}",
            ))  # fmt: skip
        return parties

    def _from_inside(self, parties: Sequence[Party], check: Check) -> list[dict[str, Any]]:
        """What the guests that run reach themselves."""
        asked = [(ref, party) for party in parties for ref in party.guests]
        with ThreadPoolExecutor(_GUESTS_AT_ONCE) as pool:
            answers = pool.map(lambda each: self._inside(each[0], each[1], calls(parties), check), asked)
            return [row for rows in answers for row in rows]

    def _inside(self, ref: str, party: Party, all_calls: Sequence[Call], check: Check) -> list[dict[str, Any]]:
        """What one guest reaches; a guest that cannot be asked proves nothing, and no row says that it does."""
        heard: set[str] = set()
        left = [c for c in all_calls if c.tenant == party.name]
        why = ""
        try:
            for _ in range(_TRIES):
                heard |= self._ask(ref, left, check)
                left = [c for c in left if c.word not in heard]
            heard |= self._ask(ref, [c for c in all_calls if c.tenant != party.name], check)
        except MvmError as error:
            log.warning("guest not asked", instance=ref, why=error.message)
            if not self._runs(ref):
                return []  # it was stopped or put to sleep meanwhile
            why = error.message
        rows = []
        for call in all_calls:
            pair = (party.name, call.tenant)
            row = _row(
                f"{call.kind} from inside", ref, call.target, call.tenant == party.name, call.word in heard, pair
            )
            rows.append(
                {**row, "seen": "not tried", "ok": False, "why": why} if why and call.word not in heard else row
            )
        return rows

    def _runs(self, ref: str) -> bool:
        try:
            return self._store.instance(InstanceRef.parse(ref)).status is Status.RUNNING
        except NotFound:
            return False

    def _ask(self, ref: str, tried: Sequence[Call], check: Check) -> set[str]:
        """The words of those calls that were answered. Raises when they cannot all be tried."""
        if not tried:
            return set()
        instance = InstanceRef.parse(ref)
        # One process for each call and none to judge it: all guests are busy with theirs.
        starts = [f"{call.command} </dev/null >$dir/{call.word} 2>&1 &" for call in tried]
        groups = [starts[at : at + _CALLS_AT_ONCE] for at in range(0, len(starts), _CALLS_AT_ONCE)]
        command = _SCRIPT.format(calls="\n".join("\n".join([*group, "wait"]) for group in groups), answers=ANSWERS)
        directory = self._storage.directory(instance)
        with closing(self._guest.run(instance, directory, command.encode(), deadline_s=_INSIDE_S)) as parts:
            done = collected(_checked(parts, check))
        words = set(done.stdout.decode(errors="replace").split())
        if _DONE not in words:
            raise TimedOut("guest.silent", f"the guest of {ref} was not done in {_INSIDE_S:.0f} s", subject=ref)
        return words

    def _uplink_there(self) -> str:
        uplink = self._networks.plan.uplink
        return uplink if uplink and self._network.has(uplink) else ""


def _checked(parts: Iterable[ExecPart], check: Check) -> Iterator[ExecPart]:
    for part in parts:
        check()
        yield part


def run(
    clock: Clock, probing: Probing, wires: Mapping[str, Wire], wanted: Sequence[Probe], *, settle_s: float = _SETTLE_S,
    patience_s: float = _PATIENCE_S, check: Check = lambda: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Send everything, then listen: until all that is wanted was heard, and long enough for what is not.

    What should pass is sent again after a while: a bridge forwards nothing while it takes a port up.
    """
    seen: set[int] = set()
    waiting: dict[str, list[int]] = {}
    for number, probe in enumerate(wanted):
        waiting.setdefault(probe.at, []).append(number)
    for probe in wanted:
        wires[probe.source].send(probe.frame)
    began = clock.monotonic()
    missing = {number for number, probe in enumerate(wanted) if probe.wanted}
    sent = 0.0
    while (passed := clock.monotonic() - began) < patience_s and (missing - seen or passed < settle_s):
        if passed - sent >= patience_s / 5:
            sent = passed
            for number in missing - seen:
                wires[wanted[number].source].send(wanted[number].frame)
        check()
        probing.wait([wires[at] for at in waiting], settle_s / 5)
        for at, numbers in waiting.items():
            for frame in wires[at].heard():
                seen |= {number for number in numbers if wanted[number].seen_in(frame)}
    return [_row(p.kind, p.source, p.target, p.wanted, number in seen, p.pair) for number, p in enumerate(wanted)]


def called(probing: Probing, name: str, stand: Stand) -> dict[str, Any]:
    """The node reaches a guest, and hears its answer."""
    return _row("tcp", "node", f"{name} {stand.ip}", True, probing.reaches(str(stand.ip), PORT, _PATIENCE_S / 5))


def _row(
    kind: str, source: str, target: str, wanted: bool, seen: bool, pair: tuple[str, str] = ("", "")
) -> dict[str, Any]:
    return {
        "kind": kind, "source": source, "target": target, "expected": _word(wanted), "seen": _word(seen),
        "ok": wanted == seen, "from": pair[0], "to": pair[1],
    }  # fmt: skip


def _word(passes: bool) -> str:
    return "passes" if passes else "blocked"


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
