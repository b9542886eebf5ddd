"""A private redis-server on a Unix socket, for one test or one session."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from mvm.drivers.redis_link import RedisLink
from mvm.errors import MvmError
from tests.support.waiting import until


class RedisServer:
    """Starts on construction; `restart` keeps the data (append-only file)."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="mvm-redis-"))
        self.socket = self.directory / "redis.sock"
        self.url = f"unix://{self.socket}"
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start and wait until it answers."""
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                ["redis-server", "--port", "0", "--unixsocket", str(self.socket), "--dir", str(self.directory),
                 "--appendonly", "yes", "--save", "", "--daemonize", "no"],
                stdout=log, stderr=log,
            )  # fmt: skip
        until(self.answers, 60, "redis-server answers")

    def answers(self) -> bool:
        """Whether it answers a PING."""
        link = RedisLink(self.url, code="x")
        try:
            return link.command("PING") == b"PONG"
        except MvmError:
            return False
        finally:
            link.close()

    def kill(self) -> None:
        """End it with SIGKILL."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def close(self) -> None:
        """End it and remove its data."""
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)
