"""Processes of this host, known by pid and start time, through /proc and pidfds."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

from mvm.domain.instance import ProcessIdentity

_PROC = Path("/proc")


class _Stat(NamedTuple):
    state: str
    threads: int
    start_ticks: int


def identify(pid: int) -> ProcessIdentity | None:
    """The process that has `pid` now, which may be a zombie."""
    stat = _stat(pid)
    return ProcessIdentity(pid, stat.start_ticks) if stat else None


def runs(process: ProcessIdentity) -> bool:
    """Whether it has not ended; a zombie of ours is reaped. Raises `PermissionError` when it cannot be seen.

    A zombie that still has other threads has not ended: they hold its files and locks.
    """
    stat = _stat(process.pid)
    if stat is None or stat.start_ticks != process.start_ticks:
        return False
    if stat.state in "ZX" and stat.threads <= 1:
        _reap(process.pid)
        return False
    return True


def name_of(pid: int) -> str | None:
    """A process as a text to know it by again: ``PID:START``."""
    process = identify(pid)
    return f"{process.pid}:{process.start_ticks}" if process else None


def goes_on(name: str) -> bool:
    """Whether the process of this name (`name_of`) has not ended and is not stopped."""
    pid = name.partition(":")[0]
    stat = _stat(int(pid)) if pid.isdecimal() else None
    return stat is not None and name == f"{pid}:{stat.start_ticks}" and stat.state not in "ZXTt"


def stands_still(pid: int) -> bool:
    """Whether it was stopped by a signal, or by whoever traces it: it does nothing until it is let go on."""
    stat = _stat(pid)
    return stat is not None and stat.state in "Tt"


def arguments(pid: int, containing: bytes = b"") -> list[str]:
    """Its command line; empty when it has ended, is ending, is the kernel's, or does not hold `containing`."""
    try:
        with open(f"{_PROC}/{pid}/cmdline", "rb", buffering=0) as file:  # noqa: PTH123 - of every process, each time
            data = file.readall()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [os.fsdecode(word) for word in data.split(b"\0")[:-1]] if containing in data else []


def uid(pid: int) -> int | None:
    """Its user, as which it acts; None when it has ended. `stat` of its directory would tell root of many."""
    try:
        lines = (_PROC / str(pid) / "status").read_text(errors="replace").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return next((int(line.split()[2]) for line in lines if line.startswith("Uid:")), None)


def pids() -> Iterator[int]:
    """Every pid in use."""
    for entry in os.scandir(_PROC):
        if entry.name.isdecimal():
            yield int(entry.name)


class Reaper:
    """Takes leave of children as they end, whoever ends them: one that nobody asks about would stay a zombie.

    A process that is forked off has children of its own: it begins anew, for what it registered with its parent's
    epoll would be told to the parent, by descriptors that the parent does not have.
    """

    def __init__(self) -> None:
        self._begin()
        os.register_at_fork(after_in_child=self._begin)

    def _begin(self) -> None:
        self._ended = select.epoll()
        threading.Thread(target=self._work, args=(self._ended,), name="reaper", daemon=True).start()

    def watch(self, pid: int) -> None:
        """The child `pid` is no zombie once it has ended."""
        with suppress(ProcessLookupError):  # somebody was faster
            self._ended.register(os.pidfd_open(pid), select.EPOLLIN)

    @staticmethod
    def _work(ended: select.epoll) -> None:
        while True:
            for pidfd, _ in ended.poll():
                with suppress(ChildProcessError):  # `runs` was faster
                    os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
                ended.unregister(pidfd)
                os.close(pidfd)


@cache
def reaper() -> Reaper:
    """That of this process. A thread that has unshared its PID namespace can use it, and cannot start it."""
    return Reaper()


def wait_gone(process: ProcessIdentity, deadline_s: float) -> bool:
    """Wait until it has ended; False when it has not within `deadline_s` seconds."""
    end = time.monotonic() + deadline_s
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return True
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        # Opened before it is identified, the descriptor can only mean the process that `runs` looked at or a later
        # one under its pid, and then `runs` says so.
        while runs(process):
            left = end - time.monotonic()
            if left <= 0:
                return False
            poll.poll(left * 1000)
        return True
    finally:
        os.close(pidfd)


def kill(process: ProcessIdentity) -> None:
    """Send SIGKILL to this very process, if it runs."""
    with suppress(ProcessLookupError):
        pidfd = os.pidfd_open(process.pid)
        try:
            if runs(process):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        finally:
            os.close(pidfd)


def _stat(pid: int) -> _Stat | None:
    try:
        text = (_PROC / str(pid) / "stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()  # the name before may hold anything; these are fields 3 and on
    return _Stat(fields[0], int(fields[17]), int(fields[19]))


def _reap(pid: int) -> None:
    with suppress(ChildProcessError):  # somebody else's child
        os.waitpid(pid, os.WNOHANG)
