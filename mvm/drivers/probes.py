"""Whether each part of the stack answers: asked of the part itself, the way its users ask it."""

from __future__ import annotations

import base64
import http.client
import socket
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from mvm.drivers import netns
from mvm.drivers.redis_link import RedisLink
from mvm.drivers.supervisor import PartState
from mvm.errors import MvmError
from mvm.settings import Settings

_ANSWER_S = 2.0
WORKERS = {"worker": "main", "urgent": "urgent"}


class Probes:
    """Asks the parts of one stack. Each answer is None when all is well, or what is wrong."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._namespace = netns.path_of(settings.namespace) if settings.namespace else None

    def ask(self, part: str, states: Mapping[str, PartState]) -> str | None:
        """What keeps `part` from being ready; it also has to run by what supervisord says."""
        state = states.get("agent" if part == "metrics" else part)
        if state is not None and state.state != "RUNNING":
            return state.state.lower()
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
    def _inside(namespace: Path | None) -> AbstractContextManager[None]:
        return netns.entered(namespace) if namespace else nullcontext()

    def _redis(self) -> str | None:
        with self._inside(self._namespace):
            reply = RedisLink(self._settings.redis, code="redis.unreachable", timeout_s=_ANSWER_S).command("PING")
        return None if reply == b"PONG" else f"unexpected reply {reply!r}"

    def _worker(self, name: str) -> str | None:
        from celery import Celery
        from kombu.exceptions import OperationalError

        node = f"{name}@{self._settings.node}"
        app = Celery("mvm-probe", broker=self._settings.broker, set_as_current=False)
        app.conf.update(broker_connection_max_retries=0, broker_transport_options={"max_retries": 0})
        try:
            with self._inside(self._namespace), app.connection_for_write() as connection:
                replies = app.control.broadcast(
                    "ping", destination=[node], reply=True, limit=1, timeout=_ANSWER_S, connection=connection
                )
        except OperationalError as error:
            return f"broker: {error}"
        finally:
            app.close()
        return None if any(node in reply for reply in replies or []) else f"{node} does not answer pings"

    def _beat(self, state: PartState | None) -> str | None:
        """Beat answers nobody; it is alive once it has written its schedule since it was started."""
        schedule = schedule_file(self._settings)
        since = state.since.timestamp() if state and state.since else 0.0
        written = [p.stat().st_mtime for p in schedule.parent.glob(f"{schedule.name}*")]
        return None if written and max(written) >= since else "has not opened its schedule yet"

    def _agent(self) -> str | None:
        from mvm.drivers.quic.client import QuicAgents

        agents = QuicAgents(
            self._settings.layout.certs,
            lambda: netns.socket_in(self._namespace, socket.AF_INET, socket.SOCK_DGRAM),
        )
        agents.call(agent_address(self._settings), "node.ping", {}, deadline_s=_ANSWER_S)
        return None

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
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_ANSWER_S)
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


def schedule_file(settings: Settings) -> Path:
    """Beat's record of when it fired what."""
    return settings.layout.run / "beat-schedule"
