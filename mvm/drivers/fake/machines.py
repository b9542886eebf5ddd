"""The fake host's VMMs and the guests in them."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Mapping
from datetime import datetime
from pathlib import Path

from mvm.domain.commands import ExecEnd, ExecOutput, ExecPart, ExecResult
from mvm.domain.ids import InstanceRef
from mvm.domain.instance import ProcessIdentity
from mvm.domain.secrets import Secrets
from mvm.domain.vmm import Ending, VmmState
from mvm.drivers.fake.sh import run_command
from mvm.drivers.fake.snapshots import FakeSnapshots
from mvm.drivers.fake.state import Lie, Machine, Part, digests, point
from mvm.errors import GuestGone, GuestRefused, GuestSilent
from mvm.guest import PROTOCOL_VERSION
from mvm.ports.guest import GuestHello, GuestIdentity, GuestStatus
from mvm.ports.vmm import BootSpec, Presence


class FakeVmm(FakeSnapshots):
    """ports/vmm.py."""

    @point("vmm.observe", looks=True)
    def observe(self, ref: InstanceRef, process: ProcessIdentity | None) -> Presence:
        """See ports/vmm.py."""
        if ref in self._host.unseen:
            return Presence.UNKNOWN
        machine = self._host.machines.get(ref)
        runs = machine is not None and process in (None, machine.process)
        return Presence.PRESENT if runs else Presence.ABSENT

    @point("vmm.state", looks=True)
    def state(self, ref: InstanceRef, process: ProcessIdentity) -> VmmState:
        """See ports/vmm.py."""
        machine = self._running(ref, process)
        return VmmState.PAUSED if machine.paused and machine.state is VmmState.RUNNING else machine.state

    @point("vmm.ending", looks=True)
    def ending(self, directory: Path) -> Ending:
        """See ports/vmm.py."""
        return self._host.endings.get(directory, Ending.CRASHED)

    @point("vmm.boot")
    def boot(self, spec: BootSpec) -> ProcessIdentity:
        """See ports/vmm.py."""
        host, ref = self._host, spec.ref
        if ref in host.machines:
            return host.machines[ref].process
        machine = self._start(spec)
        host.consoles[spec.directory] = deque(["Linux version 6.1.0-fake", "mvm: guest agent ready"], maxlen=1000)
        if host.panics[ref] > 0:
            host.panic_guest(ref, times=0)
        return machine.process

    @point("vmm.wait_gone")
    def wait_gone(self, process: ProcessIdentity, *, deadline_s: float) -> bool:
        """See ports/vmm.py. Only somebody else's act ends a process here, so it is not waited for."""
        gone = all(machine.process != process for machine in self._host.machines.values())
        if not gone:
            self._host.pass_time(deadline_s)
        return gone

    @point("vmm.kill")
    def kill(self, ref: InstanceRef, process: ProcessIdentity | None) -> None:
        """See ports/vmm.py."""
        self._host.drop_group(ref)

    @point("vmm.processes", looks=True)
    def processes(self) -> Mapping[InstanceRef, tuple[ProcessIdentity, ...]]:
        """See ports/vmm.py."""
        return {ref: (machine.process,) for ref, machine in self._host.machines.items()}

    @point("vmm.strangers", looks=True)
    def strangers(self) -> Mapping[str, str]:
        """See ports/vmm.py."""
        return dict(self._host.impostors)

    @point("vmm.put_secrets")
    def put_secrets(self, ref: InstanceRef, process: ProcessIdentity, secrets: Secrets | None) -> None:
        """See ports/vmm.py."""
        self._running(ref, process).disk = digests(secrets)

    @point("vmm.console_tail", looks=True)
    def console_tail(self, directory: Path, *, lines: int) -> str:
        """See ports/vmm.py."""
        kept = list(self._host.consoles.get(directory, ()))
        return "\n".join(kept[max(0, len(kept) - lines) :])

    @point("vmm.trim_console", looks=True)
    def trim_console(self, directory: Path, *, keep: int) -> None:
        """See the port; it keeps a number of lines anyway."""

    @point("vmm.console", looks=True)
    def console(self, directory: Path, *, offset: int) -> tuple[str, int]:
        """See ports/vmm.py."""
        text = "".join(line + "\n" for line in self._host.consoles.get(directory, ()))[offset:]
        return text, offset + len(text)


class FakeGuest(Part):
    """ports/guest.py. A guest that hangs is silent at once; a manual clock moves by the caller's deadline."""

    def _machine(self, ref: InstanceRef, deadline_s: float) -> Machine:
        machine = self._host.machines.get(ref)
        if machine is None:
            raise GuestGone("guest.gone", f"{ref} has no VMM that runs", hint=f"see: mvm instance logs {ref}")
        if machine.lies is Lie.REFUSES:
            raise GuestRefused("guest.refused", f"the guest of {ref} refused: no", hint=f"see: mvm instance logs {ref}")
        if machine.hung or machine.still:
            self._host.pass_time(deadline_s)
            raise GuestSilent(
                "guest.silent", f"the guest of {ref} did not answer within {deadline_s:g} s",
                hint=f"see: mvm instance logs {ref}",
            )  # fmt: skip
        return machine

    def _uptime(self, machine: Machine) -> float:
        return self._host.clock.monotonic() - machine.booted_at

    @point("guest.hello")
    def hello(self, ref: InstanceRef, directory: Path, *, deadline_s: float) -> GuestHello:
        """See ports/guest.py."""
        return GuestHello(PROTOCOL_VERSION, self._uptime(self._machine(ref, deadline_s)), "6.1.0-fake")

    @point("guest.configure")
    def configure(self, ref: InstanceRef, directory: Path, identity: GuestIdentity, *, deadline_s: float) -> None:
        """See ports/guest.py."""
        machine = self._machine(ref, deadline_s)
        machine.identity = identity
        if identity.secrets:
            machine.mounted = machine.disk

    @point("guest.ping", looks=True)
    def ping(self, ref: InstanceRef, directory: Path, *, deadline_s: float) -> float:
        """See ports/guest.py."""
        return self._uptime(self._machine(ref, deadline_s))

    @point("guest.status")
    def status(self, ref: InstanceRef, directory: Path, *, deadline_s: float) -> GuestStatus:
        """See ports/guest.py. A fake guest never does anything but what `FakeHost.work` says."""
        machine = self._machine(ref, deadline_s)
        return GuestStatus(self._uptime(machine), machine.worker, machine.cpu_s, 0.0, 0, 0)

    @point("guest.settle")
    def settle(self, ref: InstanceRef, directory: Path, *, deadline_s: float) -> None:
        """See ports/guest.py."""
        self._machine(ref, deadline_s)

    @point("guest.prepare_sleep")
    def prepare_sleep(self, ref: InstanceRef, directory: Path, *, deadline_s: float) -> None:
        """See ports/guest.py."""
        machine = self._machine(ref, deadline_s)
        if machine.lies is not Lie.PRETENDS:
            machine.mounted = {}

    @point("guest.wake")
    def wake(
        self, ref: InstanceRef, directory: Path, *, now: datetime, entropy: bytes, secrets: bool, deadline_s: float
    ) -> None:
        """See ports/guest.py."""
        machine = self._machine(ref, deadline_s)
        if secrets and not machine.mounted:  # else it goes on with what it has
            machine.mounted = machine.disk

    @point("guest.drop_secrets")
    def drop_secrets(self, ref: InstanceRef, directory: Path, *, deadline_s: float) -> None:
        """See ports/guest.py."""
        self._machine(ref, deadline_s).mounted = {}

    @point("guest.mount_secrets")
    def mount_secrets(self, ref: InstanceRef, directory: Path, *, deadline_s: float) -> None:
        """See ports/guest.py."""
        machine = self._machine(ref, deadline_s)
        machine.mounted = machine.disk

    @point("guest.execute")
    def execute(self, ref: InstanceRef, directory: Path, command: str, *, deadline_s: float) -> ExecResult:
        """See ports/guest.py; `run_command` says what the guest knows."""
        machine = self._machine(ref, deadline_s)
        hostname = machine.identity.hostname if machine.identity else "localhost"
        return run_command(command, hostname, machine.mounted)

    def run(
        self, ref: InstanceRef, directory: Path, command: bytes, *, deadline_s: float
    ) -> Generator[ExecPart, None, None]:
        """See ports/guest.py."""
        result = self.execute(ref, directory, command.decode("utf-8", "surrogateescape"), deadline_s=deadline_s)
        return (part for part in (ExecOutput(result.stdout, result.stderr), ExecEnd(result.exit_code)))

    @point("guest.shutdown")
    def shutdown(self, ref: InstanceRef, directory: Path, *, deadline_s: float) -> None:
        """See ports/guest.py."""
        machine = self._machine(ref, deadline_s)
        if machine.lies is not Lie.PRETENDS:
            self._host.halt_guest(ref)
