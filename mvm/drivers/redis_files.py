"""The private Redis's append-only files while it does not run: found whole, mended, or set aside."""

from __future__ import annotations

import os
import select
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic

from mvm.drivers.redis_link import RedisLink
from mvm.errors import Failed, Unreachable
from mvm.ports.shell import Shell

Report = Callable[[str], None]
_FILES, _MANIFEST = "appendonlydir", "appendonly.aof.manifest"
_SOCKET = "u.sock"  # short: a Unix socket's path has 107 bytes
_CHECK_S = 600.0
_START_S = 300.0  # a large file takes its time to load
_LOOK_AGAIN_MS = 20


def server(directory: Path, socket: Path) -> list[str]:
    """The command line of a Redis that keeps its data in `directory` and listens on `socket` alone."""
    return [
        "redis-server", "--unixsocket", str(socket), "--unixsocketperm", "700", "--port", "0",
        "--dir", str(directory), "--appendonly", "yes", "--appendfsync", "everysec",
        "--maxmemory-policy", "noeviction", "--save", "", "--daemonize", "no",
    ]  # fmt: skip


def mend(directory: Path, shell: Shell, report: Report) -> bool:
    """Redis can load what is in `directory`. Returns whether something was lost, which `report` is told.

    A power cut may leave a file's end unwritten, or as zeros. What comes after the last command that can be read is
    dropped; when nothing can be read, Redis begins anew. Whatever was there before is kept beside it.
    """
    if _whole(directory, shell):
        return False
    aside = _free_name(directory)
    shutil.copytree(directory, aside, symlinks=True)
    before = _bytes(directory)
    with suppress(Failed):
        shell.run(["redis-check-aof", "--fix", str(_manifest(directory))], stdin="y\n", timeout_s=_CHECK_S)
    if _whole(directory, shell):
        dropped = before - _bytes(directory)
        report(f"WARNING: Redis's file was damaged: its last {dropped} bytes are dropped; as it was it is in {aside}")
        return True
    shutil.rmtree(directory / _FILES)
    report(f"WARNING: Redis's files are damaged and cannot be mended: it begins anew; as they were they are in {aside}")
    return True


@contextmanager
def served(directory: Path, shell: Shell) -> Iterator[RedisLink]:
    """A Redis of one's own over `directory`, which has written everything once the block ends well.

    Raises `Failed` (``redis.not_loaded``) with its last words when it does not start.
    """
    socket, log = directory / _SOCKET, directory / "upkeep.log"
    process = shell.spawn(server(directory, socket), log=log)
    pidfd = os.pidfd_open(process.pid)
    link = RedisLink(f"unix://{socket}", code="redis.unreachable")
    try:
        _wait_for(link, pidfd, log)
        yield link
        with suppress(Unreachable):  # it hangs up and does not answer
            link.command("SHUTDOWN")
        _ended(pidfd, _START_S)
    finally:
        link.close()
        if not _ended(pidfd, 0):
            os.kill(process.pid, 9)
            _ended(pidfd, _START_S)
        os.close(pidfd)
        for path in (socket, log):
            path.unlink(missing_ok=True)


def _wait_for(link: RedisLink, pidfd: int, log: Path) -> None:
    deadline = monotonic() + _START_S
    while True:
        with suppress(Unreachable):
            link.command("PING")
            return
        # Nothing tells when its socket answers, but its end can be waited for meanwhile.
        if _ended(pidfd, _LOOK_AGAIN_MS / 1000) or monotonic() > deadline:
            words = log.read_text(errors="replace")[-1000:]
            raise Failed("redis.not_loaded", f"Redis does not load its data; its last words:\n{words}",
                         hint="is there enough memory and disk?")  # fmt: skip


def _ended(pidfd: int, within_s: float) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(within_s * 1000))


def _whole(directory: Path, shell: Shell) -> bool:
    """Whether Redis would load it; nothing at all is whole."""
    manifest = _manifest(directory)
    if not (directory / _FILES).exists():
        return True
    if not manifest.exists():  # Redis would begin files of the same names
        return not any((directory / _FILES).iterdir())
    if not manifest.stat().st_size:
        return False
    try:
        shell.run(["redis-check-aof", str(manifest)], timeout_s=_CHECK_S)
    except Failed as error:
        if error.fields.get("exit_code") is None:  # there is no such program, or it could not be started
            raise
        return False
    return True


def _manifest(directory: Path) -> Path:
    return directory / _FILES / _MANIFEST


def _bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in (directory / _FILES).iterdir())


def _free_name(directory: Path) -> Path:
    """Beside it, by the time; never one that is there."""
    stem = f"{directory.name}.damaged-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    names = (directory.with_name(stem + (f"-{number}" if number else "")) for number in range(1000))
    return next(name for name in names if not name.exists())
