"""``python -m mvm.metadata``: the metadata service of this node, until SIGTERM or SIGINT."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import structlog

from mvm.drivers import bridge_listeners as bridges
from mvm.errors import MvmError
from mvm.metadata.answers import Answers
from mvm.metadata.server import Server
from mvm.settings import Settings, load_settings
from mvm.telemetry.logging import configure

log = structlog.get_logger(__name__)

_SETTLE_S = 0.05  # bridges rarely change alone
_LOOK_S = 5.0  # also without word from the kernel, and after a failure
_THREADS = 2


class Bridges:
    """One listener on every bridge there is."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._heard: dict[tuple[str, int], asyncio.Task[None]] = {}

    @property
    def count(self) -> int:
        """How many are listened on."""
        return len(self._heard)

    def look(self) -> None:
        """Begin with new bridges, and end with those that are gone or were made anew."""
        there = set(bridges.bridges().items())
        for gone in self._heard.keys() - there:
            self._heard.pop(gone).cancel()
        for name, index in sorted(there - self._heard.keys()):
            try:
                listener = bridges.listen(name)
            except OSError as error:  # it has gone again, or has no address yet
                log.debug("metadata.cannot_listen", bridge=name, error=error.strerror)
                continue
            self._heard[name, index] = asyncio.create_task(self._server.listen(listener, name))
            log.info("metadata.listens", bridge=name)

    async def follow(self) -> None:
        """`look` whenever something has changed, until cancelled."""
        loop = asyncio.get_running_loop()
        with bridges.changes() as word:
            while True:
                self.look()
                with suppress(TimeoutError, OSError):  # word was lost: look anyway
                    async with asyncio.timeout(_LOOK_S):
                        await loop.sock_recv(word, 65536)
                await asyncio.sleep(_SETTLE_S)
                with suppress(OSError):
                    while word.recv(65536):
                        continue


async def run(settings: Settings) -> None:
    """Serve until a signal comes."""
    from mvm.wiring import open_metadata

    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    with ThreadPoolExecutor(_THREADS) as threads:
        heard = Bridges(Server(Answers(os.urandom(32)), open_metadata(settings).asker, threads))
        following = asyncio.create_task(heard.follow())
        health = await asyncio.start_unix_server(lambda _, writer: _tell(writer, heard), sock=_private(settings))
        async with health:
            waiting = asyncio.create_task(stop.wait())
            done, _ = await asyncio.wait({following, waiting}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()


async def _tell(writer: asyncio.StreamWriter, heard: Bridges) -> None:
    """Whoever connects here is the stack's own probe."""
    writer.write(json.dumps({"bridges": heard.count}).encode() + b"\n")
    writer.close()
    await writer.wait_closed()


def _private(settings: Settings) -> socket.socket:
    path = settings.layout.metadata_socket
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    path.chmod(0o600)
    sock.listen(8)
    return sock


def main() -> int:
    """The exit code: 0 after a signal, else the error's."""
    try:
        settings = load_settings()
        configure(settings)
        asyncio.run(run(settings))
    except MvmError as error:
        log.error("metadata.failed", **error.to_dict())
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
