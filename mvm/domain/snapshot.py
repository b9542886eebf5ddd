"""Snapshots: what a manifest says, and whether what it describes may be restored here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from hashlib import sha256
from typing import Any, NamedTuple, NewType

from mvm.domain.ids import Revision
from mvm.errors import Failed, InvalidInput

FORMAT = 1

SnapshotId = NewType("SnapshotId", str)
"""The sha256 of a manifest's canonical JSON, which holds every file's: it stands for the whole snapshot."""


class Kind(StrEnum):
    """What a snapshot holds: a pool's TEMPLATE, to be cloned; or an instance, as a DELTA to its template or in FULL."""

    TEMPLATE = "template"
    DELTA = "delta"
    FULL = "full"


class Compression(StrEnum):
    """How the memory of a snapshot is packed."""

    NONE = "none"
    LZ4 = "lz4"
    ZSTD = "zstd"


class FileDigest(NamedTuple):
    """A file's sha256 in hex, and its size in bytes."""

    sha256: str
    size: int


class DiskState(NamedTuple):
    """How an instance's own disks were left: a later write makes its snapshot unfit. Bytes and nanoseconds."""

    size: int
    mtime_ns: int


class Refusal(NamedTuple):
    """Why a snapshot is not restored: an error's code, and a clause for people."""

    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class SnapshotManifest:
    """Everything that must be as it was when the snapshot was taken.

    `machine` stands for the virtual hardware (see the driver), `owner` is the instance that slept (None for a TEMPLATE,
    which is everybody's in its pool), `template` is the id of the template a DELTA is to,
    `guest_protocol` the agent's version, `disk` the state of the instance's own disks (None for a TEMPLATE, whose
    layer is among `files`). Memory in MiB.
    """

    kind: Kind
    owner: str | None
    files: Mapping[str, FileDigest]
    vmm: str
    vmm_version: str
    machine: str
    mem_mib: int
    vcpus: int
    revision: Revision
    template: SnapshotId | None
    compression: Compression
    guest_protocol: int
    disk: DiskState | None
    taken_at: datetime
    format: int = FORMAT

    @property
    def id(self) -> SnapshotId:
        """Its name: what a delta says of its template."""
        return SnapshotId(sha256(self.to_json()).hexdigest())

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(file.size for file in self.files.values())

    def to_json(self) -> bytes:
        """The one form that it is written in."""
        data = {
            "format": self.format,
            "kind": self.kind.value,
            "owner": self.owner,
            "files": {name: list(file) for name, file in self.files.items()},
            "vmm": self.vmm,
            "vmm_version": self.vmm_version,
            "machine": self.machine,
            "mem_mib": self.mem_mib,
            "vcpus": self.vcpus,
            "revision": self.revision,
            "template": self.template,
            "compression": self.compression.value,
            "guest_protocol": self.guest_protocol,
            "disk": list(self.disk) if self.disk else None,
            "taken_at": self.taken_at.isoformat(),
        }
        return json.dumps(data, sort_keys=True, separators=(",", ":")).encode() + b"\n"

    @classmethod
    def from_json(cls, raw: bytes) -> SnapshotManifest:
        """Inverse of `to_json`. Raises `ValueError` for anything but a manifest in its one form.

        One of a newer format is whole, and not for this mvm: `Failed` (``snapshot.other_format``).
        """
        try:
            data: dict[str, Any] = json.loads(raw)
            _refuse_newer(data["format"])
            found = cls(
                kind=Kind(data["kind"]),
                owner=data["owner"],
                files={name: FileDigest(*file) for name, file in data["files"].items()},
                vmm=data["vmm"],
                vmm_version=data["vmm_version"],
                machine=data["machine"],
                mem_mib=data["mem_mib"],
                vcpus=data["vcpus"],
                revision=Revision(data["revision"]),
                template=data["template"],
                compression=Compression(data["compression"]),
                guest_protocol=data["guest_protocol"],
                disk=DiskState(*data["disk"]) if data["disk"] else None,
                taken_at=datetime.fromisoformat(data["taken_at"]),
                format=data["format"],
            )
            same = found.to_json() == raw
        except (KeyError, TypeError, AttributeError, RecursionError, InvalidInput) as error:
            raise ValueError(f"not a manifest: {error}") from None
        if not same:
            raise ValueError("not in the form manifests are written in")
        return found


def refusal(
    manifest: SnapshotManifest,
    *,
    owner: str | None,
    vmm: str,
    machine: str,
    template: SnapshotManifest | None,
    revision: Revision,
    guest_protocol: int,
    disk: DiskState | None,
    oldest_guest: int | None = None,
) -> Refusal | None:
    """Why `manifest` cannot be restored to this instance and machine, over this template and disk; None if it can.

    For the template itself, `owner`, `template` and `disk` are None. Guests from `oldest_guest` to `guest_protocol` are
    served, only the latter if that is None.
    """
    served = (oldest_guest or guest_protocol) <= manifest.guest_protocol <= guest_protocol
    expected_guest = manifest.guest_protocol if served else guest_protocol
    template_id = template.id if template else None
    differences = (
        (manifest.format, FORMAT, "snapshot.other_format", "its format"),
        (manifest.owner, owner, "snapshot.other_instance", "the instance"),
        (manifest.vmm, vmm, "snapshot.other_vmm", "the VMM"),
        (manifest.revision, revision, "snapshot.other_revision", "the image's revision"),
        (manifest.template, template_id, "snapshot.other_base", "the template"),
        (manifest.machine, machine, "snapshot.other_machine", "the machine's configuration"),
        (manifest.guest_protocol, expected_guest, "snapshot.other_guest", "the guest agent's version"),
        (manifest.disk, disk, "snapshot.other_disk", "the instance's disk"),
    )
    for then, now, code, what in differences:
        if then != now:
            return Refusal(code, f"{what} was {_words(then)} and is {_words(now)}")
    return None


def other_version(manifest: SnapshotManifest, version: str) -> Refusal | None:
    """Why a VMM of `version` cannot restore `manifest`: only the very version that saved it can."""
    if manifest.vmm_version == version:
        return None
    return Refusal("snapshot.other_vmm", f"the VMM's version was {manifest.vmm_version} and is {version}")


def _refuse_newer(found: object) -> None:
    if isinstance(found, int) and found > FORMAT:
        raise Failed(
            "snapshot.other_format", f"its format is {found}; this mvm knows formats up to {FORMAT}",
            hint="a newer mvm has made it: use that one", found=found, expected=FORMAT,
        )  # fmt: skip


def _words(value: object) -> str:
    if isinstance(value, DiskState):
        return f"{value.size} bytes, written at {value.mtime_ns} ns"
    text = "none" if value is None else str(value)
    return text[:12] if len(text) == 64 else text
