"""Templates and snapshots on disk: they appear whole and durable, and are verified before they are used."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import file_digest, sha256
from pathlib import Path
from threading import Lock
from typing import NoReturn

from mvm.domain.snapshot import FileDigest, SnapshotManifest
from mvm.drivers.files import former, sync, take_place
from mvm.errors import Failed, NotFound

MANIFEST = "manifest.json"
_HALF = ".new"


class DigestWriter:
    """A new file, 0400 and synced once it is closed, and its digest."""

    def __init__(self, path: Path) -> None:
        self._file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400), "wb")
        self._hash = sha256()
        self._size = 0

    def __enter__(self) -> DigestWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: bytes) -> int:
        """Append `data`."""
        self._hash.update(data)
        self._size += len(data)
        return self._file.write(data)

    def done(self) -> FileDigest:
        """Everything is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return FileDigest(self._hash.hexdigest(), self._size)


@contextmanager
def appearing(into: Path) -> Iterator[Path]:
    """An empty directory, which is `into` once the block ends well; else nothing is left of it.

    Raises `Failed` (``disk.full``, ``storage.failed``).
    """
    half = into.with_name(into.name + _HALF)
    try:
        shutil.rmtree(half, ignore_errors=True)  # what a crash left
        half.mkdir(mode=0o700, parents=True)
        yield half
        sync(half)
        take_place(half, into)
        sync(into.parent)
        shutil.rmtree(half, ignore_errors=True)  # the one before
    except BaseException as error:
        shutil.rmtree(half, ignore_errors=True)
        if isinstance(error, OSError):
            raise _failed(into, error) from None
        raise


def whole(name: str) -> str:
    """The name that a directory has, or will have once it appears."""
    return name.removesuffix(_HALF)


def discard(directory: Path) -> None:
    """It is gone, and what was left of one that had not yet appeared, or of the one before."""
    for path in (directory.with_name(directory.name + _HALF), former(directory), directory):
        try:
            shutil.rmtree(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise _failed(path, error) from None


def write(directory: Path, name: str, data: bytes) -> FileDigest:
    """A new file in a directory that is `appearing`."""
    with DigestWriter(directory / name) as file:
        file.write(data)
        return file.done()


def write_manifest(directory: Path, made: SnapshotManifest) -> None:
    """The manifest, and its own digest in a second line."""
    write(directory, MANIFEST, made.to_json() + _last_line(made))


def digest(path: Path) -> FileDigest:
    """Of a file that is there."""
    with path.open("rb") as file:
        return FileDigest(file_digest(file, "sha256").hexdigest(), os.fstat(file.fileno()).st_size)


def manifest(directory: Path) -> SnapshotManifest:
    """See `Snapshotting.manifest`."""
    try:
        *lines, told = (directory / MANIFEST).read_bytes().splitlines(keepends=True)
        found = SnapshotManifest.from_json(b"".join(lines))
        if told != _last_line(found):
            damaged(directory, MANIFEST, "is not what was written")
        return found
    except FileNotFoundError:
        if directory.is_dir():
            damaged(directory, MANIFEST, "is missing")
        raise NotFound(
            "snapshot.not_found",
            f"there is no snapshot {directory}",
            hint="to start the instance anew without what it held in memory: mvm instance start --force REF",
        ) from None
    except (ValueError, OSError) as error:
        damaged(directory, MANIFEST, f"cannot be read: {error}")


def read(directory: Path, name: str, files: Mapping[str, FileDigest]) -> bytes:
    """A file whose digest is what its manifest says."""
    try:
        data = (directory / name).read_bytes()
    except FileNotFoundError:
        damaged(directory, name, "is missing")
    except OSError as error:
        damaged(directory, name, f"cannot be read: {error}")
    _compare(directory, name, files, FileDigest(sha256(data).hexdigest(), len(data)))
    return data


class Verified:
    """Compares large files with their digests, once for as long as their inode, size and times stay the same."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._known: dict[tuple[Path, FileDigest], tuple[int, int, int, int]] = {}

    def check(self, directory: Path, name: str, files: Mapping[str, FileDigest]) -> Path:
        """The file's path. Raises `Failed` (``snapshot.damaged``)."""
        path, key = directory / name, (directory / name, _expected(directory, name, files))
        with self._lock:
            try:
                found = path.stat(follow_symlinks=False)
                signature = found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
                if self._known.get(key) != signature:
                    _compare(directory, name, files, digest(path))
                    self._known[key] = signature
            except FileNotFoundError:
                damaged(directory, name, "is missing")
        return path


def damaged(directory: Path, name: str, how: str) -> NoReturn:
    """Raise ``snapshot.damaged``."""
    raise Failed(
        "snapshot.damaged", f"{directory / name} {how}", hint="what it held is lost; start the instance anew: --force",
        file=name,
    )  # fmt: skip


def _last_line(manifest: SnapshotManifest) -> bytes:
    return manifest.id.encode() + b"\n"


def _expected(directory: Path, name: str, files: Mapping[str, FileDigest]) -> FileDigest:
    if name not in files:
        damaged(directory, MANIFEST, f"does not list {name}")
    return files[name]


def _compare(directory: Path, name: str, files: Mapping[str, FileDigest], found: FileDigest) -> None:
    expected = _expected(directory, name, files)
    if found.size != expected.size:
        damaged(directory, name, f"has {found.size} bytes instead of {expected.size}")
    if found != expected:
        damaged(directory, name, "differs from its manifest")


def _failed(subject: Path, error: OSError) -> Failed:
    message = f"{error.filename or subject}: {error.strerror}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Failed("disk.full", message, hint="free some space in the state directory's file system")
    return Failed("storage.failed", message, hint="are the state directory's files the node's own?")
