"""Whether each part of the stack answers: asked of the part itself, the way its users ask it."""

from __future__ import annotations

import base64
import http.client
import os
import socket
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from threading import Lock

from mvm.domain.job import Lane
from mvm.domain.liveness import Answer, judge, patience_s
from mvm.drivers import netns, processes
from mvm.drivers.redis_link import RedisLink
from mvm.drivers.supervisor import PartState
from mvm.errors import MvmError
from mvm.ports.queue import node_queue
from mvm.settings import Settings

_ANSWER_S = 2.0  # on a machine at rest, as all of these
_TICK_S = 10.0  # Beat ticks every second
_PONG_S = 1.0  # a ping before the worker listens is lost, so this is also how soon it is asked again
_SLOW_S = 3.0  # from when on people are told that it took long
_importing = Lock()
WORKERS = {"worker": "main", "urgent": "urgent"}


class Probes:
    """Asks the parts of one stack. A busy machine has its parts waited for longer: slow is not dead."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._namespace = netns.path_of(settings.namespace) if settings.namespace else None

    def ask_all(self, parts: Iterable[str], states: Mapping[str, PartState]) -> dict[str, Answer]:
        """`ask` of several at once."""
        names = list(parts)
        with ThreadPoolExecutor(len(names) or 1) as pool:
            return dict(zip(names, pool.map(lambda name: self.ask(name, states), names), strict=True))

    def ask(self, part: str, states: Mapping[str, PartState]) -> Answer:
        """Whether `part` is ready; it also has to run by what supervisord says, and by what the kernel does."""
        state = states.get("agent" if part == "metrics" else part)
        if state is not None and state.state not in ("STARTING", "RUNNING"):
            return Answer(False, state.state.lower())
        if state is not None and state.pid is not None and processes.stands_still(state.pid):
            return Answer(False, f"process {state.pid} was stopped by a signal")
        began = time.monotonic()
        problem = self._problem(part, state)
        return judge(problem, time.monotonic() - began, _SLOW_S)

    def _problem(self, part: str, state: PartState | None) -> str | None:
        try:
            match part:
                case "redis":
                    return self._redis()
                case "worker" | "urgent":
                    return self._worker(WORKERS[part])
                case "beat":
                    return self._beat(state)
                case "agent":
                    return self._agent()
                case "metadata":
                    return self._metadata()
                case "flower":
                    return self._flower()
                case "metrics":
                    return self._http(self._settings.metrics_port, "/metrics")
                case _:
                    raise AssertionError(part)
        except MvmError as error:
            return error.message
        except OSError as error:
            return error.strerror or str(error)

    @staticmethod
    def _patience(ordinary_s: float) -> float:
        return patience_s(ordinary_s, os.getloadavg()[0], os.cpu_count() or 1)

    @staticmethod
    def _inside(namespace: Path | None) -> AbstractContextManager[None]:
        return netns.entered(namespace) if namespace else nullcontext()

    def _redis(self) -> str | None:
        link = RedisLink(self._settings.redis, code="redis.unreachable", timeout_s=self._patience(_ANSWER_S))
        try:
            with self._inside(self._namespace):
                reply = link.command("PING")
        finally:
            link.close()
        return None if reply == b"PONG" else f"unexpected reply {reply!r}"

    def _worker(self, name: str) -> str | None:
        with _importing:  # Celery's lazy modules are not made for two threads at once
            from celery import Celery
            from kombu.exceptions import OperationalError
        node = f"{name}@{self._settings.node}"
        queue = node_queue(self._settings.node, Lane.URGENT if name == "urgent" else Lane.NORMAL)
        app = Celery("mvm-probe", broker=self._settings.broker, set_as_current=False)
        app.conf.update(broker_connection_max_retries=0, broker_transport_options={"max_retries": 0})
        try:
            with self._inside(self._namespace), app.connection_for_write() as connection:
                replies = app.control.broadcast(
                    "active_queues",
                    destination=[node],
                    reply=True,
                    limit=1,
                    timeout=self._patience(_PONG_S),
                    connection=connection,
                )
        except OperationalError as error:
            return f"broker: {error}"
        finally:
            app.close()
        taken = next((reply[node] for reply in replies or [] if node in reply), None)
        if taken is None:
            return f"{node} does not answer"
        if any(each["name"] == queue for each in taken):
            return None
        return f"takes nothing from its queue: celery -A workers control add_consumer {queue} -d {node}"

    def _beat(self, state: PartState | None) -> str | None:
        """Beat answers nobody; it touches a file with every tick."""
        try:
            ticked = self._settings.layout.beat_alive.stat().st_mtime
        except FileNotFoundError:
            return "has not ticked yet"
        since = state.since.timestamp() if state and state.since else 0.0
        if ticked < since:
            return "has not ticked since it was started"
        silent_s = time.time() - ticked
        return None if silent_s < self._patience(_TICK_S) else f"has not ticked for {silent_s:.0f} s"

    def _agent(self) -> str | None:
        from mvm.drivers.quic.client import QuicAgents

        agents = QuicAgents(
            self._settings.layout.certs,
            lambda: netns.socket_in(self._namespace, socket.AF_INET, socket.SOCK_DGRAM),
        )
        address = f"{self._settings.node}@{agent_address(self._settings)}"
        agents.call(address, "node.ping", {}, deadline_s=self._patience(_ANSWER_S))
        return None

    def _metadata(self) -> str | None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(self._patience(_ANSWER_S))
            sock.connect(str(self._settings.layout.metadata_socket))
            return None if sock.recv(4096) else "it hung up"

    def _flower(self) -> str | None:
        port = self._settings.flower_port
        password = self._settings.layout.flower_password.read_text().strip()
        token = base64.b64encode(f"mvm:{password}".encode()).decode()
        return self._http(port, "/healthcheck") or self._http(port, "/api/task/types", f"Basic {token}")

    def _http(self, port: int, path: str, authorization: str = "") -> str | None:
        """From the stack's namespace and from the caller's: both must do."""
        for where in {self._namespace, None}:
            headers = {"Authorization": authorization} if authorization else {}
            with self._inside(where):
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=self._patience(_ANSWER_S))
                try:
                    connection.request("GET", path, headers=headers)
                    status = connection.getresponse().status
                except http.client.HTTPException as error:
                    return f"{path}: {error!r}"
                finally:
                    connection.close()
            if status != 200:
                return f"{path} answers {status}"
        return None


def agent_address(settings: Settings) -> str:
    """Where the agent listens, ``HOST:PORT``."""
    return f"{settings.agent_host}:{settings.agent_port}"
