from __future__ import annotations

import pytest

from mvm.drivers.clock import SystemClock
from mvm.drivers.memory_registry import MemoryRegistry
from mvm.drivers.redis_link import RedisLink
from mvm.drivers.redis_registry import RedisRegistry
from mvm.ports.registry import Registry
from tests.support.redis_server import RedisServer


@pytest.fixture(params=["memory", pytest.param("redis", marks=pytest.mark.redis)])
def registry(request: pytest.FixtureRequest) -> Registry:
    """An empty registry."""
    if request.param == "memory":
        return MemoryRegistry(SystemClock())
    server: RedisServer = request.getfixturevalue("redis_server")
    return RedisRegistry(RedisLink(server.url, code="registry.unreachable"))
