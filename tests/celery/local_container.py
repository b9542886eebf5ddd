"""What pytest-celery needs of a docker-py container, over a process of this machine.

pytest-celery drives its components through docker-py's `Container`; this one starts a program instead, so the same
components (cluster, broker, worker) run where there is no Docker engine.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def free_port() -> int:
    """A TCP port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class LocalContainer:
    """One program in a session of its own; `kill` ends the whole session, as Docker ends a container."""

    def __init__(
        self, name: str, argv: Sequence[str], directory: Path, *, env: Mapping[str, str] | None = None, port: int = 0
    ) -> None:
        self.id = secrets.token_hex(32)
        self.name = name
        self._argv = list(argv)
        self._directory = directory
        self._env = {**os.environ, **(env or {})}
        self._ports = {"6379/tcp": [{"HostIp": "127.0.0.1", "HostPort": str(port)}]} if port else {}
        self._log = directory / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def attrs(self) -> dict[str, Any]:
        """As ``docker inspect`` would say it."""
        return {
            "Config": {"Hostname": self.name, "Env": [f"{k}={v}" for k, v in self._env.items()]},
            "HostConfig": {"PortBindings": self._ports},
            "NetworkSettings": {"Networks": {}, "Ports": self._ports},
        }

    @property
    def status(self) -> str:
        """``running`` or ``exited``."""
        return "running" if self._process is not None and self._process.poll() is None else "exited"

    @property
    def pid(self) -> int:
        """The program's pid."""
        assert self._process is not None
        return self._process.pid

    def reload(self) -> None:
        """The state is read afresh each time."""

    def start(self) -> None:
        """Start the program."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._argv, cwd=self._directory, env=self._env, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def logs(self, **_: Any) -> bytes:
        """Everything printed so far."""
        return self._log.read_bytes()

    def kill(self, signal: str | int | None = None) -> None:
        """Send a signal, SIGKILL unless told otherwise; SIGKILL ends the whole session."""
        number = _number(signal)
        if number == _number(None):
            os.killpg(self.pid, number)
            assert self._process is not None
            self._process.wait()
        else:
            os.kill(self.pid, number)

    def stop(self, timeout: float = 15) -> None:
        """Ask it to end, then make it."""
        if self.status != "running":
            return
        assert self._process is not None
        self._process.terminate()
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()

    def restart(self, timeout: float = 15) -> None:
        """End it and start it again."""
        self.stop(timeout)
        self.start()

    def remove(self, **_: Any) -> None:
        """End it, as Docker does by force: how it would have ended is no question any more."""
        if self.status == "running":
            self.kill()

    def exec_run(self, cmd: str | Sequence[str], **_: Any) -> tuple[int, bytes]:
        """Run a command beside it."""
        done = subprocess.run(
            cmd, shell=isinstance(cmd, str), cwd=self._directory, env=self._env, capture_output=True, check=False
        )  # fmt: skip
        return done.returncode, done.stdout


def _number(name: str | int | None) -> int:
    if isinstance(name, int):
        return name
    return int(getattr(signal, name or "SIGKILL"))
