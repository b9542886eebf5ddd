"""The thin Redis connection when nobody answers."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from mvm.drivers.redis_link import RedisLink
from mvm.errors import Failed, Unreachable
from tests.support.redis_server import RedisServer
from tests.support.waiting import until


def test_a_redis_that_hangs_is_as_unreachable_as_none(tmp_path: Path) -> None:
    path = tmp_path / "redis.sock"
    link = RedisLink(f"unix://{path}", code="registry.unreachable", timeout_s=3600)
    with socket.socket(socket.AF_UNIX) as deaf:  # the kernel connects for it, and it never reads
        deaf.bind(str(path))
        deaf.listen()
        with pytest.raises(Unreachable, match="timed out") as caught:
            link.command("LPUSH", "x", "y")
    assert caught.value.code == "registry.unreachable"
    link.close()


@pytest.mark.redis
def test_a_redis_that_takes_no_writes_is_still_read() -> None:
    """As when its disk is full: who looks for the reason has to see jobs."""
    server = RedisServer()
    writer = RedisLink(server.url, code="registry.unreachable")
    reader = RedisLink(server.url, code="registry.unreachable")
    try:
        writer.command("SET", "job", "queued")
        (server.directory / "dump.rdb").mkdir()  # what it saves cannot take this name
        writer.command("CONFIG", "SET", "save", "3600 1")
        writer.command("BGSAVE")
        until(lambda: b"rdb_last_bgsave_status:err" in writer.command("INFO", "persistence"), 30, "it could not save")
        assert reader.command("GET", "job") == b"queued"
        with pytest.raises(Failed, match="MISCONF"):
            reader.command("SET", "job", "running")
    finally:
        writer.close()
        reader.close()
        server.close()
