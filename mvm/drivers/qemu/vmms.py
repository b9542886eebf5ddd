"""QEMU's processes: starting, finding and ending them, and their consoles."""

from __future__ import annotations

import codecs
import os
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import ClassVar

from mvm import guest
from mvm.domain.ids import InstanceRef
from mvm.domain.instance import ProcessIdentity
from mvm.domain.layout import StateLayout
from mvm.domain.secrets import Secrets
from mvm.drivers import files, processes, secrets_disk, tap
from mvm.drivers.instance_sockets import listen
from mvm.drivers.qemu import argv, pages
from mvm.drivers.qemu.accel import Accelerator, AcceleratorProbe
from mvm.drivers.qemu.qmp import MONITOR, CommandFailed, Qmp
from mvm.drivers.qemu.tsc import host_tsc_khz
from mvm.errors import Failed, TimedOut, Unreachable
from mvm.ports.shell import Shell
from mvm.ports.vmm import BootSpec, Presence

_VMM_LOG = "vmm.log"
_UP_DEADLINE_S = 15.0
_KILL_DEADLINE_S = 10.0
_TAIL_BYTES = 256 * 1024
_CONSOLE_BYTES = 64 * 1024
_PANIC = "Kernel panic - not syncing"
_PARTIAL = 4  # bytes of the longest character: fewer at the end are no half that is still being written
_NOT_TEXT = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[@-Z\\-_])|[^\t\n\x20-\x7e\xa0-\U0010ffff]")


class QemuVmms:
    """`VmmDriver` on QEMU. Its VMMs are found again by their command lines, which name state directory and instance."""

    name: ClassVar[str] = "qemu"

    def __init__(self, layout: StateLayout, shell: Shell) -> None:
        self._layout = layout
        self._shell = shell
        self._mark = argv.marker(layout.root)
        self._probe = AcceleratorProbe(shell, layout.run / "accelerator.json")
        self._lock = threading.Lock()
        self._children: set[ProcessIdentity] = set()

    def accelerator(self) -> Accelerator:
        """What guests run on and why. The first call may boot a guest of the newest image, to try KVM."""
        return self._probe.choose(self._newest_image)

    def observe(self, ref: InstanceRef, process: ProcessIdentity | None) -> Presence:
        """See the port. A process that is just ending, and so has lost its command line, is still there."""
        try:
            if process is None:
                return Presence.PRESENT if self._of(ref) else Presence.ABSENT
            words = processes.arguments(process.pid)
            present = processes.runs(process) and (not words or argv.started_for(words, self._mark) == ref)
        except PermissionError:
            return Presence.UNKNOWN
        return Presence.PRESENT if present else Presence.ABSENT

    def boot(self, spec: BootSpec) -> ProcessIdentity:
        """See the port. Returns once QEMU's main loop answers: all devices are there and the guest runs."""
        for process in self._of(spec.ref):
            return process
        accel = self._probe.choose(lambda: (spec.kernel, spec.initramfs)).name
        with closing_fd(tap.attach(spec.nic.tap)) as card:
            return self._launch(
                spec.ref, spec.directory, card,
                lambda fds: argv.command(spec, fds, accel, host_tsc_khz(), self._mark), secrets=spec.secrets,
            )  # fmt: skip

    def _launch(
        self, ref: InstanceRef, directory: Path, card: int, command: Callable[[argv.Descriptors], list[str]],
        *, secrets: Secrets | None = None, pass_fds: Sequence[int] = (), new_run: bool = True,
        small_pages: bool = False,
        then: Callable[[Qmp, ProcessIdentity], None] = lambda qmp, process: None,
    ) -> ProcessIdentity:  # fmt: skip
        """Start QEMU and let `then` speak to it; it returns, or QEMU is ended."""
        log = directory / _VMM_LOG
        for path in (log, directory / argv.CONSOLE_LOG) if new_run else (log,):
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600))
        with ExitStack() as stack:
            monitor = stack.enter_context(listen(directory, MONITOR)).fileno()
            ports = {name: stack.enter_context(listen(directory, name)).fileno() for name in guest.PORTS}
            disk = stack.enter_context(closing_fd(secrets_disk.create(secrets)))
            fds = argv.Descriptors(card, monitor, ports, disk)
            arguments, inherited = command(fds), (fds.tap, fds.monitor, *fds.ports.values(), fds.secrets, *pass_fds)
            with pages.small() if small_pages else nullcontext():
                process = self._shell.spawn(arguments, log=log, pass_fds=inherited)
        with self._lock:
            self._children.add(process)
        try:
            with Qmp(ref, directory, _UP_DEADLINE_S) as qmp:
                then(qmp, process)
        except (CommandFailed, Unreachable, TimedOut) as error:
            self._kill(process)
            words = log.read_text(errors="replace").replace(f"{argv.BINARY}: ", "").strip() or str(error)
            raise Failed(
                "vmm.start_failed", f"QEMU ended at once: {words[-1000:]}", hint=f"see {log}", subject=str(ref)
            ) from None
        except BaseException:
            self._kill(process)
            raise
        return process

    def wait_gone(self, process: ProcessIdentity, *, deadline_s: float) -> bool:
        """See the port."""
        return processes.wait_gone(process, deadline_s)

    def kill(self, ref: InstanceRef, process: ProcessIdentity | None) -> None:
        """See the port. Raises `TimedOut` (``vmm.unkillable``) when the kernel does not let one go."""
        found = set(self._of(ref))
        if process is not None and self.observe(ref, process) is Presence.PRESENT:
            found.add(process)
        for one in found:
            self._kill(one)

    def put_secrets(self, ref: InstanceRef, process: ProcessIdentity, secrets: Secrets | None) -> None:
        """See the port."""
        if self.observe(ref, process) is not Presence.ABSENT:
            with suppress(FileNotFoundError):
                secrets_disk.replace(process, secrets)
                return
        raise Unreachable("vmm.gone", f"the VMM of {ref} does not run", hint="mvm instance info tells its status")

    def processes(self) -> Mapping[InstanceRef, tuple[ProcessIdentity, ...]]:
        """See the port."""
        with self._lock:
            self._children = {child for child in self._children if processes.runs(child)}  # which reaps
        found: dict[InstanceRef, tuple[ProcessIdentity, ...]] = defaultdict(tuple)
        for pid in processes.pids():
            ref = argv.started_for(processes.arguments(pid, self._mark.encode()), self._mark)
            process = processes.identify(pid) if ref else None
            # Looked at twice, for the pid may have become another's in between.
            if ref and process and processes.runs(process) and processes.arguments(pid):
                found[ref] += (process,)
        return dict(found)

    def console_tail(self, directory: Path, *, lines: int) -> str:
        """See the port."""
        try:
            with (directory / argv.CONSOLE_LOG).open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
                text = file.read().decode(errors="replace")
        except FileNotFoundError:
            return ""
        found = _NOT_TEXT.sub("", text).strip().splitlines()
        panic = next((at for at, line in enumerate(found) if _PANIC in line), None)
        end = len(found) if panic is None else panic + max(1, lines // 4)  # mostly what led to it
        return "\n".join(found[max(0, end - lines) : end])

    def console(self, directory: Path, *, offset: int) -> tuple[str, int]:
        """See the port; control characters are removed. Shorter than `offset`, it is a new run's: from its start."""
        try:
            with (directory / argv.CONSOLE_LOG).open("rb") as file:
                end = file.seek(0, os.SEEK_END)
                start = offset if offset <= end else 0
                if start < end:
                    start = file.seek(start, os.SEEK_DATA)  # past what was trimmed
                data = file.read(_CONSOLE_BYTES)
        except FileNotFoundError:
            return "", offset
        text, used = codecs.utf_8_decode(data, "replace", len(data) < _PARTIAL)  # a character cut in two is left
        return _NOT_TEXT.sub("", text), start + used

    def trim_console(self, directory: Path, *, keep: int) -> None:
        """See the port."""
        with suppress(FileNotFoundError), (directory / argv.CONSOLE_LOG).open("r+b") as file:
            files.punch(file.fileno(), file.seek(0, os.SEEK_END) - keep)

    def _of(self, ref: InstanceRef) -> tuple[ProcessIdentity, ...]:
        return self.processes().get(ref, ())

    def _kill(self, process: ProcessIdentity) -> None:
        processes.kill(process)
        if not processes.wait_gone(process, _KILL_DEADLINE_S):
            raise TimedOut(
                "vmm.unkillable", f"process {process.pid} does not end", hint="the kernel holds it; see its stack",
                pid=process.pid,
            )  # fmt: skip

    def _newest_image(self) -> tuple[Path, Path] | None:
        kernels = sorted(self._layout.images.glob("[0-9a-f]*/vmlinux"), key=lambda path: path.stat().st_mtime)
        return (kernels[-1], kernels[-1].with_name("initramfs.cpio")) if kernels else None


@contextmanager
def closing_fd(fd: int) -> Iterator[int]:
    """Closed at the end of the block."""
    try:
        yield fd
    finally:
        os.close(fd)
