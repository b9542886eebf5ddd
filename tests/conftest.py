"""Fixtures that more than one folder uses."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from xdist.workermanage import NodeManager

from mvm.drivers.redis_link import RedisLink
from tests.support.redis_server import RedisServer

NodeManager.EXIT_TIMEOUT = 180  # after Ctrl-C: for the workers to take down what they have brought up


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: short ones fill the processors up at the end."""
    items.sort(key=lambda item: "e2e" not in item.path.parts)


@pytest.fixture(scope="session")
def redis_session() -> Iterator[RedisServer]:
    """One redis-server for the session."""
    server = RedisServer()
    yield server
    server.close()


@pytest.fixture
def redis_server(redis_session: RedisServer) -> RedisServer:
    """The session's redis-server, emptied."""
    if redis_session.process is None:
        redis_session.start()
    link = RedisLink(redis_session.url, code="x")
    link.command("FLUSHALL")
    link.close()
    return redis_session
