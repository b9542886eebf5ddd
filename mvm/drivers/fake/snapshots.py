"""The fake host's templates and snapshots."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import ClassVar

from mvm import guest
from mvm.domain.ids import InstanceRef, Revision
from mvm.domain.instance import ProcessIdentity
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
from mvm.domain.vmm import VmmState
from mvm.drivers.fake.state import Machine, Part, Saved, digests, point
from mvm.errors import Failed, NotFound, Unreachable
from mvm.ports.vmm import BootSpec, MemoryUse, Nic, TemplateSpec


class FakeSnapshots(Part):
    """`Snapshotting` of ports/vmm.py. What is saved is kept in the host, by path; `FakeHost.damage` spoils it."""

    name: ClassVar[str] = "fake"

    def _start(self, spec: BootSpec, *, paused: bool = False) -> Machine:
        """A new machine; it needs the TAP and the overlay that a real VMM would open."""
        host, ref = self._host, spec.ref
        files = host.files.get(ref)
        if spec.nic.tap not in host.taps or files is None or spec.overlay.name not in files.runtime:
            raise Failed("vmm.start_failed", f"the VMM ended at once: no {spec.nic.tap} or no {spec.overlay.name}")
        machine = Machine(
            replace(spec, secrets=None), host.next_process(), host.clock.monotonic(), hung=host.hangs[ref] > 0,
            paused=paused, disk=digests(spec.secrets),
        )  # fmt: skip
        host.hangs[ref] -= machine.hung
        host.endings.pop(spec.directory, None)
        host.machines[ref] = machine
        host.groups.add(ref)
        files.runtime |= {"agent.sock", "qmp.sock", "vmm.pid"}
        return machine

    @point("vmm.boot_template")
    def boot_template(self, spec: TemplateSpec) -> ProcessIdentity:
        """See ports/vmm.py."""
        host = self._host
        if spec.ref not in host.machines:
            same = BootSpec(
                spec.ref, spec.directory, spec.kernel, spec.initramfs, spec.rootfs, spec.overlay, None, spec.vcpus,
                spec.mem_mib, Nic("", ""), spec.uid, spec.seccomp,
            )  # fmt: skip
            host.groups.add(spec.ref)
            hung = host.hangs[spec.ref] > 0
            host.hangs[spec.ref] -= hung
            host.machines[spec.ref] = Machine(same, host.next_process(), host.clock.monotonic(), hung=hung)
            host.consoles[spec.directory] = deque(["Linux version 6.1.0-fake"], maxlen=1000)
            if host.panics[spec.ref] > 0:
                host.panic_guest(spec.ref, times=0)
        return host.machines[spec.ref].process

    @point("vmm.save_template")
    def save_template(
        self, spec: TemplateSpec, process: ProcessIdentity, *, revision: Revision, into: Path
    ) -> SnapshotManifest:
        """See ports/vmm.py."""
        machine = self._running(spec.ref, process)
        made = self._manifest(spec, Kind.TEMPLATE, revision, None, Compression.NONE, None)
        self._host.saved[into] = Saved(made, machine)
        self._host.spoilt.discard(into)
        if spec.ref in self._host.files:
            self._host.files[spec.ref].runtime.clear()
        self._host.drop_group(spec.ref)
        return made

    @point("vmm.clone")
    def clone(self, template: Path, spec: BootSpec, *, revision: Revision) -> ProcessIdentity:
        """See ports/vmm.py."""
        return self._restored(template, template, spec, revision)

    @point("vmm.restore")
    def restore(self, snapshot: Path, template: Path | None, spec: BootSpec, *, revision: Revision) -> ProcessIdentity:
        """See ports/vmm.py."""
        return self._restored(snapshot, template, spec, revision)

    @point("vmm.pause")
    def pause(self, ref: InstanceRef, process: ProcessIdentity) -> None:
        """See ports/vmm.py."""
        self._running(ref, process).paused = True

    @point("vmm.resume")
    def resume(self, ref: InstanceRef, process: ProcessIdentity) -> None:
        """See ports/vmm.py."""
        machine = self._running(ref, process)
        if machine.still and ref in self._host.files:
            self._host.files[ref].writes += 1
        machine.paused = False
        if machine.state.stands_still and self._host.has_room():
            machine.state = VmmState.RUNNING

    @point("vmm.paused")
    def paused(self, ref: InstanceRef, process: ProcessIdentity) -> bool:
        """See ports/vmm.py."""
        return self._running(ref, process).still

    @point("vmm.save")
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
        """See ports/vmm.py."""
        machine = self._running(spec.ref, process)
        base = self.manifest(template).id if template else None
        if base and base != machine.base:
            raise Failed("snapshot.other_base", f"{spec.ref} cannot sleep: the template it was cloned from is replaced")
        kind = Kind.DELTA if base else Kind.FULL
        made = self._manifest(spec, kind, revision, base, compression, self._disk(spec.ref))
        self._host.saved[into] = Saved(made, machine)
        self._host.spoilt.discard(into)
        self._host.files[spec.ref].runtime &= {spec.overlay.name}
        self._host.drop_group(spec.ref)
        return made

    @point("vmm.manifest")
    def manifest(self, snapshot: Path) -> SnapshotManifest:
        """See ports/vmm.py."""
        if snapshot not in self._host.saved:
            raise NotFound("snapshot.not_found", f"there is no snapshot {snapshot}", hint="start the instance instead")
        return self._host.saved[snapshot].manifest

    @point("vmm.discard")
    def discard(self, snapshot: Path) -> None:
        """See ports/vmm.py."""
        self._host.saved.pop(snapshot, None)
        self._host.spoilt.discard(snapshot)

    @point("vmm.memory")
    def memory(self, process: ProcessIdentity) -> MemoryUse:
        """See ports/vmm.py."""
        for machine in self._host.machines.values():
            if machine.process == process:
                return MemoryUse(rss=64 << 20, pss=32 << 20, private=16 << 20)
        raise Unreachable("vmm.gone", f"process {process.pid} has ended", hint="see: mvm instance list")

    def _running(self, ref: InstanceRef, process: ProcessIdentity) -> Machine:
        machine = self._host.machines.get(ref)
        if machine is None or machine.process != process:
            raise Unreachable("vmm.gone", f"the VMM of {ref} does not run", hint=f"see: mvm instance info {ref}")
        return machine

    def _restored(self, snapshot: Path, template: Path | None, spec: BootSpec, revision: Revision) -> ProcessIdentity:
        host = self._host
        if spec.ref in host.machines:
            return host.machines[spec.ref].process
        base = self.manifest(template) if template else None
        said = self.manifest(snapshot)
        clones = snapshot == template
        why = refusal(
            said, owner=None if clones else str(spec.ref), vmm=self.name, machine=_machine(spec),
            template=None if clones else base, revision=revision, guest_protocol=guest.PROTOCOL_VERSION,
            disk=None if clones else self._disk(spec.ref), oldest_guest=guest.OLDEST_PROTOCOL,
        ) or other_version(said, host.version)  # fmt: skip
        if why is None and (snapshot in host.spoilt or template in host.spoilt):
            why = Refusal("snapshot.damaged", "memory differs from its manifest")
        if why:
            raise Failed(why.code, f"{snapshot} cannot be restored: {why.reason}", hint="start it anew: --force")
        was = host.saved[snapshot].machine
        started = self._start(spec, paused=True)
        host.consoles[spec.directory] = deque(maxlen=1000)
        host.machines[spec.ref] = replace(
            started, identity=was.identity, booted_at=was.booted_at, mounted=was.mounted, base=base.id if base else None
        )
        return started.process

    def _disk(self, ref: InstanceRef) -> DiskState:
        files = self._host.files.get(ref)
        return DiskState(0, files.writes if files else 0)

    def _manifest(
        self, spec: BootSpec | TemplateSpec, kind: Kind, revision: Revision, template: SnapshotId | None,
        compression: Compression, disk: DiskState | None,
    ) -> SnapshotManifest:  # fmt: skip
        size = (8 if kind is Kind.TEMPLATE else 1) << 20
        return SnapshotManifest(
            kind=kind, owner=None if kind is Kind.TEMPLATE else str(spec.ref),
            files={"memory": FileDigest(sha256(str(spec.ref).encode()).hexdigest(), size)}, vmm=self.name,
            vmm_version=self._host.version, machine=_machine(spec), mem_mib=spec.mem_mib, vcpus=spec.vcpus,
            revision=revision, template=template, compression=compression, guest_protocol=guest.PROTOCOL_VERSION,
            disk=disk, taken_at=self._host.clock.now(),
        )  # fmt: skip


def _machine(spec: BootSpec | TemplateSpec) -> str:
    has_data = spec.data_disk_mib > 0 if isinstance(spec, TemplateSpec) else spec.data_disk is not None
    return f"{spec.vcpus} vCPUs, {spec.mem_mib} MiB{', data disk' if has_data else ''}"
