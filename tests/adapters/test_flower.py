"""Flower asks for the password, changes nothing, and listens where people are and where the stack is."""

from __future__ import annotations

import base64
import http.client
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mvm.drivers import netns, state_dir
from mvm.drivers.shell import LocalShell
from mvm.settings import Settings, load_settings
from tests.support.local import free_port
from tests.support.redis_server import RedisServer
from tests.support.waiting import until

pytestmark = pytest.mark.redis


def get(port: int, path: str, password: str | None = None, method: str = "GET") -> int:
    """The status; 0 when nobody listens."""
    headers = {}
    if password is not None:
        headers["Authorization"] = "Basic " + base64.b64encode(f"mvm:{password}".encode()).decode()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request(method, path, headers=headers)
        return connection.getresponse().status
    except ConnectionRefusedError:
        return 0
    finally:
        connection.close()


@contextmanager
def flower(settings: Settings, enter: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    env = {**os.environ, **settings.environment()}
    argv = [*enter, sys.executable, "-m", "tests.adapters.flower_app"]
    with subprocess.Popen(argv, env=env, stderr=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.terminate()
            assert process.wait(60) == 0


@pytest.fixture
def root() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="mvm-t-"))
    yield directory
    shutil.rmtree(directory)


def make_settings(root: Path, redis: RedisServer, namespace: str) -> Settings:
    settings = load_settings(state_dir=root / "s", redis_url=redis.url, netns=namespace, flower_port=free_port())
    state_dir.prepare(settings.layout)
    return settings


def test_password_and_read_only(root: Path, redis_server: RedisServer) -> None:
    settings = make_settings(root, redis_server, "host")
    port, password = settings.flower_port, settings.layout.flower_password.read_text().strip()
    with flower(settings, []) as process:
        until(lambda: get(port, "/healthcheck") == 200, 60, "Flower answers")
        assert get(port, "/tasks") == 401
        assert get(port, "/tasks", "wrong") == 401
        assert get(port, "/tasks", password) == 200
        assert get(port, "/api/tasks", password) == 200
        assert get(port, "/api/task/send-task/mvm.instance.stop", password, "POST") == 403
        for file in ("cmdline", "environ"):
            assert password.encode() not in Path(f"/proc/{process.pid}/{file}").read_bytes()
    assert list(settings.state_dir.glob("flower.db*"))


@pytest.mark.root
def test_it_listens_in_both_namespaces(root: Path, redis_server: RedisServer) -> None:
    shell, name = LocalShell(), f"mvm-t-f{os.getpid()}"
    settings = make_settings(root, redis_server, name)
    netns.create(shell, name)
    try:
        with flower(settings, ["nsenter", f"--net={netns.path_of(name)}", "--"]):
            until(lambda: get(settings.flower_port, "/healthcheck") == 200, 60, "Flower answers out here")
            with netns.entered(netns.path_of(name)):
                assert get(settings.flower_port, "/healthcheck") == 200
                assert get(settings.flower_port, "/tasks") == 401
    finally:
        netns.delete(shell, name)
