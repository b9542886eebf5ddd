from __future__ import annotations

from collections.abc import Iterator

import pytest

from mvm.drivers.clock import SystemClock
from mvm.drivers.memory_registry import MemoryRegistry
from mvm.drivers.redis_link import RedisLink
from mvm.drivers.redis_registry import RedisRegistry
from mvm.ports.registry import Registry
from tests.support.redis_server import redis_server


@pytest.fixture(scope="session")
def redis_link(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisLink]:
    with redis_server(tmp_path_factory.mktemp("redis")) as link:
        yield link


@pytest.fixture(params=["memory", pytest.param("redis", marks=pytest.mark.redis)])
def registry(request: pytest.FixtureRequest) -> Registry:
    """An empty registry."""
    if request.param == "memory":
        return MemoryRegistry(SystemClock())
    link: RedisLink = request.getfixturevalue("redis_link")
    link.command("FLUSHALL")
    return RedisRegistry(link)
