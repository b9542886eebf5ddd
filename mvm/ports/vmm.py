"""Virtual machine monitors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

from mvm.domain.ids import InstanceRef, Revision
from mvm.domain.instance import ProcessIdentity
from mvm.domain.pool import SeccompPolicy
from mvm.domain.secrets import Secrets
from mvm.domain.snapshot import Compression, SnapshotManifest
from mvm.domain.vmm import Ending, VmmState


class Presence(StrEnum):
    """Whether an instance's VMM process runs. UNKNOWN (it could not be seen) is never ABSENT."""

    PRESENT = "present"
    ABSENT = "absent"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Nic:
    """The guest's network card: the host's TAP and the card's MAC."""

    tap: str
    mac: str


@dataclass(frozen=True, slots=True)
class BootSpec:
    """Everything a cold boot needs. `directory` is the instance's own; sockets and logs go there.

    `rootfs` is the revision's read-only image, `overlay` the instance's own writable layer over it, `data_disk`
    its lasting disk, if it has one. `secrets` are what is on its disk of secrets, which every guest has: it is in
    memory and ends with the process. Memory in MiB. The VMM runs as user and group `uid`, which is nobody else's.
    """

    ref: InstanceRef
    directory: Path
    kernel: Path
    initramfs: Path
    rootfs: Path
    overlay: Path
    data_disk: Path | None
    vcpus: int
    mem_mib: int
    nic: Nic
    uid: int
    seccomp: SeccompPolicy = SeccompPolicy.BASELINE
    secrets: Secrets | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class TemplateSpec:
    """What the cold boot of a template needs: a `BootSpec` without an identity.

    Its card has a TAP of its own that leads nowhere, its data disk is an empty one of `data_disk_mib` (0: none), and so
    is its disk of secrets, so that every clone finds the devices it was saved with. `ref` names its process; no
    instance may have it.
    """

    ref: InstanceRef
    directory: Path
    kernel: Path
    initramfs: Path
    rootfs: Path
    overlay: Path
    data_disk_mib: int
    vcpus: int
    mem_mib: int
    uid: int
    seccomp: SeccompPolicy = SeccompPolicy.BASELINE


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """What a VMM's process holds of the host's memory, in bytes: resident, its fair share of it, its alone."""

    rss: int
    pss: int
    private: int


class VmmDriver(Protocol):
    """One VMM process per instance; it outlives the process that started it."""

    name: ClassVar[str]

    def observe(self, ref: InstanceRef, process: ProcessIdentity | None) -> Presence:
        """Whether the VMM `process` of `ref` runs; a zombie or another process under its pid is ABSENT."""
        ...

    def boot(self, spec: BootSpec) -> ProcessIdentity:
        """Start the VMM and return at once; an instance that has a process already keeps it.

        Raises `Failed` (``vmm.start_failed``) with the VMM's own words when it ends at once.
        """
        ...

    def state(self, ref: InstanceRef, process: ProcessIdentity) -> VmmState:
        """What the VMM says of itself, within a few seconds.

        Raises `Unreachable` (``vmm.gone``) when the process does not run, and `TimedOut` (``vmm.silent``).
        """
        ...

    def ending(self, directory: Path) -> Ending:
        """How the last run of the instance in `directory` ended, whose VMM is gone; nobody need have listened."""
        ...

    def wait_gone(self, process: ProcessIdentity, *, deadline_s: float) -> bool:
        """Wait until `process` has ended; False when the deadline passes first."""
        ...

    def kill(self, ref: InstanceRef, process: ProcessIdentity | None) -> None:
        """End every VMM process of `ref` at once and wait until it is gone."""
        ...

    def processes(self) -> Mapping[InstanceRef, tuple[ProcessIdentity, ...]]:
        """All VMM processes of this state directory, by the instance they were started for.

        They are known by what they say of themselves and by their user, which no guest and no other user can be.
        """
        ...

    def strangers(self) -> Mapping[str, str]:
        """Processes that call themselves VMMs of this state directory and are not, each with what tells so."""
        ...

    def put_secrets(self, ref: InstanceRef, process: ProcessIdentity, secrets: Secrets | None) -> None:
        """Replace what is on the disk of secrets of `process`, which its guest does not have mounted.

        Raises `Unreachable` (``vmm.gone``) when the process does not run.
        """
        ...

    def console_tail(self, directory: Path, *, lines: int) -> str:
        """The last lines of the guest's console, control characters removed; empty when there is none.

        When its kernel panicked, the lines are those that say why, not the registers and stack that follow.
        """
        ...

    def console(self, directory: Path, *, offset: int) -> tuple[str, int]:
        """The guest's console from byte `offset` on, at most 64 KiB, and the offset behind it."""
        ...

    def trim_console(self, directory: Path, *, keep: int) -> None:
        """Give back the disk space of all but about the last `keep` bytes of the guest's console.

        Offsets stay what they were. A guest decides how much it writes, so somebody has to do this now and then.
        """
        ...


@runtime_checkable
class Snapshotting(Protocol):
    """An optional ability: pausing, templates and their clones, sleeping to disk.

    A **template** is a directory made once by `save_template`, read-only ever after: a booted guest without an
    identity, saved with the layer it wrote over the rootfs. `clone` makes instances of it, which share its memory
    until they write. A **snapshot** is a directory made by `save`: one sleeping instance, whose overlay and data disk
    stay where they are. A snapshot of a clone holds what differs from its template, one of a cold-booted instance all
    of it; for the latter `template` is None everywhere.

    A restored guest is PAUSED, and knows neither what time it is nor, as a clone, who it is: the caller resumes it
    and then tells it (`GuestChannel.wake`, `configure`). Once resumed it writes to its overlay, and then its
    snapshot is of the past: it is refused (``snapshot.other_disk``), and the caller removes it.

    Raises `Unreachable` (``vmm.gone``) when the process does not run, `TimedOut` (``vmm.silent``) when it does not
    answer, `Failed` (``disk.full``) when there is no space, `NotFound` (``snapshot.not_found``) and `Failed`
    (``snapshot.damaged``, naming the file; ``snapshot.other_*``, naming what differs) for what cannot be restored;
    nothing is started then.
    """

    def boot_template(self, spec: TemplateSpec) -> ProcessIdentity:
        """Start a VMM that `save_template` can save; otherwise as `VmmDriver.boot`."""
        ...

    def save_template(
        self, spec: TemplateSpec, process: ProcessIdentity, *, revision: Revision, into: Path
    ) -> SnapshotManifest:
        """Make the template `into`, durable and read-only, and end the VMM. The overlay moves into it.

        `into` appears whole, replacing another. When this fails nothing is left but the VMM, which may have ended.
        """
        ...

    def clone(self, template: Path, spec: BootSpec, *, revision: Revision) -> ProcessIdentity:
        """A new instance from `template`, PAUSED; `spec.overlay` is empty. One that has a process keeps it.

        Nothing it does can change the template. Its card still has the template's MAC and is down in the guest;
        `configure` gives it its own before it comes up.
        """
        ...

    def pause(self, ref: InstanceRef, process: ProcessIdentity) -> None:
        """No vCPU runs when this returns. May be repeated."""
        ...

    def resume(self, ref: InstanceRef, process: ProcessIdentity) -> None:
        """The vCPUs run; the guest's clock is as late as it was paused. May be repeated."""
        ...

    def paused(self, ref: InstanceRef, process: ProcessIdentity) -> bool:
        """Whether its vCPUs stand still."""
        ...

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
        """Put an instance to sleep in `into`, which appears whole and durable; only then its VMM is ended.

        `template` is what it was cloned from; another one is refused (``snapshot.other_base``). On any failure nothing
        is left of the snapshot and the guest is as it was: running, or paused.
        """
        ...

    def restore(self, snapshot: Path, template: Path | None, spec: BootSpec, *, revision: Revision) -> ProcessIdentity:
        """Wake what `save` put into `snapshot`, PAUSED; one that has a process already keeps it.

        The snapshot is verified first, and stays; `spec.nic` has the MAC that the guest has.
        """
        ...

    def manifest(self, snapshot: Path) -> SnapshotManifest:
        """What a template or snapshot says of itself; its other files are not looked at."""
        ...

    def discard(self, snapshot: Path) -> None:
        """The template or snapshot is gone, whole or damaged; may be repeated. VMMs that use a template go on."""
        ...

    def memory(self, process: ProcessIdentity) -> MemoryUse:
        """What `process` uses now."""
        ...


@runtime_checkable
class DiskCopying(Protocol):
    """An optional ability: copying the disk of a guest that goes on."""

    def copy_data_disk(self, ref: InstanceRef, process: ProcessIdentity, disk: Path, into: Path) -> None:
        """The new file `into` is the data disk `disk` of a running or paused guest as it is at one instant.

        It is as after a power cut: what the guest had not yet brought to the disk is not in it. Raises `Unreachable`
        (``vmm.gone``), `TimedOut` (``vmm.silent``) and `Failed` (``vmm.failed``); `into` may be there then.
        """
        ...
