"""The fake host as the simulation has it: time, locks, and what happens between two of its calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvm.domain.firewall import Ruleset
from mvm.domain.ids import InstanceRef, PoolRef, Revision
from mvm.domain.instance import ProcessIdentity
from mvm.domain.job import JobVerb
from mvm.domain.layout import StateLayout
from mvm.drivers.fake import FakeHost
from mvm.drivers.fake.machines import FakeVmm
from mvm.drivers.fake.resources import FakePackets
from mvm.drivers.fake.state import Machine
from mvm.errors import Failed, TimedOut
from mvm.ports.host import MemoryLeft
from mvm.ports.vmm import BootSpec

if TYPE_CHECKING:
    from tests.simulation.world import World

START = datetime(2026, 1, 1, tzinfo=UTC)
WRITES = frozenset({
    "storage.prepare", "storage.fresh_overlay", "vmm.save", "vmm.save_template", "images.build", "audit.append",
    "secrets.save", "store.insert_instance", "store.save_instance", "store.put_job", "store.put_tenant",
    "store.put_pool", "store.put_note", "store.put_audit", "store.put_desired",
})  # fmt: skip
CLEANING = frozenset({
    "vmm.kill", "vmm.discard", "vmm.processes", "network.remove_taps", "storage.clean_runtime", "storage.remove",
    "packets.change", "packets.apply", "cgroups.remove", "store.save_instance", "store.put_note", "store.put_job",
    "store.put_audit", "vmm.resume", "vmm.pause", "store.delete_instance",
})  # fmt: skip
"""Where a fault may rightly leave something behind for a sweep: the undo itself failed."""
ACTS = frozenset({
    "vmm.boot", "vmm.clone", "vmm.restore", "vmm.save", "vmm.pause", "vmm.resume", "vmm.kill", "storage.prepare",
    "storage.fresh_overlay", "storage.remove", "storage.clean_runtime", "network.ensure_tap", "network.remove_taps",
})  # fmt: skip
"""What changes an instance on the host."""


ROOM, LOW, NONE_LEFT = 1 << 39, 2 << 30, 512 << 20
"""Bytes that are free on the disk: enough; so few that a sweep cleans up; too few to build or to sleep."""
PLENTY = MemoryLeft(total_mib=16384, available_mib=8192)
SHORT_MIB = 512


class SimClock:
    """ports/clock.py: the node's clocks. The wall clock may be set, the steady one begins anew with the host."""

    def __init__(self) -> None:
        self.elapsed = 0.0
        self.set_by = 0.0
        self.booted_at = 0.0
        self._draws = 0

    def now(self) -> datetime:
        """See ports/clock.py."""
        return START + timedelta(seconds=self.elapsed + self.set_by)

    def monotonic(self) -> float:
        """See ports/clock.py."""
        return self.elapsed - self.booted_at

    def random(self, count: int) -> bytes:
        """See ports/clock.py."""
        self._draws += 1
        block = sha256(str(self._draws).encode()).digest()
        return (block * (count // 32 + 1))[:count]


class TrueTime:
    """ports/clock.py for what does not end with the node: Redis, and the guests' own clocks."""

    def __init__(self, clock: SimClock) -> None:
        self._clock = clock
        self.now, self.random = clock.now, clock.random

    def monotonic(self) -> float:
        """Seconds that have really passed."""
        return self._clock.elapsed


class SimLocks:
    """ports/locks.py between actors. Whoever waits stands still until the scheduler finds that it need not."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.held: dict[str, Any] = {}

    @contextmanager
    def hold(self, name: str, *, deadline_s: float) -> Iterator[None]:
        """See ports/locks.py."""
        actor = self._world.current
        if name in self.held and not self._wait(name, deadline_s):
            raise TimedOut("lock.busy", f"{name} is busy", hint="another operation holds it; try again", lock=name)
        mark = object()
        self.held[name] = (mark, actor)
        try:
            yield
        finally:
            if self.held.get(name, (None,))[0] is mark:
                del self.held[name]

    def wait_free(self, name: str, *, deadline_s: float) -> bool:
        """See ports/locks.py."""
        return name not in self.held or self._wait(name, deadline_s)

    def _wait(self, name: str, deadline_s: float) -> bool:
        actor, clock = self._world.current, self._world.clock
        if actor is None or deadline_s <= 0:
            return False
        end = clock.elapsed + deadline_s
        if actor.alone:  # it waits for itself
            clock.elapsed = end
            return False
        self._world.deadlines[actor] = end
        try:
            actor.wait(lambda: name not in self.held or clock.elapsed >= end, f"lock {name}")
        finally:
            del self._world.deadlines[actor]
        return name not in self.held


class _Trails(dict[Any, Any]):
    """The audit trails' locks, by tenant."""

    def __init__(self, locks: SimLocks) -> None:
        self._locks = locks

    def __missing__(self, tenant: str) -> AbstractContextManager[None]:
        return self._locks.hold(f"trail {tenant}", deadline_s=10.0)


class SimVmm(FakeVmm):
    """A VMM driver that knows who started what, and complains when two did."""

    _host: SimHost

    def boot(self, spec: BootSpec) -> ProcessIdentity:
        """See ports/vmm.py."""
        self._host.launching(spec.ref)
        return super().boot(spec)

    def kill(self, ref: InstanceRef, process: ProcessIdentity | None) -> None:
        """See ports/vmm.py."""
        self._host.ending(ref)
        super().kill(ref, process)

    def _restored(self, snapshot: Path, template: Path | None, spec: BootSpec, revision: Revision) -> ProcessIdentity:
        self._host.launching(spec.ref)
        return super()._restored(snapshot, template, spec, revision)

    def _start(self, spec: BootSpec, *, paused: bool = False) -> Machine:
        machine = super()._start(spec, paused=paused)
        self._host.makers[spec.ref] = self._host.world.current
        self._host.world.launched(spec.ref)
        return machine


class SimPackets(FakePackets):
    """A packet filter that is quick when nothing differs."""

    def differences(self, rules: Ruleset) -> Any:
        """See ports/firewall.py."""
        self._host.meet("packets.differences")
        return [] if self._host.rules == rules and not self._host.tampered else super().differences(rules)


class SimLayout(StateLayout):
    """Paths are made once: making them is a good part of what a fake host does."""

    @lru_cache(maxsize=4096)  # noqa: B019 - there is one
    def instance(self, ref: InstanceRef) -> Path:
        """The directory of one instance."""
        return super().instance(ref)

    @lru_cache(maxsize=4096)  # noqa: B019
    def snapshot(self, ref: InstanceRef) -> Path:
        """What a sleeping instance wakes from."""
        return super().snapshot(ref)

    @lru_cache(maxsize=256)  # noqa: B019
    def template(self, pool: PoolRef, revision: Revision) -> Path:
        """What instances of `pool` at `revision` are cloned from."""
        return super().template(pool, revision)

    @lru_cache(maxsize=256)  # noqa: B019
    def revision(self, revision: Revision) -> Path:
        """The directory of one revision."""
        return super().revision(revision)


LAYOUT = SimLayout(Path("/fake"))


class SimHost(FakeHost):
    """The host of a world. Pids are few and come again; a process is told from another by when it began."""

    def __init__(self, world: World) -> None:
        super().__init__(TrueTime(world.clock))
        self.world = world
        self.layout = LAYOUT
        self.disk_full = False
        self.makers: dict[InstanceRef, Any] = {}
        self.slow = 0
        self._serial = 0
        self.vmm = SimVmm(self)
        self.packets = SimPackets(self)
        self.trail_locks = _Trails(world.locks)  # type: ignore[assignment]

    def turn(self, *, looks: bool = False) -> AbstractContextManager[object]:
        """One actor runs at a time anyway."""
        return nullcontext()

    def meet(self, point: str) -> None:
        """Something is about to be done to the host: the scheduler may have other plans."""
        self.world.call(point)
        if point == "vmm.resume" and self.world.current is not None:
            self.world.current.has_resumed = True
        if self.disk_full and point in WRITES:
            self.world.hurt(point)
            raise Failed("disk.full", "no space left on device", hint="free some space")
        faults = self._faults.get(point)
        if faults:
            self.world.hurt(point)
            raise faults.popleft()

    def has_room(self) -> bool:
        """Whether guests find room on the host's disk."""
        return not self.disk_full

    def launching(self, ref: InstanceRef) -> None:
        """Somebody is about to start a VMM for `ref`, or to take over one that failed work has left."""
        maker, current = self.makers.get(ref), self.world.current
        if ref not in self.machines or maker is None or maker is current or maker.doomed:
            return
        row = self.world.rows().get(ref)
        if not maker.done or (row is not None and row.has_vmm):
            self.world.breach(f"double start: {ref} is started by {current and current.name}, and was by {maker.name}")

    def ending(self, ref: InstanceRef) -> None:
        """A VMM is about to be ended: by a stop only once its guest could have written down what it has."""
        machine, actor = self.machines.get(ref), self.world.current
        if machine is None or actor is None or actor.doomed or actor.verb != JobVerb.INSTANCE_STOP or actor.forced:
            return
        if machine.paused and not actor.has_resumed:
            self.world.breach(f"lost: {actor.name} ends {ref}, which stands still, without having let it run")

    def down(self) -> str:
        """The stack has gone down: what a network namespace holds goes with it, unless some VMM runs on."""
        if self.machines:
            return f"{len(self.machines)} VMMs run on"
        self.taps.clear()
        self.bridges.clear()
        self.rules, self.forwards = None, frozenset()
        self.tampered.clear()
        return "its network is gone"

    def pass_time(self, seconds: float) -> None:
        """Somebody waited in vain."""
        self.world.clock.elapsed += seconds

    def next_process(self) -> ProcessIdentity:
        """One of few pids, and a start time of its own."""
        used = {machine.process.pid for machine in self.machines.values()}
        pid = next(pid for pid in range(100, 200) if pid not in used)
        self._serial += 1
        return ProcessIdentity(pid, self._serial)

    def reboot(self) -> None:
        """What does not outlive the kernel is gone."""
        for ref in list(self.machines):
            self.kill_process(ref)
        self.taps.clear()
        self.bridges.clear()
        self.rules, self.forwards = None, frozenset()
        self.tampered.clear()
        self.groups.clear()
        self.out_of_memory.clear()
        self.makers.clear()
        self.world.clock.booted_at = self.world.clock.elapsed

    def clear_faults(self) -> None:
        """Nothing fails any more; guests that are silent stay so."""
        self._faults.clear()
        self.disk_full = False
        self.disk_free = LOW if self.world.was_low else ROOM
        self.memory_left = PLENTY
        self.hangs.clear()
        self.panics.clear()


def patched_future(world: Callable[[], World]) -> type:
    """A `Future` whose result is waited for by standing still."""

    class SimFuture:
        def __init__(self) -> None:
            self._done, self._result, self._error = False, None, None

        def set_result(self, result: Any) -> None:
            self._done, self._result = True, result

        def set_exception(self, error: Any) -> None:
            self._done, self._error = True, error

        def result(self) -> Any:
            actor = world().current
            if actor is not None and not self._done:
                actor.wait(lambda: self._done, "another's wake")
            if self._error is not None:
                raise self._error
            return self._result

    return SimFuture
