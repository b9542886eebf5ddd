"""`AuditLog` over files: ``<tenant>/000001.jsonl`` and on. Only the last one grows."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from mvm.domain import lock_names
from mvm.domain.ids import TenantId
from mvm.drivers.files import sync
from mvm.errors import Failed
from mvm.ports.locks import Locks

ROTATE_BYTES = 16 << 20
_BLOCK = 1 << 16
_HOLD_S = 30.0


class FileAuditLog:
    """ports/audit.py. A file that has reached `rotate_bytes` is left as it is; the next entry begins another."""

    def __init__(self, directory: Path, locks: Locks, *, rotate_bytes: int = ROTATE_BYTES) -> None:
        self._directory = directory
        self._locks = locks
        self._rotate_bytes = rotate_bytes

    @contextmanager
    def hold(self, tenant: TenantId) -> Iterator[FileTrail]:
        """See ports/audit.py."""
        with self._locks.hold(lock_names.trail(tenant), deadline_s=_HOLD_S):
            yield FileTrail(self._directory / tenant, self._rotate_bytes)


class FileTrail:
    """ports/audit.py over the files of one directory."""

    def __init__(self, directory: Path, rotate_bytes: int) -> None:
        self._directory = directory
        self._rotate_bytes = rotate_bytes

    def append(self, lines: Sequence[str]) -> None:
        """See ports/audit.py."""
        with _translated(self._directory):
            for directory in (self._directory.parent, self._directory):
                directory.mkdir(exist_ok=True, mode=0o700)
            path = self._last()
            if path is not None:
                whole = _end(path, 0)[1]
                if path.stat().st_size != whole:
                    os.truncate(path, whole)
                if whole >= self._rotate_bytes:
                    path = None
            self._write(path or self._next(), "".join(f"{line}\n" for line in lines).encode("ascii"))

    def _write(self, path: Path, data: bytes) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            before = os.fstat(fd).st_size
            try:
                _write_all(fd, data)
                os.fsync(fd)
            except OSError:
                with suppress(OSError):  # else the next append cuts it off
                    os.ftruncate(fd, before)
                raise
        finally:
            os.close(fd)
        if not before:
            for directory in (self._directory, self._directory.parent, self._directory.parent.parent):
                sync(directory)

    def tail(self, count: int) -> Sequence[bytes]:
        """See ports/audit.py."""
        found: list[bytes] = []
        with _translated(self._directory):
            for path in reversed(self._paths()):
                if len(found) >= count:
                    break
                found = [*_end(path, count - len(found))[0], *found]
        return found

    def half(self) -> bytes:
        """See ports/audit.py."""
        with _translated(self._directory):
            path = self._last()
            if path is None:
                return b""
            with path.open("rb") as file:
                file.seek(_end(path, 0)[1])
                return file.read()

    def files(self) -> Iterator[tuple[str, bytes]]:
        """See ports/audit.py."""
        with _translated(self._directory):
            for path in self._paths():
                yield path.name, path.read_bytes()

    def _paths(self) -> list[Path]:
        return sorted(self._directory.glob("*.jsonl"))

    def _last(self) -> Path | None:
        return max(self._paths(), default=None)

    def _next(self) -> Path:
        last = self._last()
        return self._directory / f"{int(last.stem) + 1 if last else 1:06d}.jsonl"


def _end(path: Path, count: int) -> tuple[list[bytes], int]:
    """The last `count` whole lines of a file, and where the last of them ends."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        block = _BLOCK
        while True:
            start = max(0, size - block)
            file.seek(start)
            *lines, half = file.read().split(b"\n")
            if start and lines:
                lines = lines[1:]  # it began before what was read
            elif start:
                lines = []
            if not start or len(lines) >= max(count, 1):
                return (lines[-count:] if count else []), size - len(half)
            block *= 4


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


@contextmanager
def _translated(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise Failed(
            "disk.full" if full else "audit.failed", f"the audit trail in {directory}: {error.strerror}",
            hint="free some space" if full else "look at the directory's permissions and the disk",
        ) from None  # fmt: skip
