"""The node's files below its state directory."""

from __future__ import annotations

import errno
import os
import re
import shutil
from base64 import b64encode
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from mvm.domain.disk import Space, Stored, Template
from mvm.domain.ids import InstanceId, InstanceRef, PoolId, PoolRef, Revision, TenantId
from mvm.domain.layout import StateLayout
from mvm.drivers import disk_usage, snapshot_files
from mvm.drivers.files import sync
from mvm.drivers.qcow2 import write_empty
from mvm.drivers.revisions import Revisions
from mvm.errors import Failed, InvalidInput
from mvm.ports.shell import Shell
from mvm.ports.storage import InstanceKeys, RevisionFiles

OVERLAY = "overlay.qcow2"
DATA_DISK = "data.img"
HOST_KEY = "ssh_host_key"
_RUNTIME = re.compile(r"overlay\.qcow2|.*\.sock|.*\.lock|vmm\.pid|.*\.tmp")
_KEY_TYPE = b"ssh-ed25519"
_MIB = 1 << 20


class FileStorage:
    """ports/storage.py over the file system; directories are 0700, files 0600.

    What must survive a crash is written under another name, brought to disk, and renamed.
    """

    def __init__(self, layout: StateLayout, shell: Shell) -> None:
        self._layout = layout
        self._shell = shell
        self._revisions = Revisions(layout)

    def directory(self, ref: InstanceRef) -> Path:
        """See ports/storage.py."""
        return self._layout.instance(ref)

    def prepare(self, ref: InstanceRef, *, data_disk_mib: int) -> None:
        """See ports/storage.py."""
        directory = self.directory(ref)
        with _translated(directory):
            self._make(directory)
            if not (directory / HOST_KEY).exists():
                with _appearing(directory / HOST_KEY) as path:
                    path.write_bytes(_new_host_key())
            if data_disk_mib and not (directory / DATA_DISK).exists():
                with _appearing(directory / DATA_DISK) as path:
                    os.truncate(path, data_disk_mib * _MIB)
                    self._shell.run(["mkfs.ext4", "-q", "-F", "-L", "mvm-data", "-O", "has_journal", str(path)])

    def _make(self, directory: Path) -> None:
        """The directory and those above it, each 0700; `remove` may take empty ones away meanwhile."""
        chain = [self._layout.root, self._layout.instances, *reversed(directory.parents[:2]), directory]
        for left in reversed(range(8)):
            try:
                for each in chain:
                    each.mkdir(mode=0o700, exist_ok=True, parents=each is self._layout.root)
                return
            except FileNotFoundError:
                if not left:
                    raise

    def keys(self, ref: InstanceRef) -> InstanceKeys:
        """See ports/storage.py. The public half is the private one's last 32 bytes."""
        path = self.directory(ref) / HOST_KEY
        with _translated(path):
            private = path.read_bytes()
        public = b64encode(_string(_KEY_TYPE) + _string(private[-32:])).decode()
        return InstanceKeys(f"{_KEY_TYPE.decode()} {public}", private)

    def data_disk(self, ref: InstanceRef) -> Path | None:
        """See ports/storage.py."""
        path = self.directory(ref) / DATA_DISK
        return path if path.exists() else None

    def fresh_overlay(self, ref: InstanceRef, rootfs: Path) -> Path:
        """See ports/storage.py. It is as large as `rootfs` and lasts as long as a run, so it is not synced."""
        path = self.directory(ref) / OVERLAY
        with _translated(path):
            with _appearing(path, durable=False) as empty, empty.open("r+b") as file:
                write_empty(file, rootfs.stat().st_size)
        return path

    def overlay(self, ref: InstanceRef) -> Path:
        """See ports/storage.py."""
        return self.directory(ref) / OVERLAY

    def clean_runtime(self, ref: InstanceRef) -> None:
        """See ports/storage.py."""
        directory = self.directory(ref)
        with _translated(directory):
            for name in _runtime_files(directory):
                (directory / name).unlink(missing_ok=True)

    def template(self, pool: PoolRef, revision: Revision) -> Path:
        """See ports/storage.py."""
        path = self._layout.template(pool, revision)
        with _translated(path):
            self._make(path.parent)
        return path

    def snapshot(self, ref: InstanceRef) -> Path:
        """See ports/storage.py."""
        return self._layout.snapshot(ref)

    def drop_templates(self, pool: PoolRef) -> None:
        """See ports/storage.py."""
        directory = self._layout.templates / pool.tenant / pool.pool
        with _translated(directory), suppress(FileNotFoundError):
            shutil.rmtree(directory)

    def remove(self, ref: InstanceRef) -> None:
        """See ports/storage.py. Directories above it that became empty go with it."""
        directory = self.directory(ref)
        with _translated(directory):
            with suppress(FileNotFoundError):
                shutil.rmtree(directory)
        with suppress(OSError):  # not empty
            for parent in directory.parents[:2]:
                parent.rmdir()

    def instances(self) -> frozenset[InstanceRef]:
        """See ports/storage.py. Directories that no instance could have are passed over."""
        with _translated(self._layout.instances):
            return frozenset(self._scan())

    def _scan(self) -> Iterator[InstanceRef]:
        for tenant in _subdirectories(self._layout.instances):
            for pool in _subdirectories(tenant):
                for instance in _subdirectories(pool):
                    with suppress(InvalidInput):
                        yield InstanceRef(TenantId(tenant.name), PoolId(pool.name), InstanceId(instance.name))

    def not_ours(self, ref: InstanceRef) -> str | None:
        """See ports/storage.py."""
        directory = self.directory(ref)
        with _translated(directory), suppress(FileNotFoundError):
            if (owner := directory.stat(follow_symlinks=False).st_uid) != os.geteuid():
                return f"{directory} belongs to user {owner}"
            if mount := disk_usage.mounted_within(directory):
                return f"something is mounted at {mount}"
            if self.snapshot(ref).exists():
                return f"somebody may sleep in {self.snapshot(ref)}; if not: rm -r {directory}"
            if (disk := directory / DATA_DISK).exists():
                return f"there may be data on {disk}; if not: rm -r {directory}"
        return None

    def leftovers(self) -> Mapping[InstanceRef, Sequence[str]]:
        """See ports/storage.py. Instances without any are left out."""
        with _translated(self._layout.instances):
            found = {ref: _runtime_files(self.directory(ref)) for ref in self._scan()}
        return {ref: names for ref, names in found.items() if names}

    def revision(self, revision: Revision) -> RevisionFiles:
        """See ports/storage.py."""
        with _translated(self._layout.revision(revision)):
            return self._revisions.verified(revision)

    def revisions(self) -> frozenset[Revision]:
        """See ports/storage.py."""
        with _translated(self._layout.images):
            return frozenset(self._revisions.all())

    def remove_revision(self, revision: Revision) -> None:
        """See ports/storage.py."""
        with _translated(self._layout.images):
            self._revisions.remove(revision)

    def templates(self) -> frozenset[Template]:
        """See ports/storage.py. Those that a crash left half made are told, others' directories passed over."""
        found = set()
        with _translated(self._layout.templates):
            for tenant in _subdirectories(self._layout.templates):
                for pool in _subdirectories(tenant):
                    for revision in _subdirectories(pool):
                        with suppress(InvalidInput):
                            name = snapshot_files.whole(revision.name)
                            found.add((PoolRef(TenantId(tenant.name), PoolId(pool.name)), Revision(name)))
        return frozenset(found)

    def remove_template(self, pool: PoolRef, revision: Revision) -> None:
        """See ports/storage.py."""
        snapshot_files.discard(self._layout.template(pool, revision))

    def remove_packages(self, needed: Collection[Revision]) -> int:
        """See ports/storage.py."""
        with _translated(self._layout.package_cache):
            return self._revisions.remove_packages(needed)

    def shared_with_others(self) -> str | None:
        """See ports/storage.py. A link leads to a place that others may use."""
        return str(self._layout.images.resolve()) if self._layout.images.is_symlink() else None

    def usage(self) -> Sequence[Stored]:
        """See ports/storage.py."""
        with _translated(self._layout.root):
            return disk_usage.measure(self._layout)

    def space(self) -> Space:
        """See ports/storage.py."""
        with _translated(self._layout.root):
            return disk_usage.space(self._layout)


def _new_host_key() -> bytes:
    """An ed25519 key in dropbear's private form."""
    key = Ed25519PrivateKey.generate()
    return _string(_KEY_TYPE) + _string(key.private_bytes_raw() + key.public_key().public_bytes_raw())


def _string(data: bytes) -> bytes:
    """SSH's ``string``: its length in 4 bytes, then itself."""
    return len(data).to_bytes(4, "big") + data


def _subdirectories(directory: Path) -> list[Path]:
    try:
        with os.scandir(directory) as entries:
            return [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []


def _runtime_files(directory: Path) -> list[str]:
    try:
        with os.scandir(directory) as entries:
            return sorted(e.name for e in entries if _RUNTIME.fullmatch(e.name) and not e.is_dir(follow_symlinks=False))
    except FileNotFoundError:
        return []


@contextmanager
def _appearing(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """An empty file to fill, which is at `path` once the block ends well; else nothing is left of it."""
    half_made = path.with_name(path.name + ".tmp")
    half_made.unlink(missing_ok=True)  # what a crash left
    try:
        os.close(os.open(half_made, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        yield half_made
        if durable:
            sync(half_made)
        half_made.replace(path)
        if durable:
            sync(path.parent)
    except BaseException:
        half_made.unlink(missing_ok=True)
        raise


@contextmanager
def _translated(subject: Path) -> Iterator[None]:
    """Foreign errors become ours at this edge."""
    try:
        yield
    except OSError as error:
        raise _failed(error.errno, f"{error.filename or subject}: {error.strerror}") from None
    except Failed as error:
        if error.code == "shell.failed":
            full = "No space left" in error.message
            raise _failed(errno.ENOSPC if full else None, f"{subject}: {error.message}") from None
        raise


def _failed(number: int | None, message: str) -> Failed:
    if number in (errno.ENOSPC, errno.EDQUOT):
        return Failed("disk.full", message, hint="free some space in the state directory's file system")
    return Failed("storage.failed", message, hint="are the state directory's files the node's own?")
