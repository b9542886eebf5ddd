"""Tenants' networks on this node: rules first, then the interfaces that they are for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace

from mvm.domain import lock_names
from mvm.domain.addressing import TenantNetwork, bridge_net_id
from mvm.domain.egress import NO_EGRESS, Egress, EgressPolicy
from mvm.domain.firewall import (
    Change,
    GuestPort,
    Plan,
    Ruleset,
    bridge_elements,
    guest_elements,
    ruleset,
    ways_out,
)
from mvm.domain.ids import PoolId
from mvm.domain.instance import Instance
from mvm.domain.pool import WorkerPool
from mvm.domain.tenant import Tenant
from mvm.errors import Failed, NotAllowed, NotFound, TimedOut
from mvm.ports.firewall import PacketFilter
from mvm.ports.locks import Locks
from mvm.ports.network import HostNetwork
from mvm.ports.store import NodeStore

_LOCK_S = 60.0


class Networks:
    """Bridges, TAPs and rules kept together. A change is small; when it meets something else, all rules are applied."""

    def __init__(
        self, store: NodeStore, locks: Locks, network: HostNetwork, packets: PacketFilter, plan: Plan
    ) -> None:  # fmt: skip
        self._store = store
        self._locks = locks
        self._network = network
        self._packets = packets
        self.plan = plan

    # --- tenants and instances
    def open(self, network: TenantNetwork) -> None:
        """The tenant's bridge is up, and ruled."""
        with self.locked():
            self._change(Change(bridge_elements(network)))
        self._network.ensure_bridge(network)

    def close(self, tenant: Tenant) -> None:
        """Neither bridge nor rules of the tenant are left, unless another one of the store has the same net id."""
        network = tenant.network
        others = {other.network.net_id for other in self._store.tenants() if other.id != tenant.id}
        if network.net_id in others:
            return
        self._network.remove_bridges(frozenset({network.bridge}))
        with self.locked():
            self._change(Change(removed=bridge_elements(network)))

    def used_net_ids(self) -> frozenset[int]:
        """The net ids of bridges that something is plugged into, whatever the store says."""
        used = {bridge_net_id(name) for name, state in self._network.states().items() if state.ports}
        return frozenset(net_id for net_id in used if net_id is not None)

    def connect(self, instance: Instance, network: TenantNetwork) -> None:
        """The instance's TAP is up. Its rules are there before, and no other pool's way out is left at its address."""
        with self.locked():
            guest = self._guest(instance, network)
            own = guest_elements(self.plan, guest)
            others = [p for p in self._store.pools(instance.ref.tenant) if p.ref != instance.ref.pool_ref]
            ways = {
                element
                for pool in others
                for element in guest_elements(self.plan, replace(guest, pool=pool.ref.pool, egress=pool.egress))
            }
            self._change(Change(own, tuple(sorted(ways.difference(own)))))
        self._network.ensure_tap(network, instance.offset)
        if self._goes_out(guest.egress):
            with self.locked():
                self._forward()

    def disconnect(self, instance: Instance, network: TenantNetwork) -> None:
        """No TAP and no rules of the instance are left."""
        self._network.remove_taps(frozenset({network.tap(instance.offset)}))
        with self.locked():
            self._change(Change(removed=guest_elements(self.plan, self._guest(instance, network))))

    def _guest(self, instance: Instance, network: TenantNetwork) -> GuestPort:
        pool = self._store.pool(instance.ref.pool_ref)
        return GuestPort(network, instance.offset, pool.ref.pool, pool.egress)

    # --- pools
    def check(self, egress: EgressPolicy) -> None:
        """Raises `NotAllowed` (``pool.no_uplink``) for a policy that needs an interface that this node has not."""
        if egress.kind is not Egress.NONE and not self.plan.uplink:
            raise NotAllowed(
                "pool.no_uplink", f"--egress {egress.kind} needs an uplink, and this node has none",
                hint="set MVM_UPLINK to an interface of the stack's network namespace, and start the stack again",
                field="egress",
            )  # fmt: skip

    def redirect(self, before: WorkerPool | None, after: WorkerPool | None) -> None:
        """A pool's policy was changed in the store; so are the rules of its guests.

        Of two changes at once the later one may come here first: the rules follow the store, not the caller.
        """
        pool = after or before
        assert pool is not None, "one of them"
        network = self._store.tenant(pool.ref.tenant).network
        old = before.egress if before else EgressPolicy()
        new = after.egress if after else EgressPolicy()
        if old == new:
            return  # what a crash left half done is put right by `repair`
        with self.locked():
            new = self._stored(pool) if after else new
            others = [(p.ref.pool, p.egress) for p in self._store.pools(pool.ref.tenant) if p.ref != pool.ref]
            offsets = [i.offset for i in self._store.instances(pool=pool.ref) if i.may_have_vmm]
            former, later = (
                self._part(network, [*others, (pool.ref.pool, egress)], offsets, pool.ref.pool, egress)
                for egress in (old, new)
            )
            # All that is to be there, since the other change may have taken away what this one had before.
            self._change(replace(former.until(later), elements=tuple(sorted(later.elements))))
            self._forward()

    def _stored(self, pool: WorkerPool) -> EgressPolicy:
        try:
            return self._store.pool(pool.ref).egress
        except NotFound:  # destroyed meanwhile
            return NO_EGRESS

    def _part(
        self, network: TenantNetwork, pools: Sequence[tuple[PoolId, EgressPolicy]], offsets: Sequence[int],
        pool: PoolId, egress: EgressPolicy,
    ) -> Ruleset:  # fmt: skip
        """A tenant's ways out, with the members of one of its pools."""
        guests = [GuestPort(network, offset, pool, egress) for offset in offsets]
        members = tuple(element for guest in guests for element in guest_elements(self.plan, guest))
        return ways_out(self.plan, network, pools).changed_by(Change(members))

    # --- all of it
    def expected(self) -> Ruleset:
        """The rules that the store's tenants, pools and instances ask for: those up, and those in flight."""
        networks = {t.id: t.network for t in self._store.tenants()}
        pools = {p.ref: p for p in self._store.pools() if p.ref.tenant in networks}
        guests = [
            GuestPort(networks[i.ref.tenant], i.offset, i.ref.pool, pools[i.ref.pool_ref].egress)
            for i in self._store.instances()
            if i.ref.pool_ref in pools and i.may_have_vmm
        ]
        return ruleset(
            self.plan,
            networks.values(),
            [(networks[p.ref.tenant], p.ref.pool, p.egress) for p in pools.values()],
            guests,
        )

    def differences(self) -> Sequence[str]:
        """In which lines the rules that are there differ; what jobs are about to change is left out."""
        rules = self.expected()
        found = self._packets.differences(rules)
        if not found:
            return found
        networks = {t.id: t.network for t in self._store.tenants()}
        busy = [(networks[i.ref.tenant], i.offset) for i in self._store.instances() if i.in_flight]
        passing = {f'"{n.tap(o)}" ' for n, o in busy} | {f": {n.ip(o)} " for n, o in busy}
        return [line for line in found if not any(word in f"{line} " for word in passing)]

    @contextmanager
    def probing(self, guests: Sequence[GuestPort]) -> Iterator[None]:
        """Rules for probes in the places of `guests`; nothing is repaired meanwhile, it would shut them out."""
        elements = tuple(element for guest in guests for element in guest_elements(self.plan, guest))
        with self.locked():
            self._change(Change(elements))
        try:
            yield
        finally:
            with self.locked():
                self._change(Change(removed=elements))

    def proving(self) -> AbstractContextManager[None]:
        """Nobody else probes, and nothing is repaired. Raises `TimedOut` (``lock.busy``)."""
        return self._locks.hold(lock_names.NET_PROBES, deadline_s=0)

    def repair(self) -> Sequence[str]:
        """The rules are as they should be; what was not. While somebody proves them, nothing is done."""
        with ExitStack() as held:
            try:
                held.enter_context(self.proving())
            except TimedOut:
                return []
            held.enter_context(self.locked())
            found = self.differences()
            if found:
                self._packets.apply(self.expected())
            self._forward()
        return found

    def locked(self) -> AbstractContextManager[None]:
        """Nobody else changes rules; the store is read within, or a job that begins meanwhile would be forgotten."""
        return self._locks.hold(lock_names.FIREWALL, deadline_s=_LOCK_S)

    def _change(self, change: Change) -> None:
        """What is there was changed; when that is not what the change builds on, everything is applied anew."""
        try:
            self._packets.change(change)
        except Failed as error:
            if error.code != "firewall.refused":
                raise
            self._packets.apply(self.expected().changed_by(change))

    def _goes_out(self, egress: EgressPolicy) -> bool:
        return bool(self.plan.uplink) and egress.kind is not Egress.NONE

    def forwarded(self) -> frozenset[str]:
        """The interfaces at which the kernel has to forward: bridges whose tenants go out, and then the uplink."""
        networks = {t.id: t.network for t in self._store.tenants()}
        bridges = {
            networks[p.ref.tenant].bridge
            for p in self._store.pools()
            if p.ref.tenant in networks and self._goes_out(p.egress)
        }
        return frozenset(bridges | {self.plan.uplink} if bridges else ())

    def _forward(self) -> None:
        wanted = self.forwarded()
        self._packets.forward(wanted - {self.plan.uplink}, self.plan.uplink if wanted else "")
