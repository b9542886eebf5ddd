"""Named network namespaces, and a thread's visit to one."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mvm.errors import Failed, Forbidden, InvalidInput, NotFound
from mvm.ports.shell import Shell

_DIRECTORY = Path("/run/netns")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_CLONE_NEWNET = 0x40000000
_BRIDGE_NETFILTER = ("bridge-nf-call-iptables", "bridge-nf-call-ip6tables", "bridge-nf-call-arptables")
_libc = ctypes.CDLL(None, use_errno=True)


def path_of(name: str) -> Path:
    """Where the namespace `name` can be opened. Raises `InvalidInput` (``netns.invalid_name``)."""
    if not _NAME.fullmatch(name):
        raise InvalidInput(
            "netns.invalid_name", f"{name!r} is no name for a network namespace",
            hint="allowed: 1 to 64 of letters, digits, _, . and -, beginning with a letter or digit",
            field="netns", value=name[:80],
        )  # fmt: skip
    return _DIRECTORY / name


def exists(name: str) -> bool:
    """Whether there is a namespace `name`; a file left over from one is none."""
    return os.path.ismount(path_of(name))


def names(prefix: str) -> list[str]:
    """Those there are whose names begin so."""
    try:
        return sorted(path.name for path in _DIRECTORY.iterdir() if path.name.startswith(prefix))
    except FileNotFoundError:
        return []


def create(shell: Shell, name: str) -> bool:
    """The namespace `name` exists and its loopback is up; returns whether it was made here and now.

    In one made here nothing is forwarded between interfaces until somebody says so, and frames that stay within a
    bridge are none of IP's business; another's is left as it is.
    Raises `Failed` (``shell.failed``).
    """
    made = not exists(name)
    if made:
        path_of(name).unlink(missing_ok=True)  # what a crash left: a file without a namespace
        shell.run(["ip", "netns", "add", name])
    try:
        if made:
            with entered(path_of(name)):
                Path("/proc/sys/net/ipv4/ip_forward").write_text("0")
                keep_bridged_frames_from_ip()
        shell.run(["ip", "-n", name, "link", "set", "lo", "up"])
    except BaseException:
        if made:
            delete(shell, name)
        raise
    return made


def keep_bridged_frames_from_ip() -> None:
    """In the calling thread's namespace IP's filters and the table of connections see only what leaves a bridge.

    Where the kernel has no bridge netfilter that is so anyway.
    """
    for name in _BRIDGE_NETFILTER:
        with suppress(FileNotFoundError):
            Path("/proc/sys/net/bridge", name).write_text("0")


def delete(shell: Shell, name: str) -> None:
    """The namespace `name` is gone; the kernel keeps its interfaces until the last process in it has ended."""
    if exists(name):
        shell.run(["ip", "netns", "delete", name])


@contextmanager
def entered(path: Path) -> Iterator[None]:
    """Run the calling thread (and what it starts) in the network namespace at `path`, then where it was before.

    Raises `NotFound` (``netns.not_found``), `Forbidden` (``netns.forbidden``) without the right to, and `Failed`
    (``netns.failed``) for a path that is no network namespace.
    """
    former = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            target = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise _error(path, error.errno) from None
        try:
            _enter(target, path)
        finally:
            os.close(target)
        try:
            yield
        finally:
            _enter(former, path)
    finally:
        os.close(former)


def socket_in(path: Path | None, family: int, kind: int) -> socket.socket:
    """A socket that belongs to the namespace at `path`; None: to the caller's."""
    if path is None:
        return socket.socket(family, kind)
    with entered(path):
        return socket.socket(family, kind)


def of_parent() -> Path | None:
    """The parent process's namespace; None when it is our own.

    The stack's parts run in a namespace of their own, their parent (the supervisor) in the host's.
    """
    outside = Path(f"/proc/{os.getppid()}/ns/net")
    return None if outside.readlink() == Path("/proc/thread-self/ns/net").readlink() else outside


def _enter(fd: int, path: Path) -> None:
    if _libc.setns(fd, _CLONE_NEWNET) != 0:
        raise _error(path, ctypes.get_errno())


def _error(path: Path, number: int | None) -> NotFound | Forbidden | Failed:
    message = f"network namespace {path}: {os.strerror(number or 0)}"
    if number in (errno.ENOENT, errno.ENOTDIR):
        return NotFound("netns.not_found", message, hint="is the stack up? see: mvm status", path=str(path))
    if number in (errno.EPERM, errno.EACCES):
        return Forbidden("netns.forbidden", message, hint="run it as root", path=str(path))
    return Failed("netns.failed", message, hint="see: ip netns list", path=str(path))
