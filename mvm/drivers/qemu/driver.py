"""microVMs on QEMU's ``microvm`` machine."""

from __future__ import annotations

import codecs
import json
import os
import re
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import ClassVar

from mvm import guest
from mvm.domain.ids import InstanceRef
from mvm.domain.instance import ProcessIdentity
from mvm.domain.layout import StateLayout
from mvm.drivers import files, processes, tap
from mvm.drivers.guest_channel import listen
from mvm.drivers.qemu import argv
from mvm.drivers.qemu.accel import Accelerator, AcceleratorProbe
from mvm.drivers.qemu.tsc import host_tsc_khz
from mvm.errors import Failed, TimedOut
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


class QemuDriver:
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
        """See the port. Returns once QEMU says that it runs the guest."""
        for process in self._of(spec.ref):
            return process
        accelerator = self._probe.choose(lambda: (spec.kernel, spec.initramfs))
        log = spec.directory / _VMM_LOG
        for path in (log, spec.directory / argv.CONSOLE_LOG):  # of one run each
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600))
        ours, theirs = socket.socketpair()
        with ours:
            with ExitStack() as stack:
                stack.enter_context(theirs)
                card = tap.attach(spec.nic.tap)
                stack.callback(os.close, card)
                ports = {name: stack.enter_context(listen(spec.directory, name)).fileno() for name in guest.PORTS}
                fds = argv.Descriptors(card, theirs.fileno(), ports)
                process = self._shell.spawn(
                    argv.command(spec, fds, accelerator.name, host_tsc_khz(), self._mark),
                    log=log, pass_fds=(fds.tap, fds.monitor, *fds.ports.values()),
                )  # fmt: skip
            with self._lock:
                self._children.add(process)
            if not _is_up(ours):
                self._kill(process)
                words = log.read_text(errors="replace").replace(f"{argv.BINARY}: ", "").strip()
                raise Failed(
                    "vmm.start_failed", f"QEMU ended at once: {words[-1000:] or 'it said nothing'}",
                    hint=f"see {log}", subject=str(spec.ref), accelerator=accelerator.name,
                )  # fmt: skip
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

    def processes(self) -> Mapping[InstanceRef, tuple[ProcessIdentity, ...]]:
        """See the port."""
        with self._lock:
            self._children = {child for child in self._children if processes.runs(child)}  # which reaps
        found: dict[InstanceRef, tuple[ProcessIdentity, ...]] = defaultdict(tuple)
        for pid in processes.pids():
            ref = argv.started_for(processes.arguments(pid), self._mark)
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


def _is_up(monitor: socket.socket) -> bool:
    """Wait for the reply to a first command: QEMU's main loop answers it, so all devices are there and the guest runs.

    False when QEMU ends, or says nothing for `_UP_DEADLINE_S` seconds.
    """
    end = time.monotonic() + _UP_DEADLINE_S
    received = b""
    try:
        monitor.sendall(b'{"execute": "qmp_capabilities"}\n')
        while (left := end - time.monotonic()) > 0:
            monitor.settimeout(left)
            data = monitor.recv(65536)
            if not data:
                return False
            *complete, received = (received + data).split(b"\n")
            if any("return" in json.loads(line) for line in complete if line.strip()):
                return True
    except (TimeoutError, ConnectionError):
        pass
    return False
