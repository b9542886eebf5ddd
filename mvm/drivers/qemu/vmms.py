"""QEMU's processes: starting, finding and ending them, and their consoles."""

from __future__ import annotations

import codecs
import os
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar, TypeVar

from mvm import guest
from mvm.domain.addressing import is_guest_uid
from mvm.domain.ids import InstanceRef
from mvm.domain.instance import ProcessIdentity
from mvm.domain.layout import StateLayout
from mvm.domain.refusals import out_of_memory
from mvm.domain.secrets import Secrets
from mvm.domain.vmm import PANIC, Ending, VmmState, ending, halted
from mvm.drivers import files, identity, isolation, processes, secrets_disk, tap
from mvm.drivers.cgroups import LinuxCgroups
from mvm.drivers.files import closing_fd
from mvm.drivers.instance_sockets import listen
from mvm.drivers.qemu import argv, cage, diary, pages
from mvm.drivers.qemu.accel import KVM, Accelerator, AcceleratorProbe
from mvm.drivers.qemu.handover import Handover, readable
from mvm.drivers.qemu.qmp import MONITOR, CommandFailed, Qmp
from mvm.drivers.qemu.seccomp import QEMUS_OWN
from mvm.drivers.qemu.tsc import host_tsc_khz
from mvm.drivers.syscalls import failure
from mvm.errors import Failed, TimedOut, Unreachable
from mvm.ports.cgroup import Cgroups
from mvm.ports.shell import Shell
from mvm.ports.vmm import BootSpec, Presence, TemplateSpec

UidOf = Callable[[InstanceRef], int | None]  # whose user a VMM runs as; None: no such instance is known
Spec = TypeVar("Spec", bound=BootSpec | TemplateSpec)

_VMM_LOG = "vmm.log"
_UP_DEADLINE_S = 15.0
_KILL_DEADLINE_S = 10.0
_STATE_S = 5.0
_LAST_LINES = 12  # of a console, among which a panic is seen
_TAIL_BYTES = 256 * 1024
_CONSOLE_BYTES = 64 * 1024
_PARTIAL = 4  # bytes of the longest character: fewer at the end are no half that is still being written
_NOT_TEXT = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[@-Z\\-_])|[^\t\n\x20-\x7e\xa0-\U0010ffff]")


_STATES = {
    **{state.value: state for state in VmmState if state not in (VmmState.BETWEEN, VmmState.UNKNOWN)},
    **dict.fromkeys(
        ("prelaunch", "inmigrate", "restore-vm", "save-vm", "finish-migrate", "postmigrate", "colo"), VmmState.BETWEEN
    ),
    "suspended": VmmState.PAUSED,
}
"""QEMU's words for them."""


class QemuVmms:
    """`VmmDriver` on QEMU. Its VMMs are found again by their command lines, which name state directory and instance."""

    name: ClassVar[str] = "qemu"

    def __init__(
        self, layout: StateLayout, shell: Shell, cgroups: Cgroups | None = None, *, require_isolation: bool = False,
        caged: bool = True, uid_of: UidOf = lambda _: None,
    ) -> None:  # fmt: skip
        self._uid_of = uid_of
        self._layout = layout
        self._shell = shell
        self._require_isolation = require_isolation
        self._caged = caged  # not so only to measure what the cage costs
        self._mark = identity.mark(layout)
        self._cgroups = cgroups or LinuxCgroups(self._mark)
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
            present = processes.runs(process) and (
                not words or (argv.started_for(words, self._mark) == ref and self._foreign(process.pid, ref) is None)
            )
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
                spec,
                card,
                accel,
                lambda inside, fds, _: argv.command(inside, fds, accel, host_tsc_khz(), self._mark),
                secrets=spec.secrets,
            )

    def _launch(
        self, spec: Spec, card: int, accel: argv.AccelName,
        command: Callable[[Spec, argv.Descriptors, Path | None], list[str]],
        *, template_disk: Path | None = None, secrets: Secrets | None = None, pass_fds: Sequence[int] = (),
        new_run: bool = True,
        then: Callable[[Qmp, ProcessIdentity], object] = lambda qmp, process: qmp.hello(),
    ) -> ProcessIdentity:  # fmt: skip
        """Start QEMU and let `then` speak to it, which comes up meanwhile; `then` returns, or QEMU is ended."""
        ref, directory = spec.ref, spec.directory
        log = directory / _VMM_LOG
        for path in (log, directory / argv.CONSOLE_LOG) if new_run else (log,):
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600))
        with ExitStack() as stack:
            handed = Handover(stack)
            console = handed.file(directory / argv.CONSOLE_LOG, os.O_WRONLY | os.O_APPEND)
            monitor = stack.enter_context(listen(directory, MONITOR)).fileno()
            ports = {name: stack.enter_context(listen(directory, name)).fileno() for name in guest.PORTS}
            disk = stack.enter_context(closing_fd(secrets_disk.create(secrets)))
            fds = argv.Descriptors(card, monitor, ports, disk, console)
            layer = handed.file(template_disk, os.O_RDONLY) if template_disk else None
            words = command(self._inside(spec, handed), fds, layer)
            inherited = (card, monitor, *ports.values(), disk, *handed.fds, *pass_fds)
            process = self._start(spec, [*words, *handed.words(), "-sandbox", QEMUS_OWN], log, inherited, accel)
        with self._lock:
            self._children.add(process)
        try:
            with Qmp(ref, directory, _UP_DEADLINE_S) as qmp:
                then(qmp, process)
        except (CommandFailed, Unreachable, TimedOut) as error:
            self._kill(process)
            raw = log.read_text(errors="replace")
            said = raw.replace(f"{argv.BINARY}: ", "").strip() or str(error)
            exhausted = self._cgroups.out_of_memory(ref)
            self._cgroups.remove(ref)
            if exhausted:
                raise out_of_memory(ref) from None
            if failed := failure(raw):
                raise Failed(
                    "cage.failed", f"the cage of {ref} could not be built: {failed}",
                    hint="see: mvm doctor", subject=str(ref),
                ) from None  # fmt: skip
            raise Failed(
                "vmm.start_failed", f"QEMU ended at once: {said[-1000:]}", hint=f"see {log}", subject=str(ref)
            ) from None
        except BaseException:
            self._end(ref, process)
            raise
        return process

    def _inside(self, spec: Spec, handed: Handover) -> Spec:
        """`spec` as the VMM sees it: disks that it has open, the kernel where its cage shows it."""
        seen = replace(spec, rootfs=handed.file(spec.rootfs, os.O_RDONLY), overlay=handed.file(spec.overlay, os.O_RDWR))
        if isinstance(seen, BootSpec) and seen.data_disk:
            seen = replace(seen, data_disk=handed.file(seen.data_disk, os.O_RDWR))
        return replace(seen, kernel=cage.KERNEL, initramfs=cage.INITRAMFS) if self._caged else seen

    def _start(
        self, spec: Spec, words: Sequence[str], log: Path, inherited: Sequence[int], accel: argv.AccelName
    ) -> ProcessIdentity:
        with pages.small() if accel == "tcg" and "-incoming" in words else nullcontext():
            events = diary.begin(spec.directory)
            spawn = partial(self._shell.spawn, words, log=log, output=events, stdin=diary.NEGOTIATE)
            if not self._caged:
                return spawn(pass_fds=inherited)
            shown = {cage.KERNEL: spec.kernel, cage.INITRAMFS: spec.initramfs} if "-kernel" in words else {}
            if self._require_isolation:
                isolation.check(self._cgroups.missing())
            with self._cgroups.joining(spec.ref, cage.limits(spec.mem_mib, spec.vcpus)) as join:
                made = cage.Cage(
                    uid=spec.uid, policy=spec.seccomp, vcpus=spec.vcpus,
                    files={inside: readable(path) for inside, path in shown.items()}, join=join,
                    devices={"kvm": KVM.stat().st_rdev} if accel == "kvm" else {},
                )  # fmt: skip
                with closing_fd(cage.executable(made)) as program, cage.alone():
                    return spawn(pass_fds=[*inherited, *join], program=f"/proc/self/fd/{program}")

    def state(self, ref: InstanceRef, process: ProcessIdentity) -> VmmState:
        """See the port."""
        directory = self._layout.instance(ref)
        with Qmp(ref, directory, _STATE_S) as qmp:
            try:
                state = _STATES.get(str(qmp.run("query-status")["status"]), VmmState.UNKNOWN)
            except (CommandFailed, KeyError, TypeError):
                return VmmState.UNKNOWN
        if state is VmmState.RUNNING and halted(self.console_tail(directory, lines=_LAST_LINES)):
            return VmmState.ENDED
        return state

    def ending(self, directory: Path) -> Ending:
        """See the port."""
        reason, kept = diary.shutdown_reason(directory)
        return ending(reason, self.console_tail(directory, lines=_LAST_LINES), told=kept)

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
        self._cgroups.remove(ref)

    def put_secrets(self, ref: InstanceRef, process: ProcessIdentity, secrets: Secrets | None) -> None:
        """See the port."""
        if self.observe(ref, process) is not Presence.ABSENT:
            with suppress(FileNotFoundError):
                secrets_disk.replace(process, secrets)
                return
        raise Unreachable("vmm.gone", f"the VMM of {ref} does not run", hint=f"see: mvm instance info {ref}")

    def processes(self) -> Mapping[InstanceRef, tuple[ProcessIdentity, ...]]:
        """See the port."""
        with self._lock:
            self._children = {child for child in self._children if processes.runs(child)}  # which reaps
        found: dict[InstanceRef, tuple[ProcessIdentity, ...]] = defaultdict(tuple)
        for ref, process in self._named_as_ours():
            if self._foreign(process.pid, ref) is None:
                found[ref] += (process,)
        return dict(found)

    def strangers(self) -> Mapping[str, str]:
        """See the port."""
        named = [(ref, process, self._foreign(process.pid, ref)) for ref, process in self._named_as_ours()]
        return {f"process {process.pid} of {ref}": f"it runs as user {uid}" for ref, process, uid in named if uid}

    def _named_as_ours(self) -> Iterator[tuple[InstanceRef, ProcessIdentity]]:
        for pid in processes.pids():
            ref = argv.started_for(processes.arguments(pid, self._mark.encode()), self._mark)
            process = processes.identify(pid) if ref else None
            # Looked at twice, for the pid may have become another's in between.
            if ref and process and processes.runs(process) and processes.arguments(pid):
                yield ref, process

    def _foreign(self, pid: int, ref: InstanceRef) -> int | None:
        """The process's user, if that is neither the node's own (as which the cage is built) nor that of `ref`.

        A process can change its command line, and so pose as another instance's; its user it cannot.
        """
        uid = processes.uid(pid)
        if uid is None or uid == os.geteuid():
            return None
        expected = self._uid_of(ref)
        return None if (is_guest_uid(uid) if expected is None else uid == expected) else uid

    def console_tail(self, directory: Path, *, lines: int) -> str:
        """See the port."""
        try:
            with (directory / argv.CONSOLE_LOG).open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
                text = file.read().decode(errors="replace")
        except FileNotFoundError:
            return ""
        found = _NOT_TEXT.sub("", text).strip().splitlines()
        panic = next((at for at, line in enumerate(found) if PANIC in line), None)
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
        for name in (argv.CONSOLE_LOG, _VMM_LOG, diary.EVENTS_LOG):  # a guest can also have QEMU complain without end
            with suppress(FileNotFoundError), (directory / name).open("r+b") as file:
                files.punch(file.fileno(), file.seek(0, os.SEEK_END) - keep)

    def _of(self, ref: InstanceRef) -> tuple[ProcessIdentity, ...]:
        return self.processes().get(ref, ())

    def _end(self, ref: InstanceRef, process: ProcessIdentity) -> None:
        self._kill(process)
        self._cgroups.remove(ref)

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
