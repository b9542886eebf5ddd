"""The node's files: instance directories, overlays, data disks, keys, revisions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mvm.domain.ids import InstanceRef, PoolRef, Revision


@dataclass(frozen=True, slots=True)
class InstanceKeys:
    """An instance's ssh host key: public line, and private in dropbear's form."""

    host_public: str
    host_private: bytes


@dataclass(frozen=True, slots=True)
class RevisionFiles:
    """A verified revision's files."""

    kernel: Path
    initramfs: Path
    rootfs: Path


class NodeStorage(Protocol):
    """Everything of an instance lies in one directory of its own, mode 0700.

    Raises `Failed` (``disk.full``) when there is no space, leaving nothing half made.
    """

    def directory(self, ref: InstanceRef) -> Path:
        """Where the instance's files are; it may not exist."""
        ...

    def prepare(self, ref: InstanceRef, *, data_disk_mib: int) -> None:
        """The directory, the ssh host key, and the formatted data disk (if any) exist; an existing one is kept."""
        ...

    def keys(self, ref: InstanceRef) -> InstanceKeys:
        """The keys that `prepare` made."""
        ...

    def data_disk(self, ref: InstanceRef) -> Path | None:
        """The data disk, if the instance has one."""
        ...

    def fresh_overlay(self, ref: InstanceRef, rootfs: Path) -> Path:
        """A new, empty writable layer over `rootfs`, replacing any old one."""
        ...

    def overlay(self, ref: InstanceRef) -> Path:
        """Where the instance's writable layer is."""
        ...

    def clean_runtime(self, ref: InstanceRef) -> None:
        """What belongs to one run is gone: the overlay and the sockets. Keys, data disk and console log stay."""
        ...

    def remove(self, ref: InstanceRef) -> None:
        """The instance's directory is gone."""
        ...

    def instances(self) -> frozenset[InstanceRef]:
        """Every instance that has a directory."""
        ...

    def leftovers(self) -> Mapping[InstanceRef, Sequence[str]]:
        """Per instance with a directory, the names of its files that belong to a run (overlay, sockets)."""
        ...

    def template(self, pool: PoolRef, revision: Revision) -> Path:
        """Where the pool's template at `revision` is, or will be."""
        ...

    def snapshot(self, ref: InstanceRef) -> Path:
        """Where the instance's snapshot is, or will be."""
        ...

    def drop_templates(self, pool: PoolRef) -> None:
        """The pool has no templates."""
        ...

    def revision(self, revision: Revision) -> RevisionFiles:
        """The revision's files, their sha256 compared with the manifest's.

        Raises `NotFound` (``revision.not_found``) and `Failed` (``revision.damaged``, naming the file).
        """
        ...
