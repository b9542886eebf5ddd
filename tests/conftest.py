"""Fixtures that more than one folder uses."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from mvm.drivers.redis_link import RedisLink
from tests.support.microvm import image_cache
from tests.support.redis_server import RedisServer

# A slow machine is no failure.
settings.register_profile("mvm", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("mvm")


def pytest_keyboard_interrupt() -> None:
    """After Ctrl-C a worker is interrupted again before it ends: what takes a stack down must not be."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: short ones fill the processors up at the end."""
    items.sort(key=lambda item: "e2e" not in item.path.parts)


@pytest.fixture(scope="session", autouse=True)
def package_lists() -> None:
    """apt remembers its lists as it does by default; in container images it reads them anew at each call."""
    if "APT_CONFIG" in os.environ:
        return
    root = image_cache().root
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    text = f'{{Dir "/" {{Cache "var/cache/apt/" {{pkgcache "{root}/pkgcache.bin";}};}};}};\n'
    config = root / f"apt.conf.{os.getpid()}"
    config.write_text("".join(f"Binary::{program} {text}" for program in ("apt-get", "apt-cache")))
    os.environ["APT_CONFIG"] = str(config.rename(root / "apt.conf"))


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
