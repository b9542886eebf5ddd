"""What the fake host has, and how its parts reach it and fail."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import wraps
from hashlib import sha256
from itertools import count
from pathlib import Path
from threading import Condition, Lock, RLock
from typing import Concatenate, ParamSpec, TypeVar

from mvm.domain.firewall import Ruleset
from mvm.domain.ids import InstanceRef, Revision, TenantId
from mvm.domain.instance import ProcessIdentity
from mvm.domain.layout import StateLayout
from mvm.domain.secrets import Secrets
from mvm.domain.snapshot import SnapshotId, SnapshotManifest
from mvm.domain.vmm import Ending, VmmState, has_room
from mvm.errors import MvmError
from mvm.ports.clock import Clock
from mvm.ports.guest import GuestIdentity, Worker
from mvm.ports.host import MemoryLeft
from mvm.ports.storage import InstanceKeys
from mvm.ports.vmm import BootSpec

P = ParamSpec("P")
R = TypeVar("R")

POINTS: set[str] = set()
"""Where a fake host can be made to fail: ``<part>.<method>``."""


class ManualClock:
    """ports/clock.py for tests: time passes by `advance` alone; random bytes are the same in every run."""

    def __init__(self, start: datetime = datetime(2026, 1, 1, tzinfo=UTC)) -> None:
        self._start, self._elapsed = start, 0.0
        self._draws = count()

    def now(self) -> datetime:
        """The wall time, in UTC."""
        return self._start + timedelta(seconds=self._elapsed)

    def monotonic(self) -> float:
        """Seconds since it was made."""
        return self._elapsed

    def random(self, count: int) -> bytes:
        """`count` bytes, others with every call."""
        blocks = (sha256(f"{next(self._draws)}".encode()).digest() for _ in range(count // 32 + 1))
        return b"".join(blocks)[:count]

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass."""
        self._elapsed += seconds


@dataclass
class Machine:
    """A VMM process and its guest; of secrets it knows the names and what `digests` tells of their values.

    `base` is the template whose memory it shares. `state` is what its VMM says when it is not `paused`; `lies` says how
    its agent answers when that is not the truth.
    """

    spec: BootSpec
    process: ProcessIdentity
    booted_at: float
    hung: bool
    identity: GuestIdentity | None = None
    paused: bool = False
    worker: Worker = Worker.UNKNOWN
    cpu_s: float = 0.0
    disk: Mapping[str, str] = field(default_factory=dict)
    mounted: Mapping[str, str] = field(default_factory=dict)
    base: SnapshotId | None = None
    state: VmmState = VmmState.RUNNING
    lies: Lie | None = None

    @property
    def still(self) -> bool:
        """Whether no vCPU runs."""
        return self.paused or self.state is not VmmState.RUNNING


class Lie(StrEnum):
    """How a fake guest's agent may answer."""

    REFUSES = "refuses"
    """To everything, or says what is no answer."""
    PRETENDS = "pretends"
    """Says yes and does nothing."""


def digests(secrets: Secrets | None) -> dict[str, str]:
    """The sha256 of each secret: a host that is kept in a file keeps no more of them."""
    return {name: sha256(value.encode()).hexdigest() for name, value in secrets.values.items()} if secrets else {}


@dataclass
class Saved:
    """A template or a snapshot."""

    manifest: SnapshotManifest
    machine: Machine


@dataclass
class Files:
    """One instance's directory."""

    keys: InstanceKeys
    data_disk: bool
    runtime: set[str] = field(default_factory=set)
    writes: int = 0


class HostState:
    """Everything the parts share. Whoever reads or writes it holds `lock`."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock: Clock = clock or ManualClock()
        self.layout = StateLayout(Path("/fake"))
        self.lock = Condition(RLock())
        self.machines: dict[InstanceRef, Machine] = {}
        self.consoles: dict[Path, deque[str]] = {}
        self.taps: dict[str, str | None] = {}
        self.bridges: dict[str, tuple[str, ...]] = {}
        self.foreign: set[str] = set()
        self.mounts: dict[InstanceRef, str] = {}
        self.impostors: dict[str, str] = {}
        self.rules: Ruleset | None = None
        self.tampered: list[str] = []
        self.forwards: frozenset[str] = frozenset()
        self.files: dict[InstanceRef, Files] = {}
        self.saved: dict[Path, Saved] = {}
        self.spoilt: set[Path] = set()
        self.version = "1.0"
        self.revisions: set[Revision] = set()
        self.damaged: set[Revision] = set()
        self.unseen: set[InstanceRef] = set()
        self.held: set[str] = set()
        self.trail_locks: defaultdict[TenantId, Lock] = defaultdict(Lock)
        self.trails: dict[TenantId, bytearray] = {}
        self.hangs: Counter[InstanceRef] = Counter()
        self.panics: Counter[InstanceRef] = Counter()
        self._faults: dict[str, deque[MvmError]] = {}
        self.kept_secrets: dict[TenantId, Secrets] = {}
        self.memory_left = MemoryLeft(total_mib=16384, available_mib=8192)
        self.disk_free = 1 << 39
        self.archive = ""
        self.groups: set[InstanceRef] = set()
        self.out_of_memory: Counter[InstanceRef] = Counter()
        self.endings: dict[Path, Ending] = {}
        self.last_pid = 999

    def turn(self, *, looks: bool = False) -> AbstractContextManager[object]:
        """Within it a part has the host to itself; one that only `looks` changes nothing."""
        return self.lock

    def meet(self, point: str) -> None:
        """Raise what `fail` prepared for `point`, if anything."""
        faults = self._faults.get(point)
        if faults:
            raise faults.popleft()

    def pass_time(self, seconds: float) -> None:
        """Somebody waited in vain; a manual clock moves."""
        if isinstance(self.clock, ManualClock):
            self.clock.advance(seconds)

    def next_process(self) -> ProcessIdentity:
        """A pid never used before."""
        self.last_pid += 1
        return ProcessIdentity(self.last_pid, self.last_pid * 100)

    def kill_process(self, ref: InstanceRef) -> None:
        """The VMM process ends at once and leaves everything else as it was."""
        self.end_process(ref, Ending.CRASHED)

    def end_process(self, ref: InstanceRef, how: Ending) -> None:
        """As `kill_process`; the VMM says how its run ended."""
        with self.lock:
            machine = self.machines.pop(ref, None)
            if machine is not None:
                self.endings[machine.spec.directory] = how

    def drop_group(self, ref: InstanceRef) -> None:
        """Its processes have ended and nothing is remembered of them."""
        with self.lock:
            self.kill_process(ref)
            self.groups.discard(ref)
            self.out_of_memory.pop(ref, None)

    def has_room(self) -> bool:
        """Whether guests find room on the host's disk."""
        return has_room(self.disk_free)

    def stall_guest(self, ref: InstanceRef, state: VmmState = VmmState.IO_ERROR) -> None:
        """Its VMM is there, and says that its guest does not run."""
        with self.lock:
            self.machines[ref].state = state

    def halt_guest(self, ref: InstanceRef, how: Ending = Ending.HALTED) -> None:
        """The guest ends by itself, and its VMM with it."""
        with self.lock:
            words = "Restarting system" if how is Ending.REBOOTED else "Power down"
            self.consoles[self.machines[ref].spec.directory].append(f"reboot: {words}")
            self.end_process(ref, how)

    def lie(self, ref: InstanceRef, how: Lie | None) -> None:
        """The guest's agent lies from now on, or no more."""
        with self.lock:
            self.machines[ref].lies = how

    def exhaust(self, ref: InstanceRef) -> None:
        """The VMM reaches its memory limit, and the kernel ends it."""
        with self.lock:
            self.out_of_memory[ref] += 1
            self.kill_process(ref)

    def panic_guest(self, ref: InstanceRef, times: int = 1) -> None:
        """The guest's kernel panics, which ends its VMM; if it does not run, in its next `times` boots."""
        with self.lock:
            machine = self.machines.get(ref)
            if machine is None:
                self.panics[ref] += times
                return
            self.panics[ref] -= self.panics[ref] > 0
            self.consoles[machine.spec.directory].append("Kernel panic - not syncing: Attempted to kill init!")
            self.end_process(ref, Ending.PANICKED)


class Part:
    """One port's side of the host."""

    def __init__(self, host: HostState) -> None:
        self._host = host


S = TypeVar("S", bound=Part)


def point(
    name: str, *, looks: bool = False
) -> Callable[[Callable[Concatenate[S, P], R]], Callable[Concatenate[S, P], R]]:
    """The method fails here when told to (see `FakeHost.fail`), and has the host to itself while it runs.

    One that only `looks` changes nothing.
    """
    POINTS.add(name)

    def decorate(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
        @wraps(method)
        def run(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
            with self._host.turn(looks=looks):
                self._host.meet(name)
                return method(self, *args, **kwargs)

        return run

    return decorate
