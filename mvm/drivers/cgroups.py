"""`Cgroups` of Linux: version 2, or version 1 for the controllers that version 2 does not have.

A host may have both mounted at once. Groups are ``<mount>/mvm-<state directory's hash>/<tenant>.<pool>.<instance>``.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mvm.domain.ids import InstanceRef
from mvm.drivers.files import closing_fd
from mvm.errors import Failed, InvalidInput, TimedOut
from mvm.ports.cgroup import GroupLimits

CONTROLLERS = ("memory", "cpu", "pids")
_MOUNTS = Path("/proc/self/mountinfo")
_PERIOD_US = 100_000
_GONE_S = 10.0
_TRY_AGAIN_S = 0.005  # the kernel tells nobody when a group has become empty
_ESCAPED = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """Where groups of one kind are made."""

    version: int
    mount: Path


def choose(mountinfo: str, of_version_2: Mapping[Path, Iterable[str]]) -> Mapping[str, Hierarchy]:
    """Each controller's hierarchy, of those that are mounted; version 2 where it has the controller.

    `of_version_2` tells which controllers the version 2 mounts have.
    """
    found: dict[str, Hierarchy] = {}
    for kind, mount, options in _cgroup_mounts(mountinfo):
        names = of_version_2.get(mount, ()) if kind == "cgroup2" else options
        for name in set(names) & set(CONTROLLERS):
            if kind == "cgroup2" or name not in found:
                found[name] = Hierarchy(2 if kind == "cgroup2" else 1, mount)
    return found


def version_2_mounts(mountinfo: str) -> Sequence[Path]:
    """Where version 2 is mounted."""
    return [mount for kind, mount, _ in _cgroup_mounts(mountinfo) if kind == "cgroup2"]


def settings(version: int, controller: str, limits: GroupLimits) -> Mapping[str, str]:
    """The files that limit one controller, and their content. What a kernel does not have is told by a ``?``."""
    quota, cpus = round(limits.cpus * _PERIOD_US), max(1, int(limits.cpus))
    size = str(limits.memory_mib << 20)
    if controller == "pids":
        return {"pids.max": str(limits.pids)}
    if controller == "cpu" and version == 1:
        return {"cpu.cfs_period_us": str(_PERIOD_US), "cpu.cfs_quota_us": str(quota), "cpu.shares": str(1024 * cpus)}
    if controller == "cpu":
        return {"cpu.max": f"{quota} {_PERIOD_US}", "cpu.weight": str(min(10_000, 100 * cpus))}
    if version == 1:
        return {"memory.limit_in_bytes": size, "memory.memsw.limit_in_bytes?": size}
    return {"memory.max": size, "memory.swap.max?": "0", "memory.oom.group": "1"}


class LinuxCgroups:
    """See ports/cgroup.py. `mark` tells this state directory's groups from others'."""

    def __init__(self, mark: str, *, mountinfo: Path = _MOUNTS) -> None:
        self._mark = mark
        self._mountinfo = mountinfo
        self._lock = threading.Lock()
        self._found: tuple[Mapping[str, Hierarchy], Mapping[str, str]] | None = None

    def missing(self) -> Mapping[str, str]:
        """See ports/cgroup.py."""
        return self._hierarchies()[1]

    @contextmanager
    def joining(self, ref: InstanceRef, limits: GroupLimits) -> Iterator[Sequence[int]]:
        """See ports/cgroup.py."""
        with ExitStack() as stack:
            with _translated(ref):
                if not all(parent.is_dir() for parent in self._parents()):  # another process's `close`
                    self._found = None
                paths = self._paths(ref)
                for path in paths:
                    _remove_empty(path)
                    path.mkdir()
                for name, hierarchy in self._usable.items():
                    for file, value in settings(hierarchy.version, name, limits).items():
                        with suppress(FileNotFoundError) if file.endswith("?") else ExitStack():
                            _write(hierarchy.mount / self._mark / _name(ref) / file.removesuffix("?"), value)
                fds = [os.open(path, os.O_WRONLY | os.O_CLOEXEC) for path in self._doors(ref)]
                for fd in fds:
                    stack.callback(os.close, fd)
            yield fds

    def remove(self, ref: InstanceRef) -> None:
        """See ports/cgroup.py."""
        end = time.monotonic() + _GONE_S
        with _translated(ref):
            for path in self._paths(ref):
                while not _remove_empty(path):
                    _kill(path)
                    if time.monotonic() > end:
                        raise TimedOut("cgroup.busy", f"the processes in {path} do not end", hint=f"see: {path}")
                    threading.Event().wait(_TRY_AGAIN_S)

    def out_of_memory(self, ref: InstanceRef) -> int:
        """See ports/cgroup.py."""
        hierarchy = self._usable.get("memory")
        if hierarchy is None:
            return 0
        file = "memory.events" if hierarchy.version == 2 else "memory.oom_control"
        words = _words(hierarchy.mount / self._mark / _name(ref) / file)
        return int(words[words.index("oom_kill") + 1]) if "oom_kill" in words else 0

    def groups(self) -> frozenset[InstanceRef]:
        """See ports/cgroup.py. Directories that no instance could have are passed over."""
        found = set()
        for parent in self._parents():
            for name in [entry.name for entry in os.scandir(parent) if entry.is_dir(follow_symlinks=False)]:
                with suppress(InvalidInput):
                    found.add(InstanceRef.parse(name.replace(".", "/")))
        return frozenset(found)

    def close(self) -> None:
        """Nothing is left of this state directory's groups when they are all gone; they are made again when needed."""
        with self._lock:
            self._found = None
        for mount in {hierarchy.mount for hierarchy in self._choose().values()}:
            with suppress(OSError):
                (mount / self._mark).rmdir()

    def kinds(self) -> Mapping[str, str]:
        """Which hierarchy each controller is taken from, for people."""
        return {name: f"version {found.version} at {found.mount}" for name, found in self._usable.items()}

    @property
    def _usable(self) -> Mapping[str, Hierarchy]:
        return self._hierarchies()[0]

    def _hierarchies(self) -> tuple[Mapping[str, Hierarchy], Mapping[str, str]]:
        """What can be used, where groups of this state directory now can be made; and what cannot, and why."""
        with self._lock:
            if self._found is None:
                usable, missing = dict(self._choose()), {}
                for name in CONTROLLERS:
                    try:
                        _make_parent(usable[name], name, self._mark)
                    except KeyError:
                        missing[name] = "no cgroup hierarchy has it"
                    except OSError as error:
                        missing[name] = f"{usable.pop(name).mount}: {error.strerror}"
                self._found = usable, missing
            return self._found

    def _choose(self) -> Mapping[str, Hierarchy]:
        text = self._mountinfo.read_text()
        return choose(text, {mount: _words(mount / "cgroup.controllers") for mount in version_2_mounts(text)})

    def _parents(self) -> Sequence[Path]:
        return [mount / self._mark for mount in dict.fromkeys(h.mount for h in self._usable.values())]

    def _doors(self, ref: InstanceRef) -> Sequence[Path]:
        """Of version 1 those for a thread, since who joins has only one: for a process the kernel waits some ms."""
        versions = {h.mount: h.version for h in self._usable.values()}
        return [
            mount / self._mark / _name(ref) / ("tasks" if version == 1 else "cgroup.procs")
            for mount, version in versions.items()
        ]

    def _paths(self, ref: InstanceRef) -> Sequence[Path]:
        return [parent / _name(ref) for parent in self._parents()]


def _make_parent(hierarchy: Hierarchy, controller: str, mark: str) -> None:
    """All guests together weigh as much as one process on each CPU, so that they cannot starve the node."""
    parent, cpus = hierarchy.mount / mark, os.cpu_count() or 1
    parent.mkdir(exist_ok=True)
    if hierarchy.version == 2:
        _write(hierarchy.mount / "cgroup.subtree_control", f"+{controller}")
        _write(parent / "cgroup.subtree_control", f"+{controller}")
        if controller == "cpu":
            _write(parent / "cpu.weight", str(min(10_000, 100 * cpus)))
    elif controller == "cpu":
        _write(parent / "cpu.shares", str(min(1 << 18, 1024 * cpus)))


def _cgroup_mounts(mountinfo: str) -> Iterator[tuple[str, Path, Sequence[str]]]:
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = [*after.split(" ", 2), "", "", ""][:3]
        if kind in ("cgroup", "cgroup2"):
            mount = _ESCAPED.sub(lambda code: chr(int(code[1], 8)), before.split()[4])
            yield kind, Path(mount), options.split(",")


def _name(ref: InstanceRef) -> str:
    return f"{ref.tenant}.{ref.pool}.{ref.instance}"


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _write(path: Path, value: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


def _remove_empty(path: Path) -> bool:
    """Remove the group; False while it has processes."""
    try:
        path.rmdir()
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True


def _kill(group: Path) -> None:
    """All at once where the kernel can; else one by one, which the caller repeats until there are no more."""
    try:
        _write(group / "cgroup.kill", "1")
    except FileNotFoundError:
        for pid in _words(group / "cgroup.procs"):
            with suppress(ProcessLookupError), closing_fd(os.pidfd_open(int(pid))) as process:
                if pid in _words(group / "cgroup.procs"):  # still, so it is what was opened
                    signal.pidfd_send_signal(process, signal.SIGKILL)


@contextmanager
def _translated(subject: InstanceRef | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Failed(
            "cgroup.failed", f"the control group of {subject}: {error.filename or ''}: {error.strerror}",
            hint="which limits this host can set: mvm doctor",
        ) from None  # fmt: skip
