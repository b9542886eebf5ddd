"""The node's files: instance directories, overlays, data disks, keys, revisions."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mvm.domain.disk import Space, Stored, Template
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

    def not_ours(self, ref: InstanceRef) -> str | None:
        """Why the instance's directory may hold what somebody wants to keep, if it may.

        It is another user's, has a mount within, or what an instance writes to: the store may have lost it.
        """
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

    def revisions(self) -> frozenset[Revision]:
        """Every revision that has a directory."""
        ...

    def remove_revision(self, revision: Revision) -> None:
        """The revision is gone, at once and as a whole; a VMM that has its files open goes on."""
        ...

    def templates(self) -> frozenset[Template]:
        """Every template that has a directory."""
        ...

    def remove_template(self, pool: PoolRef, revision: Revision) -> None:
        """That template of the pool is gone; a VMM that has its files open goes on."""
        ...

    def remove_packages(self, needed: Collection[Revision]) -> int:
        """Only those of the cached packages are left that `needed` revisions were built from; the bytes of the others.

        Not while an image is being built, which brings them in before it uses them.
        """
        ...

    def shared_with_others(self) -> str | None:
        """Where revisions lie, if that may be another node's too, so that none of them is ours alone."""
        ...

    def usage(self) -> Sequence[Stored]:
        """All that takes space below the state directory; blocks that several things share are counted with the first.

        What goes away meanwhile is left out.
        """
        ...

    def space(self) -> Space:
        """Of the file system that is the fullest, if it is on several."""
        ...
