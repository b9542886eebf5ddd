"""Image revisions on disk, verified before they are used."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import NoReturn

from mvm.domain.ids import Revision
from mvm.domain.layout import StateLayout
from mvm.drivers.files import closing_fd
from mvm.errors import Failed, InvalidInput, NotFound
from mvm.ports.storage import RevisionFiles

MANIFEST = "manifest.json"
BUILD_LOCK = ".lock"  # in the directory of revisions; whoever builds there holds it
KERNEL, INITRAMFS, ROOTFS = "vmlinux", "initramfs.cpio", "rootfs.ext4"
FILES = (KERNEL, INITRAMFS, ROOTFS)

Signature = tuple[tuple[int, int, int, int], ...]


class Revisions:
    """Verifies a revision's files against its manifest, and the manifest against the revision's id.

    That reads all of it, so a success is remembered for as long as the files' inode, size and times stay the same.
    """

    def __init__(self, layout: StateLayout) -> None:
        self._layout = layout
        self._lock = Lock()  # many starts at once read it once
        self._verified: dict[Revision, Signature] = {}

    def verified(self, revision: Revision) -> RevisionFiles:
        """The files. Raises `NotFound` (``revision.not_found``), `Failed` (``revision.damaged``) and `OSError`."""
        directory = self._layout.revision(revision)
        with self._lock:
            signature = _signature(revision, directory)
            if self._verified.get(revision) != signature:
                _verify(revision, directory)
                self._verified[revision] = signature
        return RevisionFiles(directory / KERNEL, directory / INITRAMFS, directory / ROOTFS)

    def all(self) -> Iterator[Revision]:
        """Those that have a directory."""
        with suppress(FileNotFoundError), os.scandir(self._layout.images) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    with suppress(InvalidInput):
                        yield Revision(entry.name)

    def remove(self, revision: Revision) -> None:
        """It goes by rename, to where the next build clears away what is left of it should we be killed."""
        half = self._layout.images / f".build-removed-{revision}"
        with suppress(FileNotFoundError):
            self._layout.revision(revision).rename(half)
        shutil.rmtree(half, ignore_errors=True)

    def remove_packages(self, needed: Collection[Revision]) -> int:
        """See `NodeStorage.remove_packages`. A builder holds the lock that is asked for here."""
        if not self._layout.images.is_dir() or self._layout.package_cache.is_symlink():
            return 0
        freed = 0
        file = self._layout.images / BUILD_LOCK
        with closing_fd(os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return 0
            used = {digest for revision in needed for digest in self._inputs(revision)}
            for path in self._layout.package_cache.glob("*.deb"):
                if path.stem not in used:
                    freed += path.stat().st_blocks * 512
                    path.unlink()
        return freed

    def _inputs(self, revision: Revision) -> Collection[str]:
        try:
            return set(json.loads((self._layout.revision(revision) / MANIFEST).read_bytes())["inputs"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return ()  # damaged: it is built again, from whatever packages there are then


def _signature(revision: Revision, directory: Path) -> Signature:
    if not directory.is_dir():
        raise NotFound(
            "revision.not_found", f"revision {revision.short} is not on this node",
            hint="build it with: mvm pool build T/P", revision=revision,
        )  # fmt: skip
    return tuple(_stat(revision, directory / name) for name in (MANIFEST, *FILES))


def _stat(revision: Revision, path: Path) -> tuple[int, int, int, int]:
    try:
        found = path.stat(follow_symlinks=False)
    except FileNotFoundError:
        _damaged(revision, path.name, "is missing")
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _verify(revision: Revision, directory: Path) -> None:
    raw = (directory / MANIFEST).read_bytes()
    if hashlib.sha256(raw).hexdigest() != revision:
        _damaged(revision, MANIFEST, "is not the one the revision is named after")
    try:
        listed = json.loads(raw)["files"]
        expected = {name: (listed[name]["sha256"], listed[name]["size"]) for name in FILES}
    except (ValueError, KeyError, TypeError):
        _damaged(revision, MANIFEST, "does not list the revision's files")
    for name, (digest, size) in expected.items():
        with (directory / name).open("rb") as file:
            if os.fstat(file.fileno()).st_size != size:
                _damaged(revision, name, f"is not {size} bytes long")
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                _damaged(revision, name, "differs from its manifest")


def _damaged(revision: Revision, name: str, how: str) -> NoReturn:
    raise Failed(
        "revision.damaged", f"revision {revision.short}: {name} {how}",
        hint="remove its directory and build it again with: mvm pool build T/P", revision=revision, file=name,
    )  # fmt: skip
