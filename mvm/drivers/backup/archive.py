"""A backup as a file: a tar archive within one zstd frame, holes left out, and the digest of all of it at its end.

GNU tar reads it (``tar --zstd -xf``): times are PAX headers with nanoseconds, files with holes are in GNU's sparse
format 1.0. The first member says what the backup is, the last one lists the files with their digests. Behind the frame
comes a frame that zstd skips, with the sha256 of all bytes before it.
"""

from __future__ import annotations

import errno
import io
import json
import os
import stat
import struct
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import zstandard

from mvm.domain.backup import About, Entry, manifest, read_manifest
from mvm.errors import Failed, InvalidInput, NotFound

ABOUT, LIST = "MVM-BACKUP", "MVM-FILES"
Progress = Callable[[int], None]  # bytes that are done
Extents = list[tuple[int, int]]  # offset and length in bytes
_LEVEL = 3
_PIECE = 1 << 20
_BLOCK = tarfile.BLOCKSIZE
_SKIPPED = struct.Struct("<II32s")  # magic, length, sha256
_MAGIC = 0x184D2A5A
_MOST = 1 << 28  # the list of a million files


class Member(NamedTuple):
    """A file of a backup while it is read: `pieces` are the contents of its `extents`, each with its offset."""

    name: str
    size: int
    mode: int
    mtime_ns: int
    extents: Extents
    pieces: Iterator[tuple[int, bytes]]


class Writer:
    """Writes a backup to `file`; what it holds is complete once `close` has returned."""

    def __init__(self, file: IO[bytes], about: About) -> None:
        self._out = _Hashing(file)
        packing = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True, threads=-1)
        self._tar = packing.stream_writer(self._out, closefd=False)  # type: ignore[arg-type]
        self._entries: dict[str, Entry] = {}
        self._plain(ABOUT, about.to_json())

    def add(self, name: str, path: Path, *, size: int | None = None, progress: Progress = lambda _: None) -> None:
        """The file at `path`, or its first `size` bytes. Raises `OSError`; a link is not followed."""
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(fd, "rb", buffering=0) as file:
            found = os.fstat(fd)
            length = found.st_size if size is None else size
            extents = _extents(fd, length)
            info = tarfile.TarInfo(name)
            info.mode = stat.S_IMODE(found.st_mode)
            info.pax_headers = {"mtime": f"{found.st_mtime_ns // 10**9}.{found.st_mtime_ns % 10**9:09}"}
            head = _describe(info, extents, length)
            self._tar.write(info.tobuf(tarfile.PAX_FORMAT) + head)
            digest = _digest(extents)
            for start, count in extents:
                file.seek(start)
                for piece in _exactly(file, count, path):
                    digest.update(piece)
                    self._tar.write(piece)
                    progress(len(piece))
            self._tar.write(bytes(-info.size % _BLOCK))
            self._entries[name] = Entry(length, info.mode, found.st_mtime_ns, digest.hexdigest())

    def close(self) -> None:
        """The list of files, the end, and the digest."""
        self._plain(LIST, manifest(self._entries))
        self._tar.write(bytes(2 * _BLOCK))
        self._tar.close()  # type: ignore[no-untyped-call]
        self._out.file.write(_SKIPPED.pack(_MAGIC, 32, self._out.digest.digest()))

    def _plain(self, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(data), 0o600
        self._tar.write(info.tobuf(tarfile.PAX_FORMAT) + data + bytes(-len(data) % _BLOCK))


def check(path: Path, progress: Progress = lambda _: None) -> tuple[About, dict[str, Entry]]:
    """What the backup at `path` says of itself, once all of it was read and found whole.

    Raises `Failed` (``backup.damaged``), `NotFound` (``backup.not_found``), and what `About.from_json` does.
    """
    with _opened(path) as file, _translated(path):
        _check_digest(file, progress)
        about, members = _members(file)
        found = {member.name: _entry(member) for member in members}
        if members.listed is None or found != members.listed:
            raise ValueError("its files are not those that it lists")
        return about, found


def extract(path: Path, into: Path, progress: Progress = lambda _: None) -> None:
    """The files of a backup that was found whole are below `into`, on the disk, with their times."""
    with _opened(path) as file, _translated(path):
        for member in _members(file)[1]:
            _extract(member, _inside(into, member.name), progress)


class _Hashing(io.RawIOBase):
    """Writes through, and has the digest of what was written."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.digest = sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self.file.write(data)


class _Members:
    """The files within the archive; after the last one `listed` is what it says that they are."""

    def __init__(self, archive: tarfile.TarFile) -> None:
        self._archive = archive
        self.listed: dict[str, Entry] | None = None

    def __iter__(self) -> Iterator[Member]:
        while (info := self._archive.next()) is not None:
            if self.listed is not None or not info.isreg():
                raise ValueError(f"{info.name!r} has no place in it")
            if info.name == LIST:
                self.listed = read_manifest(_content(self._archive, info))
            else:
                yield _member(self._archive, info)


class _Limited(io.RawIOBase):
    """A file without its last bytes: the digest."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._left = os.fstat(file.fileno()).st_size - _SKIPPED.size
        file.seek(0)

    def readable(self) -> bool:
        return True

    def read(self, count: int = -1) -> bytes:
        data = self._file.read(max(0, self._left if count < 0 else min(count, self._left)))
        self._left -= len(data)
        return data


def _check_digest(file: IO[bytes], progress: Progress) -> None:
    limited, digest = _Limited(file), sha256()
    while piece := limited.read(_PIECE):
        digest.update(piece)
        progress(len(piece))
    if file.read() != _SKIPPED.pack(_MAGIC, 32, digest.digest()):
        raise ValueError("it is not as it was written, or not all of it is there")


class _Forward:
    """What is unpacked, as a file in which one only goes forward: a tar archive's members are read in their order."""

    def __init__(self, file: IO[bytes]) -> None:
        self._unpacked = zstandard.ZstdDecompressor().stream_reader(_Limited(file))  # type: ignore[arg-type]
        self._at = 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def read(self, count: int) -> bytes:
        pieces = []
        while count and (piece := self._unpacked.read(count)):
            pieces.append(piece)
            count -= len(piece)
            self._at += len(piece)
        return b"".join(pieces)

    def seek(self, to: int) -> int:
        if to < self._at:
            raise ValueError("its members are out of order")
        while self._at < to and self.read(min(to - self._at, _PIECE)):
            pass
        return self._at


def _members(file: IO[bytes]) -> tuple[About, _Members]:
    archive = tarfile.open(fileobj=cast("IO[bytes]", _Forward(file)), mode="r:")  # noqa: SIM115
    first = archive.next()
    if first is None or first.name != ABOUT:
        raise ValueError("it is no backup of mvm")
    return About.from_json(_content(archive, first)), _Members(archive)


def _content(archive: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    if info.size > _MOST:
        raise ValueError(f"{info.name} has {info.size} bytes")
    file = archive.extractfile(info)
    return b"" if file is None else file.read()


def _member(archive: tarfile.TarFile, info: tarfile.TarInfo) -> Member:
    whole, _, fraction = info.pax_headers.get("mtime", "0").partition(".")
    mtime_ns = int(whole) * 10**9 + int(fraction.ljust(9, "0")[:9])
    sparse: Extents | None = getattr(info, "sparse", None)
    extents = [(0, info.size)] if sparse is None else sparse
    extents = [(start, count) for start, count in extents if count]
    return Member(info.name, info.size, info.mode, mtime_ns, extents, _pieces(archive, info, extents))


def _pieces(archive: tarfile.TarFile, info: tarfile.TarInfo, extents: Extents) -> Iterator[tuple[int, bytes]]:
    file = archive.extractfile(info)
    assert file is not None, "it is a regular file"
    for start, count in extents:
        file.seek(start)
        at = start
        for piece in _exactly(file, count, Path(info.name)):
            yield at, piece
            at += len(piece)


def _entry(member: Member) -> Entry:
    """What the list has to say of it."""
    digest = _digest(member.extents)
    for _, piece in member.pieces:
        digest.update(piece)
    return Entry(member.size, member.mode, member.mtime_ns, digest.hexdigest())


def _extract(member: Member, path: Path, progress: Progress) -> None:
    """A new file, with its holes, on the disk."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, member.size)
        for at, piece in member.pieces:
            written = 0
            while written < len(piece):
                written += os.pwrite(fd, piece[written:], at + written)
            progress(len(piece))
        os.fchmod(fd, member.mode & 0o700)
        os.utime(fd, ns=(member.mtime_ns, member.mtime_ns))
        os.fsync(fd)
    finally:
        os.close(fd)


def _inside(root: Path, name: str) -> Path:
    """Where the file `name` goes, whose directory exists then. Raises `ValueError` for one that leads elsewhere."""
    path = root / name
    if not name or name.startswith("/") or ".." in path.parts:
        raise ValueError(f"{name!r} leads out of it")
    for directory in reversed(path.parents[: len(path.relative_to(root).parts) - 1]):
        directory.mkdir(mode=0o700, exist_ok=True)
    return path


def _extents(fd: int, size: int) -> Extents:
    """Where the first `size` bytes of a file have data, as far as its file system tells."""
    found: Extents = []
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole until its end
                break
            raise
        end = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        if start < size:
            found.append((start, end - start))
        at = end if start < size else size
    return found


def _describe(info: tarfile.TarInfo, extents: Extents, size: int) -> bytes:
    """`info` tells a file of `size` bytes with these extents; the map of its holes, if it has any."""
    stored = sum(count for _, count in extents)
    if stored == size:
        info.size = size
        return b""
    ends = extents and sum(extents[-1]) == size
    told = extents if ends else [*extents, (size, 0)]  # else GNU tar would not make the last hole
    numbers = [len(told), *(number for extent in told for number in extent)]
    head = "".join(f"{number}\n" for number in numbers).encode()
    head += bytes(-len(head) % _BLOCK)
    sparse = {"major": "1", "minor": "0", "name": info.name, "realsize": str(size)}
    info.pax_headers = {**info.pax_headers, **{f"GNU.sparse.{name}": value for name, value in sparse.items()}}
    info.size = len(head) + stored
    return head


def _digest(extents: Extents) -> Any:
    """Of where a file has data; what the data are comes next."""
    return sha256(json.dumps([list(extent) for extent in extents]).encode())


def _exactly(file: IO[bytes], count: int, path: Path) -> Iterator[bytes]:
    while count:
        piece = file.read(min(count, _PIECE))
        if not piece:
            raise OSError(errno.EIO, "it became shorter while it was read", str(path))
        count -= len(piece)
        yield piece


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # it is read twice, and has an end
            raise Failed(
                "backup.unreadable", f"{path} is not a regular file", hint="give a file that backup create has made",
                path=str(path),
            )  # fmt: skip
        file = path.open("rb")
    except FileNotFoundError:
        raise NotFound(
            "backup.not_found", f"there is no backup {path}", hint="to make one: mvm backup create FILE", path=str(path)
        ) from None
    except OSError as error:
        raise Failed(
            "backup.unreadable", f"{path}: {error.strerror}", hint="give a file that you may read", path=str(path)
        ) from None
    with file:
        yield file


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    """Whatever is wrong with what is read is damage."""
    try:
        yield
    except (ValueError, EOFError, tarfile.TarError, zstandard.ZstdError, InvalidInput) as error:
        raise Failed(
            "backup.damaged", f"the backup {path} is damaged: {error}", hint="use another one; nothing was changed",
            path=str(path),
        ) from None  # fmt: skip
