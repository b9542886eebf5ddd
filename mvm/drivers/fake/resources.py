"""The fake host's network, images, memory and locks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256

from mvm.domain.addressing import METADATA, TenantNetwork
from mvm.domain.firewall import Change, Ruleset
from mvm.domain.ids import InstanceRef, Revision, TenantId
from mvm.domain.pool import ImageSource
from mvm.domain.secrets import Secrets
from mvm.drivers.fake.state import POINTS, Part, point
from mvm.errors import Failed, NotAllowed, TimedOut
from mvm.ports.cgroup import GroupLimits
from mvm.ports.host import MemoryLeft
from mvm.ports.images import Admission, ProgressReport, admitted
from mvm.ports.network import BridgeState

BRIDGE_PORTS = 1023
POINTS.add("locks.hold")


class FakeSecrets(Part):
    """ports/secrets.py."""

    @point("secrets.load")
    def load(self, tenant: TenantId) -> Secrets | None:
        """See ports/secrets.py."""
        return self._host.kept_secrets.get(tenant)

    @point("secrets.save")
    def save(self, tenant: TenantId, secrets: Secrets) -> None:
        """See ports/secrets.py."""
        self._host.kept_secrets[tenant] = secrets

    @point("secrets.remove")
    def remove(self, tenant: TenantId) -> None:
        """See ports/secrets.py."""
        self._host.kept_secrets.pop(tenant, None)


def _addresses(network: TenantNetwork) -> tuple[str, str]:
    return f"{network.gateway}/{network.subnet.prefixlen}", f"{METADATA}/32"


class FakeNetwork(Part):
    """ports/network.py. Names in the host's `foreign` are interfaces somebody else made."""

    def _check(self, *names: str) -> None:
        for name in self._host.foreign.intersection(names):
            raise NotAllowed(
                "network.foreign", f"interface {name} was not made by mvm", hint=f"see: ip link show {name}",
                interface=name,
            )  # fmt: skip

    @point("network.ensure_bridge")
    def ensure_bridge(self, network: TenantNetwork) -> None:
        """See ports/network.py."""
        self._check(network.bridge)
        self._host.bridges[network.bridge] = _addresses(network)

    @point("network.remove_bridges")
    def remove_bridges(self, names: frozenset[str]) -> None:
        """See ports/network.py."""
        self._check(*names)
        for name in names:
            self._host.bridges.pop(name, None)
        for tap, bridge in self._host.taps.items():
            self._host.taps[tap] = None if bridge in names else bridge

    @point("network.ensure_tap")
    def ensure_tap(self, network: TenantNetwork, offset: int) -> None:
        """See ports/network.py."""
        taps, tap, bridge = self._host.taps, network.tap(offset), network.bridge
        self._check(bridge, tap)
        self._host.bridges[bridge] = _addresses(network)
        if taps.get(tap) != bridge and sum(master == bridge for master in taps.values()) >= BRIDGE_PORTS:
            raise Failed(
                "network.failed", f"bridge {bridge} is full: Exchange full",
                hint=f"a bridge has {BRIDGE_PORTS} ports, so a tenant has at most as many instances on a node",
            )  # fmt: skip
        taps[tap] = bridge

    @point("network.remove_taps")
    def remove_taps(self, names: frozenset[str]) -> None:
        """See ports/network.py."""
        self._check(*names)
        for name in names:
            self._host.taps.pop(name, None)

    @point("network.taps", looks=True)
    def taps(self) -> Mapping[str, str | None]:
        """See ports/network.py."""
        return dict(self._host.taps)

    @point("network.states", looks=True)
    def states(self) -> Mapping[str, BridgeState]:
        """See ports/network.py. Addresses are those that were given when it was made."""
        return {
            bridge: BridgeState(True, addresses, tuple(sorted(t for t, b in self._host.taps.items() if b == bridge)))
            for bridge, addresses in self._host.bridges.items()
        }

    def addresses(self) -> frozenset[str]:
        """See ports/network.py."""
        return frozenset(a.split("/")[0] for each in self._host.bridges.values() for a in each)

    def has(self, interface: str) -> bool:
        """See ports/network.py."""
        return interface in {*self._host.bridges, *self._host.taps, *self._host.foreign}

    @point("network.strangers")
    def strangers(self) -> Mapping[str, str]:
        """See ports/network.py."""
        return dict.fromkeys(sorted(self._host.foreign), "somebody else made it")

    @point("network.bridges")
    def bridges(self) -> frozenset[str]:
        """See ports/network.py."""
        return frozenset(self._host.bridges)


class FakePackets(Part):
    """ports/firewall.py. Lines in the host's `tampered` were put there by somebody else."""

    @point("packets.apply")
    def apply(self, rules: Ruleset) -> None:
        """See ports/firewall.py."""
        self._host.rules = rules
        self._host.tampered.clear()

    @point("packets.change")
    def change(self, change: Change) -> None:
        """See ports/firewall.py."""
        rules = self._host.rules
        if rules is None:
            raise Failed("firewall.refused", "nft refused the rules: No such file or directory", hint="apply all")
        self._host.rules = rules.changed_by(change)

    @point("packets.remove")
    def remove(self) -> None:
        """See ports/firewall.py."""
        self._host.rules = None
        self._host.tampered.clear()

    @point("packets.differences")
    def differences(self, rules: Ruleset) -> Sequence[str]:
        """See ports/firewall.py."""
        wanted, found = set(rules.commands()), set(self._host.rules.commands()) if self._host.rules else set()
        missing = [f"missing: {line}" for line in sorted(wanted - found)]
        return missing + [f"not ours: {line}" for line in [*sorted(found - wanted), *self._host.tampered]]

    @point("packets.forward")
    def forward(self, bridges: frozenset[str], uplink: str) -> None:
        """See ports/firewall.py."""
        self._host.forwards = bridges | ({uplink} if uplink else set())

    @point("packets.forwarding")
    def forwarding(self) -> frozenset[str]:
        """See ports/firewall.py."""
        return self._host.forwards


class FakeImages(Part):
    """ports/images.py: the revision is the hash of the source's name, and of what the host's `archive` has now."""

    @point("images.build")
    def build(self, source: ImageSource, report: ProgressReport, admit: Admission = admitted) -> Revision:
        """See ports/images.py."""
        report("find packages")
        revision = Revision(sha256(f"{source.flake_ref} {source.profile}{self._host.archive}".encode()).hexdigest())
        if revision in self._host.revisions:
            report("already built")
            return revision
        admit()
        for step in ("download packages", "build kernel", "build rootfs"):
            report(step)
        self._host.revisions.add(revision)
        return revision


class FakeMemory(Part):
    """ports/host.py: as the host's `memory_left` says."""

    @point("memory.left")
    def left(self) -> MemoryLeft:
        """See ports/host.py."""
        return self._host.memory_left


class FakeCgroups(Part):
    """ports/cgroup.py. There is nothing to join: machines are in the groups of their instances."""

    @point("cgroups.missing")
    def missing(self) -> Mapping[str, str]:
        """See ports/cgroup.py."""
        return {}

    @contextmanager
    def joining(self, ref: InstanceRef, limits: GroupLimits) -> Iterator[Sequence[int]]:
        """See ports/cgroup.py."""
        with self._host.lock:
            if ref in self._host.machines:
                raise Failed("cgroup.failed", f"the control group of {ref} still has processes")
            self._host.drop_group(ref)
            self._host.groups.add(ref)
        yield ()

    @point("cgroups.remove")
    def remove(self, ref: InstanceRef) -> None:
        """See ports/cgroup.py."""
        self._host.drop_group(ref)

    @point("cgroups.out_of_memory", looks=True)
    def out_of_memory(self, ref: InstanceRef) -> int:
        """See ports/cgroup.py."""
        return self._host.out_of_memory[ref]

    @point("cgroups.groups", looks=True)
    def groups(self) -> frozenset[InstanceRef]:
        """See ports/cgroup.py."""
        return frozenset(self._host.groups)


class FakeAudit(Part):
    """ports/audit.py in the host's `trails`, each one text."""

    @contextmanager
    def hold(self, tenant: TenantId) -> Iterator[FakeTrail]:
        """See ports/audit.py."""
        with self._host.trail_locks[tenant]:
            yield FakeTrail(self, tenant, self._host.trails.setdefault(tenant, bytearray()))

    @point("audit.append")
    def append(self, tenant: TenantId, data: bytes) -> None:
        """Add `data` behind the last whole line."""
        text = self._host.trails[tenant]
        text[text.rfind(b"\n") + 1 :] = data


class FakeTrail:
    """ports/audit.py: one tenant's trail."""

    def __init__(self, audit: FakeAudit, tenant: TenantId, text: bytearray) -> None:
        self._audit = audit
        self._tenant = tenant
        self._text = text

    def append(self, lines: Sequence[str]) -> None:
        """See ports/audit.py."""
        self._audit.append(self._tenant, "".join(f"{line}\n" for line in lines).encode("ascii"))

    def tail(self, count: int) -> Sequence[bytes]:
        """See ports/audit.py."""
        return bytes(self._text).split(b"\n")[:-1][-count:]

    def half(self) -> bytes:
        """See ports/audit.py."""
        return bytes(self._text).rpartition(b"\n")[2]

    def files(self) -> Iterator[tuple[str, bytes]]:
        """See ports/audit.py."""
        if self._text:
            yield "trail", bytes(self._text)


class FakeLocks(Part):
    """ports/locks.py between threads. The deadline is real time: it is other threads that are waited for."""

    @contextmanager
    def hold(self, name: str, *, deadline_s: float) -> Iterator[None]:
        """See ports/locks.py."""
        held, lock = self._host.held, self._host.lock
        with lock:
            self._host.meet("locks.hold")
            if not lock.wait_for(lambda: name not in held, deadline_s):
                raise TimedOut("lock.busy", f"{name} is busy", hint="another operation holds it; try again", lock=name)
            held.add(name)
        try:
            yield
        finally:
            with lock:
                held.discard(name)
                lock.notify_all()

    def wait_free(self, name: str, *, deadline_s: float) -> bool:
        """See ports/locks.py."""
        with self._host.lock:
            return bool(self._host.lock.wait_for(lambda: name not in self._host.held, deadline_s))
