"""The thin Redis connection when nobody answers."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from mvm.drivers.redis_link import RedisLink
from mvm.errors import Unreachable


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
