"""The cage around a QEMU process: what it is started in, as a list of system calls. Pure but for `capabilities`.

The launcher that makes these calls is a program of its own for every start (`mvm.drivers.syscalls`), which ends by
becoming QEMU. It is run as the first process of a new PID namespace (`alone`).
"""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from mvm.domain.pool import SeccompPolicy
from mvm.drivers.qemu import argv, seccomp
from mvm.drivers.syscalls import ARGUMENTS, FIRST, Call, Record, in_memory, program, text
from mvm.errors import Failed
from mvm.ports.cgroup import GroupLimits

KERNEL, INITRAMFS = Path("/kernel"), Path("/initramfs")
_LIBRARIES = (Path("/usr/lib/x86_64-linux-gnu"), Path("/usr/share/qemu"), Path("/usr/share/seabios"))
_LOADER_CACHE = Path("/etc/ld.so.cache")
_AT = "/proc"  # where the cage is put together: nothing that goes into it comes from there

_CLOSE, _MOUNT, _UMOUNT, _PIVOT, _CHDIR, _MKDIR, _MKNOD, _SYMLINK = 3, 165, 166, 155, 80, 83, 133, 88
_UNSHARE, _SETHOSTNAME, _PRCTL, _PRLIMIT, _UMASK, _WRITE = 272, 170, 157, 302, 95, 1
_SETGROUPS, _SETRESUID, _SETRESGID, _CAPSET, _SECCOMP, _EXECVE, _CHOWN = 116, 117, 119, 126, 317, 59, 92

_RDONLY, _NOSUID, _NODEV, _NOEXEC, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
_DETACH = 2
_NEWNS, _NEWCGROUP, _NEWUTS, _NEWIPC, _NEWPID, _NEWNET = (
    0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x20000000, 0x40000000,
)  # fmt: skip
_CAPBSET_DROP, _SET_SECUREBITS, _SET_NO_NEW_PRIVS, _CAP_AMBIENT, _CAP_AMBIENT_CLEAR_ALL = 24, 28, 38, 47, 4
# No root, no fixups, no kept capabilities, no ambient ones; all locked.
_SECUREBITS = 0b1110_1111
_CAPABILITY_VERSION = 0x20080522
_LIMITS = {"core": 4, "nproc": 6, "nofile": 7, "memlock": 8, "msgqueue": 12, "nice": 13, "rtprio": 14}
_FILES = 256
_OVERHEAD_MIB = 160  # of QEMU itself: 64 for translated code, about 40 for the rest, and its files in the page cache
_SPARE_CPUS = 0.5  # for its main loop beside the guest's CPUs
_THREADS = 96  # QEMU's pool for its disks has up to 64

_NULL = os.makedev(1, 3)

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Cage:
    """What differs from VMM to VMM. `files` are shown in it, read-only, by their names there.

    `join` are descriptors of cgroups' lists of processes, `devices` numbers of devices that it may open.
    """

    uid: int
    policy: SeccompPolicy
    vcpus: int
    files: Mapping[Path, Path]
    join: Sequence[int] = ()
    devices: Mapping[str, int] = field(default_factory=dict)


def limits(mem_mib: int, vcpus: int) -> GroupLimits:
    """What the VMM of such a guest may use of the host at most."""
    return GroupLimits(mem_mib + _OVERHEAD_MIB, vcpus + _SPARE_CPUS, _THREADS + vcpus)


def executable(cage: Cage) -> int:
    """A descriptor of the launcher for `cage`, ready to be run."""
    return in_memory(launcher(cage, capabilities=capabilities(), binary=qemu()))


def launcher(cage: Cage, *, capabilities: int, binary: Path) -> bytes:
    """The program that goes into `cage` and becomes `binary`, with the arguments that it was given itself."""
    name = text(str(binary))
    calls = [
        *_joined(cage.join),
        *_apart(),
        *_sight(cage, binary),
        *_limits(cage),
        *_powerless(cage.uid, capabilities),
        *_filtered(cage.policy),
    ]
    return program([*calls, Call(f"start {binary}", _EXECVE, (name, ARGUMENTS, bytes(8)))], first=name)


def _joined(descriptors: Sequence[int]) -> Iterator[Call]:
    """First of all, so that whatever it uses is counted."""
    for fd in descriptors:
        yield Call("join its cgroup", _WRITE, (fd, b"0", 1))
        yield Call("close its cgroup", _CLOSE, (fd,))


def _apart() -> Iterator[Call]:
    flags = _NEWNS | _NEWCGROUP | _NEWUTS | _NEWIPC | _NEWNET
    yield Call("unshare its namespaces", _UNSHARE, (flags,))
    yield Call("name itself", _SETHOSTNAME, (b"vmm", 3))
    yield Call("mount nothing outside", _MOUNT, (text("none"), text("/"), 0, _REC | _PRIVATE, 0))


def _sight(cage: Cage, binary: Path) -> Iterator[Call]:
    """A root of its own with what it needs, read-only."""
    yield Call("make what is readable", _UMASK, (0,))  # whatever the node's umask is
    yield _mount("cage", _AT, "tmpfs", _NOSUID | _NOEXEC, "mode=755,size=64k,nr_inodes=64")
    shown = {binary: binary, **{each: each for each in (*_LIBRARIES, _LOADER_CACHE)}, **cage.files}
    made: set[Path] = {Path("/")}
    for inside, outside in shown.items():
        for directory in (*reversed(inside.parents), *((inside,) if outside in _LIBRARIES else ())):
            if directory not in made:
                made.add(directory)
                yield Call(f"make {directory}", _MKDIR, (text(f"{_AT}{directory}"), 0o755))
        if outside not in _LIBRARIES:
            yield Call(f"make {inside}", _MKNOD, (text(f"{_AT}{inside}"), 0o100400, 0))
        yield Call(f"show {outside}", _MOUNT, (text(str(outside)), text(f"{_AT}{inside}"), 0, _BIND, 0))
        flags = _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV | (_NOEXEC if inside in cage.files else 0)
        yield Call(f"protect {inside}", _MOUNT, (0, text(f"{_AT}{inside}"), 0, flags, 0))
    for link in ("lib", "lib64"):
        target = "usr/lib" if link == "lib" else "usr/lib/x86_64-linux-gnu"
        yield Call(f"link {link}", _SYMLINK, (text(target), text(f"{_AT}/{link}")))
    yield Call("make /dev", _MKDIR, (text(f"{_AT}/dev"), 0o755))
    # By opening it QEMU finds out whether the kernel has the locks that it puts on its disks; else it takes none.
    yield Call("make /dev/null", _MKNOD, (text(f"{_AT}/dev/null"), 0o020666, _NULL))
    for name, number in cage.devices.items():
        path = text(f"{_AT}/dev/{name}")
        yield Call(f"make /dev/{name}", _MKNOD, (path, 0o020600, number))
        yield Call(f"give /dev/{name}", _CHOWN, (path, cage.uid, cage.uid))
    yield Call("make /proc", _MKDIR, (text(f"{_AT}/proc"), 0o555))
    yield Call("go there", _CHDIR, (text(_AT),))
    yield Call("take it for root", _PIVOT, (text("."), text(".")))
    yield Call("leave the host's files", _UMOUNT, (text("."), _DETACH))
    yield Call("go to the root", _CHDIR, (text("/"),))
    yield _mount("proc", "/proc", "proc", _NOSUID | _NODEV | _NOEXEC, "subset=pid")
    flags = _REMOUNT | _RDONLY | _NOSUID | _NOEXEC
    yield Call("protect the root", _MOUNT, (0, text("/"), 0, flags, 0))


def _limits(cage: Cage) -> Iterator[Call]:
    for name, number in _LIMITS.items():
        most = {"nofile": _FILES, "nproc": _THREADS + cage.vcpus}.get(name, 0)
        yield Call(f"limit {name}", _PRLIMIT, (0, number, struct.pack("<QQ", most, most), 0))
    yield Call("set its umask", _UMASK, (0o077,))


def _powerless(uid: int, capabilities: int) -> Iterator[Call]:
    yield Call("lock securebits", _PRCTL, (_SET_SECUREBITS, _SECUREBITS, 0, 0, 0))
    for number in range(capabilities):
        yield Call(f"drop capability {number}", _PRCTL, (_CAPBSET_DROP, number, 0, 0, 0))
    yield Call("drop ambient capabilities", _PRCTL, (_CAP_AMBIENT, _CAP_AMBIENT_CLEAR_ALL, 0, 0, 0))
    yield Call("leave its groups", _SETGROUPS, (0, 0))
    yield Call("change its group", _SETRESGID, (uid, uid, uid))
    yield Call("change its user", _SETRESUID, (uid, uid, uid))
    yield Call("drop capabilities", _CAPSET, (struct.pack("<II", _CAPABILITY_VERSION, 0), bytes(24)))
    yield Call("gain no privileges", _PRCTL, (_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def _filtered(policy: SeccompPolicy) -> Iterator[Call]:
    rules = seccomp.inherited(policy, FIRST)  # where `launcher` has the name of the program
    yield Call("filter its calls", _SECCOMP, (1, 0, Record((struct.pack("<Q", len(rules) // 8),), (rules,))))


def _mount(source: str, at: str, kind: str, flags: int, options: str) -> Call:
    return Call(f"mount {kind}", _MOUNT, (text(source), text(at), text(kind), flags, text(options)))


@cache
def qemu() -> Path:
    """Where QEMU is installed. Raises `Failed` (``shell.missing``)."""
    found = shutil.which(argv.BINARY)
    if found is None:
        raise Failed("shell.missing", f"there is no program {argv.BINARY}", hint=f"install {argv.BINARY}")
    return Path(found).resolve()


@cache
def capabilities() -> int:
    """How many this kernel knows."""
    return int(Path("/proc/sys/kernel/cap_last_cap").read_text()) + 1


@contextmanager
def alone() -> Iterator[None]:
    """What the calling thread starts in this block is the first in a PID namespace of its own. One process, no thread.

    Raises `Failed` (``cage.failed``).
    """
    own = os.open("/proc/thread-self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_libc.unshare(_NEWPID))
        try:
            yield
        finally:
            _check(_libc.setns(own, _NEWPID))
    finally:
        os.close(own)


def _check(result: int) -> None:
    if result != 0:
        raise Failed("cage.failed", f"no PID namespace: {os.strerror(ctypes.get_errno())}", hint="mvm doctor")
