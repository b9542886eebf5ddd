"""One host in memory behind every port of a node: no root, no files, no processes; it fails when told to.

Only `mvm.wiring` (for ``driver=fake``) and tests know it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path

from mvm.domain.ids import InstanceRef
from mvm.drivers.fake.machines import FakeGuest, FakeVmm
from mvm.drivers.fake.resources import (
    FakeAudit,
    FakeCgroups,
    FakeImages,
    FakeLocks,
    FakeMemory,
    FakeNetwork,
    FakePackets,
    FakeSecrets,
)
from mvm.drivers.fake.state import POINTS, HostState, Lie, ManualClock
from mvm.drivers.fake.storage import FakeStorage
from mvm.errors import MvmError
from mvm.ports.clock import Clock
from mvm.ports.guest import Worker

__all__ = ["POINTS", "FakeHost", "Lie", "ManualClock"]


class FakeHost(HostState):
    """The host: its parts behind the ports, and what tests do to it. `clock` stands still unless one is given."""

    def __init__(self, clock: Clock | None = None) -> None:
        super().__init__(clock)
        self.vmm = FakeVmm(self)
        self.guest = FakeGuest(self)
        self.network = FakeNetwork(self)
        self.packets = FakePackets(self)
        self.storage = FakeStorage(self)
        self.images = FakeImages(self)
        self.memory = FakeMemory(self)
        self.cgroups = FakeCgroups(self)
        self.locks = FakeLocks(self)
        self.secrets = FakeSecrets(self)
        self.audit = FakeAudit(self)

    def fail(self, point: str, error: MvmError, times: int = 1) -> None:
        """The next `times` calls of `point`, one of `POINTS`, raise `error` and change nothing."""
        if point not in POINTS:
            raise ValueError(f"no point {point!r}; there are: {', '.join(sorted(POINTS))}")
        with self.lock:
            self._faults.setdefault(point, deque()).extend([error] * times)

    def hang_guest(self, ref: InstanceRef, times: int = 1) -> None:
        """The guest falls silent; if it does not run, it does so in its next `times` boots."""
        with self.lock:
            if ref in self.machines:
                self.machines[ref].hung = True
            else:
                self.hangs[ref] += times

    def damage(self, snapshot: Path) -> None:
        """One of the files of a template or snapshot is not what it was."""
        with self.lock:
            self.spoilt.add(snapshot)

    def work(self, ref: InstanceRef, worker: Worker, cpu_s: float = 0.0) -> None:
        """The workload in a guest says so, and has used so much CPU in all."""
        with self.lock:
            self.machines[ref].worker, self.machines[ref].cpu_s = worker, cpu_s

    def leaks(self) -> Sequence[str]:
        """What no process uses any more: TAPs, files of a run, held locks; and processes without a directory."""
        with self.lock:
            asleep = {saved.machine.spec.ref for saved in self.saved.values() if saved.manifest.disk}
            known = asleep | set(self.machines)
            used = {machine.spec.nic.tap for machine in self.machines.values()}
            return sorted(
                [f"tap {tap}" for tap in self.taps if tap not in used]
                + [f"file {r}/{n}" for r, f in self.files.items() if r not in known for n in f.runtime]
                + [f"process {ref}" for ref in self.machines if ref not in self.files]
                + [f"control group {ref}" for ref in self.groups - set(self.machines)]
                + [f"lock {name}" for name in self.held]
            )
