"""mvm's own workers as pytest-celery's components, over processes of this machine."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pytest_celery import (
    CeleryBackendCluster,
    CeleryBrokerCluster,
    CeleryTestWorker,
    CeleryWorkerCluster,
    CeleryWorkerContainer,
    RedisContainer,
)

from mvm.domain.ids import NodeId
from mvm.services.jobs import Jobs
from mvm.settings import Settings
from mvm.wiring import Client
from tests.celery.local_container import LocalContainer, free_port
from tests.support.waiting import until

NODES = (NodeId("n1"), NodeId("n2"))
ROOT = Path(__file__).parents[2]


class LocalRedis(RedisContainer):  # type: ignore[misc]
    """A redis-server on a loopback port, with its append-only file."""

    @property
    def url(self) -> str:
        return self.host_url

    @property
    def host_url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def get_addr(self, port: str) -> tuple[str, str]:
        return "127.0.0.1", self.ports[port][0]

    def get_open_tcp_ports(self) -> list[str]:
        return ["6379"]


def _redis(directory: Path, name: str) -> LocalRedis:
    port, where = free_port(), directory / name
    where.mkdir()
    argv = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--dir", str(where), "--save", "",
            "--appendonly", "yes"]  # fmt: skip
    redis = LocalRedis(LocalContainer(name, argv, where, port=port))
    until(lambda: _answers(port), 60, "the broker answers")
    return redis


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def default_redis_broker(tmp_path: Path) -> Iterator[LocalRedis]:
    redis = _redis(tmp_path, "broker")
    yield redis
    redis._container.remove()


@pytest.fixture
def default_redis_backend(default_redis_broker: LocalRedis) -> LocalRedis:
    """mvm keeps no Celery results; pytest-celery wants a backend to be there."""
    return default_redis_broker


@pytest.fixture
def celery_broker_cluster(celery_redis_broker: Any) -> Iterator[CeleryBrokerCluster]:
    cluster = CeleryBrokerCluster(celery_redis_broker)
    yield cluster
    cluster.teardown()


@pytest.fixture
def celery_backend_cluster(celery_redis_backend: Any) -> Iterator[CeleryBackendCluster]:
    cluster = CeleryBackendCluster(celery_redis_backend)
    yield cluster
    cluster.teardown()


class NodeWorker(CeleryWorkerContainer):  # type: ignore[misc]
    """One node's worker, as ``mvm up`` starts it."""

    node: NodeId
    state_dir: Path

    @classmethod
    def worker_queue(cls) -> str:
        return f"node.{cls.node}"

    @classmethod
    def worker_name(cls) -> str:
        return f"main@{cls.node}"


def start_worker(directory: Path, node: NodeId, url: str, *, role: str = "main") -> NodeWorker:
    """Start the worker process of `node`, over the fake host."""
    state = directory / f"state-{node}"
    state.mkdir(exist_ok=True)
    queue = f"node.{node}" if role == "main" else f"node.{node}.urgent"
    env = {
        "MVM_STATE_DIR": str(state), "MVM_REDIS_URL": url, "MVM_NODE_ID": node, "MVM_DRIVER": "fake",
        "MVM_NETNS": "host", "MVM_WORKER_ROLE": role, "MVM_HEARTBEAT_S": "0.5", "MVM_VISIBILITY_TIMEOUT_S": "6",
        "MVM_LOG": "debug,celery.worker.strategy=info", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "default",
    }  # fmt: skip
    argv = [sys.executable, "-m", "celery", "-A", "workers.app", "worker", "-n", f"{role}@{node}", "-Q", queue,
            "-P", "threads", "-c", "4", "--without-gossip", "--without-mingle", "-E"]  # fmt: skip
    kind = type(f"Worker-{node}", (NodeWorker,), {"node": node, "state_dir": state})
    worker: NodeWorker = kind(LocalContainer(f"{role}-{node}", argv, directory, env=env))
    return worker


@pytest.fixture
def celery_worker_cluster(
    tmp_path: Path, default_redis_broker: LocalRedis, celery_setup_app: Any
) -> Iterator[CeleryWorkerCluster]:
    workers = [start_worker(tmp_path, node, default_redis_broker.host_url) for node in NODES]
    cluster = CeleryWorkerCluster(*[CeleryTestWorker(worker, app=celery_setup_app) for worker in workers])
    yield cluster
    for worker in workers:
        worker._container.remove()


@pytest.fixture
def fleet(default_redis_broker: LocalRedis, monkeypatch: pytest.MonkeyPatch) -> Jobs:
    """Submitting jobs, as the command line does."""
    for name in [n for n in os.environ if n.startswith("MVM_")]:
        monkeypatch.delenv(name)
    url = default_redis_broker.host_url
    return Client({"node_id": "n1", "redis_url": url, "broker_url": url}, Settings().layout).jobs
