"""A private redis-server for tests."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from time import monotonic

from mvm.drivers.redis_link import RedisLink
from mvm.errors import Unreachable


@contextmanager
def redis_server(directory: Path) -> Iterator[RedisLink]:
    """A redis-server on a Unix socket in `directory`, without files, until the end of the block."""
    path = directory / "redis.sock"
    argv = ["redis-server", "--port", "0", "--unixsocket", str(path), "--save", "", "--dir", str(directory)]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL) as server:
        try:
            link = RedisLink(f"unix://{path}", code="registry.unreachable")
            _wait_until_it_answers(link, deadline=monotonic() + 20)
            yield link
            link._close()
        finally:
            server.kill()


def _wait_until_it_answers(link: RedisLink, deadline: float) -> None:
    while True:
        try:
            assert link.command("PING") in (b"PONG", "PONG")
            return
        except Unreachable:
            assert monotonic() < deadline, "redis-server did not come up"
        Event().wait(0.02)
