"""Running programs on this host. The only module that imports subprocess."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from mvm.domain.instance import ProcessIdentity
from mvm.drivers import processes
from mvm.errors import Failed, TimedOut
from mvm.ports.shell import Completed

_TICK_S = 1.0
_KEPT = 4000  # characters of a failed program's stderr


class LocalShell:
    """`Shell` on this host, in the caller's namespaces; `run` in the network namespace at `netns`, if one is given.

    What `spawn` started is reaped when it ends.
    """

    _prefix: tuple[str, ...] = ()

    def __init__(self, netns: Path | None = None) -> None:
        self._reaper = processes.reaper()
        if netns is not None:
            self._prefix = ("nsenter", f"--net={netns}", "--")

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: str = "",
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout_s: float = 60.0,
        meanwhile: Callable[[], None] | None = None,
    ) -> Completed:
        """Run to the end; `env` adds to the caller's environment."""
        try:
            with subprocess.Popen(
                [*self._prefix, *argv],
                env={**os.environ, **(env or {})},
                cwd=cwd,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                encoding="utf-8",
                errors="replace",
                start_new_session=meanwhile is not None,
            ) as program:
                done = _ended(program, stdin, timeout_s, meanwhile)
        except subprocess.TimeoutExpired as expired:
            raise TimedOut(
                "shell.timed_out", f"{argv[0]} did not end within {timeout_s:g} s",
                stdout=_text(expired.stdout), stderr=_text(expired.stderr),
            ) from None  # fmt: skip
        except OSError as error:
            raise _not_started(argv[0], error) from None
        if done.returncode:
            raise Failed(
                "shell.failed", f"{argv[0]} failed with {done.returncode}: {done.stderr.strip()[-500:]}",
                exit_code=done.returncode, stdout=done.stdout[-_KEPT:], stderr=done.stderr[-_KEPT:],
            )  # fmt: skip
        return Completed(done.stdout, done.stderr)

    def spawn(
        self, argv: Sequence[str], *, log: Path, output: Path | None = None, stdin: bytes = b"",
        pass_fds: Sequence[int] = (), program: str | None = None,
    ) -> ProcessIdentity:  # fmt: skip
        """Start a program that goes on when we end; it keeps the descriptors `pass_fds` under their numbers."""
        with ExitStack() as stack:
            words = _appending(stack, log)
            said = _appending(stack, output) if output else words
            reads = _holding(stack, stdin)
            moves = [(reads, 0), (said, 1), (words, 2), *((fd, fd) for fd in pass_fds)]  # onto itself: stays open
            try:
                pid = os.posix_spawnp(
                    program or argv[0], list(argv), os.environ,
                    file_actions=[(os.POSIX_SPAWN_DUP2, *move) for move in moves],
                    setsid=True, setsigmask=(), setsigdef=(signal.SIGPIPE, signal.SIGXFSZ),
                )  # fmt: skip
            except OSError as error:
                raise _not_started(argv[0], error) from None
        with suppress(ProcessLookupError, PermissionError):  # it has ended already, or we are not root
            os.setpriority(os.PRIO_PROCESS, pid, 0)  # whatever ours is
        identity = processes.identify(pid)
        if identity is None:
            raise Failed("shell.failed", f"{argv[0]} cannot be seen in /proc", hint="mount /proc without hidepid")
        self._reaper.watch(pid)
        return identity


def _ended(
    program: subprocess.Popen[str], stdin: str, timeout_s: float, meanwhile: Callable[[], None] | None
) -> subprocess.CompletedProcess[str]:
    """What `program` said, once it has ended; it is killed where that takes too long, or `meanwhile` raises."""
    end, given = time.monotonic() + timeout_s, stdin or None
    try:
        while True:
            left = end - time.monotonic()
            try:
                out, err = program.communicate(given, timeout=left if meanwhile is None else min(left, _TICK_S))
                return subprocess.CompletedProcess(program.args, program.returncode, out, err)
            except subprocess.TimeoutExpired:
                if meanwhile is None or time.monotonic() >= end:
                    raise
                given = None
                meanwhile()
    except BaseException:
        if meanwhile is None:
            program.kill()
        elif program.returncode is None:
            os.killpg(program.pid, signal.SIGKILL)  # it leads a session of its own
        raise


def _appending(stack: ExitStack, path: Path) -> int:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    stack.callback(os.close, fd)
    return fd


def _holding(stack: ExitStack, data: bytes) -> int:
    """What reads as `data`, which a pipe holds."""
    if not data:
        fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    else:
        fd, write = os.pipe2(os.O_CLOEXEC)
        os.write(write, data)
        os.close(write)
    stack.callback(os.close, fd)
    return fd


def _not_started(program: str, error: OSError) -> Failed:
    if isinstance(error, FileNotFoundError):
        return Failed("shell.missing", f"there is no program {program}", hint=f"install {program}", program=program)
    return Failed("shell.failed", f"{program} could not be started: {error.strerror}", program=program)


def _text(data: str | bytes | None) -> str:
    return data[-_KEPT:].decode(errors="replace") if isinstance(data, bytes) else (data or "")[-_KEPT:]
