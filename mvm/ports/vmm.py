"""Virtual machine monitors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import ClassVar, Protocol

from mvm.domain.ids import InstanceRef
from mvm.domain.instance import ProcessIdentity


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
    its lasting disk, if it has one. Memory in MiB.
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

    def wait_gone(self, process: ProcessIdentity, *, deadline_s: float) -> bool:
        """Wait until `process` has ended; False when the deadline passes first."""
        ...

    def kill(self, ref: InstanceRef, process: ProcessIdentity | None) -> None:
        """End every VMM process of `ref` at once and wait until it is gone."""
        ...

    def processes(self) -> Mapping[InstanceRef, tuple[ProcessIdentity, ...]]:
        """All VMM processes of this state directory, by the instance they were started for."""
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
