"""The private Redis's append-only files while it does not run: found whole, mended, or set aside."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic

from mvm.domain.instance import ProcessIdentity
from mvm.drivers import processes
from mvm.drivers.files import write_private
from mvm.drivers.redis_link import RedisLink
from mvm.errors import Failed, Unreachable
from mvm.ports.shell import Shell

Report = Callable[[str], None]
_FILES, _MANIFEST = "appendonlydir", "appendonly.aof.manifest"
_LOST = "lost"  # beside the files: whole as they are now, they lack something
_SOCKET = "u.sock"  # short: a Unix socket's path has 107 bytes
_CHECK_S = 600.0
_START_S = 300.0  # a large file takes its time to load
_END_S = 300.0  # or to be written
_LOOK_AGAIN_S = 0.02


def server(directory: Path, socket: Path) -> list[str]:
    """The command line of a Redis that keeps its data in `directory` and listens on `socket` alone."""
    return [
        "redis-server", "--unixsocket", str(socket), "--unixsocketperm", "700", "--port", "0",
        "--dir", str(directory), "--appendonly", "yes", "--appendfsync", "everysec",
        "--maxmemory-policy", "noeviction", "--save", "", "--daemonize", "no",
    ]  # fmt: skip


def mend(directory: Path, shell: Shell, report: Report) -> bool:
    """Redis can load what is in `directory`. Returns whether it lacks something, of which `report` is told.

    A power cut may leave a file's end unwritten, or as zeros. What comes after the last command that can be read is
    dropped; when nothing can be read, Redis begins anew. Whatever was there before is kept beside it. That something
    is lacking is remembered until `made_good` is told otherwise, whatever happens in between.
    """
    lost = directory / _LOST
    if _whole(directory, shell):
        if lost.exists():
            report(f"Redis's files were damaged, and what they lost is not put back yet; see {lost.read_text()}")
        return lost.exists()
    aside = _free_name(directory)
    shutil.copytree(directory, aside, symlinks=True)
    before = _bytes(directory)
    write_private(lost, str(aside).encode())  # once they are whole, nothing else tells
    with suppress(Failed):
        shell.run(["redis-check-aof", "--fix", str(_manifest(directory))], stdin="y\n", timeout_s=_CHECK_S)
    if _whole(directory, shell):
        dropped = before - _bytes(directory)
        report(f"WARNING: Redis's file was damaged: its last {dropped} bytes are dropped; as it was it is in {aside}")
        return True
    shutil.rmtree(directory / _FILES)
    report(f"WARNING: Redis's files are damaged and cannot be mended: it begins anew; as they were they are in {aside}")
    return True


def made_good(directory: Path) -> None:
    """What `mend` found lacking is there again."""
    (directory / _LOST).unlink(missing_ok=True)


@contextmanager
def served(directory: Path, shell: Shell) -> Iterator[RedisLink]:
    """A Redis of one's own over `directory`, which has written everything once the block ends well.

    Raises `Failed`: ``redis.not_loaded`` with its last words when it does not start, ``redis.not_ended`` when it does
    not end by itself, and may not have written everything. It is gone in any case.
    """
    socket, log = directory / _SOCKET, directory / "upkeep.log"
    process = shell.spawn(server(directory, socket), log=log)
    link = RedisLink(f"unix://{socket}", code="redis.unreachable")
    try:
        _wait_for(link, process, log)
        yield link
        with suppress(Unreachable):  # it hangs up and does not answer
            link.command("SHUTDOWN")
        if not processes.wait_gone(process, _END_S):
            raise Failed("redis.not_ended", f"Redis over {directory} does not end: it may not have written everything",
                         hint="does its disk answer? look at the kernel's log, then try again")  # fmt: skip
    finally:
        link.close()
        processes.kill(process)
        processes.wait_gone(process, _END_S)
        for path in (socket, log):
            path.unlink(missing_ok=True)


def _wait_for(link: RedisLink, process: ProcessIdentity, log: Path) -> None:
    deadline = monotonic() + _START_S
    while True:
        with suppress(Unreachable):
            link.command("PING")
            return
        # Nothing tells when its socket answers, but its end can be waited for meanwhile.
        if processes.wait_gone(process, _LOOK_AGAIN_S) or monotonic() > deadline:
            words = log.read_text(errors="replace")[-1000:]
            raise Failed("redis.not_loaded", f"Redis does not load its data; its last words:\n{words}",
                         hint="is there enough memory and disk?")  # fmt: skip


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
