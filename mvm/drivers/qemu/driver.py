"""microVMs on QEMU's ``microvm`` machine, with templates and snapshots.

A template and a snapshot are the same thing: the devices' state, and the pages that a VMM has to itself. A template's
differ from nothing, a clone's from its template. Both are restored into a VMM that maps the template's memory
privately.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from functools import cache
from itertools import chain
from mmap import ACCESS_READ, mmap
from pathlib import Path

from mvm import guest
from mvm.domain.ids import InstanceRef, Revision
from mvm.domain.instance import ProcessIdentity
from mvm.domain.layout import StateLayout
from mvm.domain.snapshot import (
    Compression,
    DiskState,
    FileDigest,
    Kind,
    Refusal,
    SnapshotId,
    SnapshotManifest,
    other_version,
    refusal,
)
from mvm.drivers import snapshot_files as files
from mvm.drivers import tap
from mvm.drivers.files import closing_fd, sync
from mvm.drivers.qemu import argv, disk_copy, memory
from mvm.drivers.qemu.packing import Buffer, Packer, Unpacker, ahead
from mvm.drivers.qemu.qmp import CommandFailed, Qmp
from mvm.drivers.qemu.tsc import host_tsc_khz
from mvm.drivers.qemu.vmms import QemuVmms, UidOf
from mvm.errors import Failed, Unreachable
from mvm.ports.cgroup import Cgroups
from mvm.ports.shell import Shell
from mvm.ports.vmm import BootSpec, MemoryUse, TemplateSpec

DEVICES, INDEX, MEMORY, DISK = "devices", "index", "memory", "disk.qcow2"
_ANSWER_S = 15.0
_SAVE_S = 60.0
_COPY_S = 3600.0  # of a disk, however large; the guest does not wait for it
_DEVICES_BYTES = 16 << 20  # some 100 KiB is usual


class QemuDriver(QemuVmms):
    """`VmmDriver` and `Snapshotting` on QEMU."""

    def __init__(
        self, layout: StateLayout, shell: Shell, cgroups: Cgroups | None = None, *, require_isolation: bool = False,
        caged: bool = True, uid_of: UidOf = lambda _: None,
    ) -> None:  # fmt: skip
        super().__init__(layout, shell, cgroups, require_isolation=require_isolation, caged=caged, uid_of=uid_of)
        self._verified = files.Verified()

    def boot_template(self, spec: TemplateSpec) -> ProcessIdentity:
        """See the port."""
        for process in self._of(spec.ref):
            return process
        accel = self._probe.choose(lambda: (spec.kernel, spec.initramfs)).name
        with closing_fd(tap.nowhere()) as card:
            return self._launch(
                spec, card, accel, lambda inside, fds, _: argv.template(inside, fds, accel, host_tsc_khz(), self._mark)
            )

    def save_template(
        self, spec: TemplateSpec, process: ProcessIdentity, *, revision: Revision, into: Path
    ) -> SnapshotManifest:
        """See the port. Its memory is not compressed: it is read whenever the first clone starts."""
        with files.appearing(into) as half:
            with Qmp(spec.ref, spec.directory, _SAVE_S) as qmp:
                qmp.run("stop")
                saved = _write_state(qmp, process, spec.mem_mib, half, Compression.NONE)
                version = qmp.hello()
            self._end(spec.ref, process)  # which closes the overlay
            spec.overlay.chmod(0o400)
            sync(spec.overlay)
            spec.overlay.rename(half / DISK)
            saved[DISK] = files.digest(half / DISK)
            made = self._manifest(spec, Kind.TEMPLATE, saved, version, revision, None, Compression.NONE, None)
            files.write_manifest(half, made)
        return made

    def clone(self, template: Path, spec: BootSpec, *, revision: Revision) -> ProcessIdentity:
        """See the port."""
        return self._restored(template, template, spec, revision)

    def restore(self, snapshot: Path, template: Path | None, spec: BootSpec, *, revision: Revision) -> ProcessIdentity:
        """See the port."""
        return self._restored(snapshot, template, spec, revision)

    def pause(self, ref: InstanceRef, process: ProcessIdentity) -> None:
        """See the port."""
        with self._monitor(ref, process) as qmp:
            qmp.run("stop")

    def resume(self, ref: InstanceRef, process: ProcessIdentity) -> None:
        """See the port."""
        with self._monitor(ref, process) as qmp:
            qmp.run("cont")

    def paused(self, ref: InstanceRef, process: ProcessIdentity) -> bool:
        """See the port."""
        with self._monitor(ref, process) as qmp:
            return not qmp.run("query-status")["running"]

    def save(
        self,
        spec: BootSpec,
        process: ProcessIdentity,
        *,
        template: Path | None,
        revision: Revision,
        into: Path,
        compression: Compression,
    ) -> SnapshotManifest:
        """See the port."""
        base = files.manifest(template).id if template else None
        with self._monitor(spec.ref, process, _SAVE_S) as qmp:
            # Of a template made anew since it is not known what differs.
            if base and not memory.has(process, _memory_name(base)):
                raise Failed(
                    "snapshot.other_base", f"{spec.ref} cannot sleep: the template it was cloned from is replaced",
                    hint="it runs on; stop and start it to have it cloned from the new one", subject=str(spec.ref),
                )  # fmt: skip
            running = qmp.run("query-status")["running"]
            qmp.run("stop")  # which also writes what QEMU holds back of the disks
            try:
                with files.appearing(into) as half:
                    saved = _write_state(qmp, process, spec.mem_mib, half, compression)
                    for disk in (spec.overlay, spec.data_disk):
                        if disk:
                            sync(disk)
                    made = self._manifest(
                        spec, Kind.DELTA if base else Kind.FULL, saved, qmp.hello(), revision, base, compression,
                        _disk_state(spec),
                    )  # fmt: skip
                    files.write_manifest(half, made)
            except BaseException:
                if running:
                    qmp.extend(_ANSWER_S)  # to save may have taken all of the time
                    with suppress(Unreachable):  # what went wrong may be that it has ended
                        qmp.run("cont")
                raise
        self._end(spec.ref, process)
        return made

    def copy_data_disk(self, ref: InstanceRef, process: ProcessIdentity, disk: Path, into: Path) -> None:
        """See the port."""
        disk_copy.copy(lambda: self._monitor(ref, process), disk, into, deadline_s=_COPY_S)

    def manifest(self, snapshot: Path) -> SnapshotManifest:
        """See the port."""
        return files.manifest(snapshot)

    def discard(self, snapshot: Path) -> None:
        """See the port."""
        files.discard(snapshot)

    def memory(self, process: ProcessIdentity) -> MemoryUse:
        """See the port."""
        try:
            return memory.use(process)
        except (FileNotFoundError, ProcessLookupError):
            raise _ended(process) from None

    def _restored(self, snapshot: Path, template: Path | None, spec: BootSpec, revision: Revision) -> ProcessIdentity:
        """A VMM over `template` with the state in `snapshot`, which may be the template itself."""
        accel = self._probe.choose(lambda: None).name
        base = files.manifest(template) if template else None
        if template and base:
            machine = self._machine(spec, accel, _data_bytes(spec))
            _refuse(template, refusal(
                base, owner=None, vmm=self.name, machine=machine, template=None, revision=revision,
                guest_protocol=guest.PROTOCOL_VERSION, disk=None, oldest_guest=guest.OLDEST_PROTOCOL,
            ))  # fmt: skip
        delta = snapshot != template
        said = files.manifest(snapshot) if delta or base is None else base
        if delta:
            _refuse(snapshot, refusal(
                said, owner=str(spec.ref), vmm=self.name, machine=self._machine(spec, accel, _data_bytes(spec)),
                template=base, revision=revision, guest_protocol=guest.PROTOCOL_VERSION, disk=_disk_state(spec),
                oldest_guest=guest.OLDEST_PROTOCOL,
            ))  # fmt: skip
        there = self.processes()
        for process in there.get(spec.ref, ()):
            if self._has_begun(spec, process):
                return process
            self._end(spec.ref, process)  # left half restored by a worker that was killed
        devices = files.read(snapshot, DEVICES, said.files)
        pages = _pages(snapshot, said) if delta else None
        disk = None
        if template and base:
            for name in (INDEX, MEMORY):  # though the memory may be there already
                self._verified.check(template, name, base.files)
            disk = self._verified.check(template, DISK, base.files)

        def load(qmp: Qmp, process: ProcessIdentity) -> None:
            runs = ahead(pages.runs()) if pages else None  # while QEMU comes up
            _refuse(snapshot, other_version(said, qmp.hello()))
            if runs:
                try:
                    memory.unpack_into(memory.region(process, spec.mem_mib), runs)
                except (FileNotFoundError, ProcessLookupError, EOFError):
                    raise _ended(process) from None
            qmp.run("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
            qmp.run("migrate-incoming", uri=f"fd:{state}")
            end = qmp.wait("MIGRATION", status=("completed", "failed"))
            if end["status"] != "completed":
                raise CommandFailed("the devices' state was not accepted")

        with ExitStack() as stack:
            card = stack.enter_context(closing_fd(tap.attach(spec.nic.tap)))
            state = stack.enter_context(closing_fd(_in_memory(devices)))
            shared = stack.enter_context(self._template_memory(template, base, there)) if template and base else None
            inherited = [state, *([shared] if shared is not None else [])]
            return self._launch(
                spec, card, accel,
                lambda inside, fds, layer: argv.restored(inside, layer, fds, shared, accel, self._mark),
                template_disk=disk, secrets=spec.secrets, pass_fds=inherited, new_run=not delta, then=load,
            )  # fmt: skip

    @contextmanager
    def _template_memory(
        self, template: Path, manifest: SnapshotManifest, there: Mapping[InstanceRef, tuple[ProcessIdentity, ...]]
    ) -> Iterator[int]:
        """The template's memory, sealed: a running VMM's, some of which are `there`, or else it is read.

        One of those who start reads it; the others wait until its VMM has it.
        """
        name = _memory_name(manifest.id)
        fd = next(self._shared(name, there), None)
        if fd is not None:
            with closing_fd(fd):
                yield fd
            return
        with closing_fd(os.open(template, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            fd = next(self._shared(name, self.processes()), None)
            if fd is None:
                fd = memory.sealed(name, manifest.mem_mib, self._template_pages(template, manifest))
            with closing_fd(fd):
                yield fd

    def _template_pages(self, template: Path, manifest: SnapshotManifest) -> Unpacker:
        """Its memory, verified when it was first read; not taken into memory of ours, since it is large."""
        index = files.read(template, INDEX, manifest.files)
        with self._verified.check(template, MEMORY, manifest.files).open("rb") as file:
            return _unpacker(index, mmap(file.fileno(), 0, access=ACCESS_READ), manifest)

    def _shared(self, name: str, there: Mapping[InstanceRef, tuple[ProcessIdentity, ...]]) -> Iterator[int]:
        for process in chain.from_iterable(there.values()):
            fd = memory.sealed_in(process.pid, name)
            if fd is not None:
                yield fd

    @contextmanager
    def _monitor(self, ref: InstanceRef, process: ProcessIdentity, deadline_s: float = _ANSWER_S) -> Iterator[Qmp]:
        """The monitor of `process`, QEMU's refusals translated."""
        directory = self._layout.instance(ref)
        try:
            with Qmp(ref, directory, deadline_s) as qmp:
                yield qmp
        except CommandFailed as error:
            raise Failed(
                "vmm.failed",
                f"the VMM of {ref} refused: {error}",
                hint=f"see: mvm instance info {ref}",
                subject=str(ref),
            ) from None

    def _has_begun(self, spec: BootSpec, process: ProcessIdentity) -> bool:
        with self._monitor(spec.ref, process) as qmp:
            return str(qmp.run("query-status")["status"]) != "inmigrate"

    def _manifest(
        self, spec: BootSpec | TemplateSpec, kind: Kind, saved: dict[str, FileDigest], version: str,
        revision: Revision, template: SnapshotId | None, compression: Compression, disk: DiskState | None,
    ) -> SnapshotManifest:  # fmt: skip
        accel = self._probe.choose(lambda: None).name
        data_bytes = spec.data_disk_mib << 20 if isinstance(spec, TemplateSpec) else _data_bytes(spec)
        return SnapshotManifest(
            kind=kind, owner=None if kind is Kind.TEMPLATE else str(spec.ref), files=saved, vmm=self.name,
            vmm_version=version,
            machine=self._machine(spec, accel, data_bytes), mem_mib=spec.mem_mib, vcpus=spec.vcpus, revision=revision,
            template=template, compression=compression, guest_protocol=guest.PROTOCOL_VERSION, disk=disk,
            taken_at=datetime.now(UTC),
        )  # fmt: skip

    def _machine(self, spec: BootSpec | TemplateSpec, accel: argv.AccelName, data_bytes: int) -> str:
        return argv.machine(spec, accel, data_bytes=data_bytes, host_cpu=_host_cpu())


def _write_state(
    qmp: Qmp, process: ProcessIdentity, mem_mib: int, into: Path, compression: Compression
) -> dict[str, FileDigest]:
    """Devices and memory of a VMM that stands still."""
    saved = {DEVICES: files.write(into, DEVICES, _devices(qmp))}
    with files.DigestWriter(into / MEMORY) as file:
        packer = Packer(file, compression)
        try:
            memory.pack(memory.region(process, mem_mib), packer)
        except (FileNotFoundError, ProcessLookupError, EOFError):
            raise _ended(process) from None
        index = packer.finish()
        saved[MEMORY] = file.done()
    return saved | {INDEX: files.write(into, INDEX, index)}


def _devices(qmp: Qmp) -> bytes:
    """The devices' state, through memory of ours: what fails with a disk fails here and not in QEMU."""
    with closing_fd(os.memfd_create("mvm-devices", os.MFD_CLOEXEC)) as fd:
        with closing_fd(os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_CLOEXEC)) as writable:
            number = qmp.run("add-fd", fds=(writable,))["fdset-id"]
        try:
            qmp.run("xen-save-devices-state", filename=f"/dev/fdset/{number}", live=False)
        finally:
            qmp.run("remove-fd", fdset_id=number)
        os.lseek(fd, 0, os.SEEK_SET)
        with os.fdopen(os.dup(fd), "rb") as file:
            data = file.read(_DEVICES_BYTES + 1)
    if len(data) > _DEVICES_BYTES:  # a VMM that has been taken over would have us read until there is no memory
        raise Failed(
            "vmm.failed", "the devices' state has no end", hint="to end the VMM: mvm instance stop --force REF"
        )
    return data


def _pages(directory: Path, manifest: SnapshotManifest) -> Unpacker:
    """Its memory, verified."""
    index = files.read(directory, INDEX, manifest.files)
    return _unpacker(index, files.read(directory, MEMORY, manifest.files), manifest)


def _unpacker(index: bytes, packed: Buffer, manifest: SnapshotManifest) -> Unpacker:
    return Unpacker(index, packed, manifest.compression, (manifest.mem_mib << 20) // memory.PAGE)


def _in_memory(data: bytes) -> int:
    fd = os.memfd_create("mvm-devices", os.MFD_CLOEXEC)
    with os.fdopen(os.dup(fd), "wb") as file:
        file.write(data)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _refuse(snapshot: Path, why: Refusal | None) -> None:
    if why:
        raise Failed(
            why.code, f"{snapshot} cannot be restored: {why.reason}",
            hint="to start the instance anew without what it held in memory: mvm instance start --force REF",
        )  # fmt: skip


def _ended(process: ProcessIdentity) -> Unreachable:
    return Unreachable("vmm.gone", f"process {process.pid} has ended", hint="see: mvm instance list")


def _memory_name(template: SnapshotId) -> str:
    return template[:32]


def _disk_state(spec: BootSpec) -> DiskState:
    """Of both its disks: a later write to either is a later time."""
    found = [disk.stat() for disk in (spec.overlay, spec.data_disk) if disk]
    return DiskState(sum(each.st_size for each in found), max(each.st_mtime_ns for each in found))


def _data_bytes(spec: BootSpec) -> int:
    return spec.data_disk.stat().st_size if spec.data_disk else 0


@cache
def _host_cpu() -> str:
    """What the host's CPU calls itself."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return ""
