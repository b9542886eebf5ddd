"""Named network namespaces."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mvm.errors import Failed
from mvm.ports.shell import Shell

_CLONE_NEWNET = 0x40000000


def path_of(name: str) -> Path:
    """Where a named namespace is mounted."""
    return Path("/run/netns") / name


def exists(name: str) -> bool:
    """Whether there is such a namespace."""
    return os.path.ismount(path_of(name))


def create(shell: Shell, name: str) -> None:
    """The namespace exists, with its loopback up."""
    if not exists(name):
        shell.run(["ip", "netns", "add", name])
    shell.run(["ip", "-n", name, "link", "set", "lo", "up"])


def delete(shell: Shell, name: str) -> None:
    """The name is gone, and the namespace with its last process."""
    if path_of(name).exists():
        shell.run(["ip", "netns", "delete", name])


@contextmanager
def inside(path: Path | None) -> Iterator[None]:
    """Run the calling thread inside the namespace at `path` (None: where it is) and return to the former one."""
    if path is None:
        yield
        return
    with Path("/proc/thread-self/ns/net").open() as former:
        try:
            with path.open() as target:
                _setns(target.fileno(), path)
        except OSError as error:
            raise Failed("netns.missing", f"network namespace {path}: {error.strerror}") from None
        try:
            yield
        finally:
            _setns(former.fileno(), path)


def _setns(fd: int, path: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, _CLONE_NEWNET):
        raise Failed("netns.refused", f"cannot enter network namespace {path}: {os.strerror(ctypes.get_errno())}")


def is_used(name: str) -> bool:
    """Whether any process lives in the namespace."""
    wanted = path_of(name).stat()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                found = (entry / "ns/net").stat()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                return True
    return False
