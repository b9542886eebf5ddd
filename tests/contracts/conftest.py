from __future__ import annotations

from collections.abc import Iterator

import pytest

from mvm.drivers.clock import SystemClock
from mvm.drivers.memory_registry import MemoryRegistry
from mvm.drivers.redis_link import RedisLink
from mvm.drivers.redis_registry import RedisRegistry
from mvm.ports.registry import Registry
from tests.support.redis_server import RedisServer


@pytest.fixture(params=["memory", pytest.param("redis", marks=pytest.mark.redis)])
def registry(request: pytest.FixtureRequest) -> Iterator[Registry]:
    """An empty registry."""
    if request.param == "memory":
        yield MemoryRegistry(SystemClock())
        return
    server: RedisServer = request.getfixturevalue("redis_server")
    link = RedisLink(server.url, code="registry.unreachable")
    yield RedisRegistry(link)
    link.close()
