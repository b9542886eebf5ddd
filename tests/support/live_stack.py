"""A whole stack in processes of its own, brought up and asked through the ``mvm`` command as people do."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import xmlrpc.client
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

from supervisor.xmlrpc import SupervisorTransport

from mvm.domain.layout import StateLayout
from mvm.drivers.qemu.driver import QemuDriver
from mvm.drivers.shell import LocalShell
from tests.support.waiting import until

COMMAND = Path(sys.executable).with_name("mvm")
_UP_S = 150
Done = subprocess.CompletedProcess[str]


def free_port() -> int:
    """A TCP port that nobody listens on at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class LiveStack:
    """One stack in a state directory of its own; `close` leaves nothing of it."""

    def __init__(self, *flags: str, **settings: str) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="mvm-live-"))
        self.layout = StateLayout(self.root / "state")
        self.flower_port = free_port()
        self.flags = flags
        ports = {"MVM_FLOWER_PORT": str(self.flower_port), "MVM_METRICS_PORT": str(free_port())}
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("MVM_")}
        own = {"MVM_STATE_DIR": str(self.layout.root), "MVM_AGENT_PORT": str(free_udp_port()), **ports, **settings}
        self.environment = inherited | own

    def __call__(self, *words: str, env: Mapping[str, str] | None = None, within_s: float = 60) -> Done:
        """Run ``mvm`` with these words to its end, however it ends; never with a traceback."""
        done = subprocess.run(
            [COMMAND, *words], env={**self.environment, **(env or {})}, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=within_s, check=False,
        )  # fmt: skip
        assert "Traceback" not in done.stdout + done.stderr, done.stderr
        return done

    def ok(self, *words: str, within_s: float = 60) -> str:
        """What a command that must succeed prints on stdout."""
        done = self(*words, within_s=within_s)
        assert done.returncode == 0, (words, done.returncode, done.stdout, done.stderr)
        return done.stdout

    def json(self, *words: str) -> Any:
        """As `ok`, with ``-o json``, parsed."""
        return json.loads(self.ok(*words, "-o", "json"))

    def fails(self, exit_code: int, code: str, *words: str, env: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Run a command that must end so, saying why on stderr and as JSON on stdout; returns the error."""
        done = self(*words, "-o", "json", env=env)
        assert done.returncode == exit_code, (words, done.returncode, done.stdout, done.stderr)
        error = json.loads(done.stdout)["error"]
        assert error["code"] == code, error
        assert error["hint"], "tells what to do"
        assert f"error[{code}]: {error['message']}" in done.stderr
        return cast("dict[str, Any]", error)

    def up(self) -> None:
        """Start it and wait until every part answers."""
        self.ok("up", "--detach", *self.flags, within_s=_UP_S)

    def close(self) -> None:
        """Stop instances and stack, and remove the state directory."""
        try:
            if self.layout.root.exists() and self("down", "--instances", within_s=_UP_S).returncode:
                self.ok("down", within_s=_UP_S)
        finally:
            shutil.rmtree(self.root)

    def pid(self, part: str) -> int | None:
        """The process of one part, as ``mvm status`` tells."""
        rows = json.loads(self("status", "-o", "json").stdout)
        return cast("int | None", next(row["pid"] for row in rows if row["name"] == part))

    def statuses(self) -> dict[str, str]:
        """Every instance's status."""
        return {row["ref"]: row["status"] for row in self.json("instance", "list")}

    def in_namespace(self, *argv: str) -> str:
        """What a program says that runs in the stack's network namespace."""
        name = json.loads(self.layout.connection.read_text())["netns"]
        return subprocess.run(["ip", "netns", "exec", name, *argv], capture_output=True, text=True, check=True).stdout

    def taps(self) -> set[str]:
        """TAPs in the stack's namespace."""
        return {link["ifname"] for link in json.loads(self.in_namespace("ip", "-j", "tuntap", "show"))}

    def vmms(self) -> list[int]:
        """Pids of the VMM processes of this state directory."""
        found = QemuDriver(self.layout, LocalShell()).processes().values()
        return [process.pid for several in found for process in several]

    def processes(self) -> list[str]:
        """Command lines that name this state directory."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with suppress(OSError):
                    words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    found += [words] if str(self.layout.root) in words else []
        return found

    @contextmanager
    def without(self, part: str) -> Iterator[None]:
        """Within the block `part` is stopped and stays so; afterwards every part answers again."""
        self._supervisor("stopProcess", part)
        try:
            yield
        finally:
            self._supervisor("startProcess", part)
            until(lambda: self("status").returncode == 0, 60, f"{part} is back")

    @contextmanager
    def frozen(self, part: str) -> Iterator[None]:
        """Within the block `part` is there and does nothing."""
        pid = self.pid(part)
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)
            until(lambda: self("status").returncode == 0, 60, f"{part} goes on")

    def _supervisor(self, method: str, part: str) -> None:
        transport = SupervisorTransport(None, None, f"unix://{self.layout.run / 'supervisor.sock'}")
        try:
            proxy = cast("Any", xmlrpc.client.ServerProxy("http://localhost", transport=cast("Any", transport)))
            group = next(each["group"] for each in proxy.supervisor.getAllProcessInfo() if each["name"] == part)
            assert getattr(proxy.supervisor, method)(f"{group}:{part}") is True
        finally:
            transport.close()


@contextmanager
def live_stack(
    *flags: str, before: Callable[[LiveStack], None] = lambda _: None, **settings: str
) -> Iterator[LiveStack]:
    """A stack that is up; gone at the end of the block. What `before` does, it finds."""
    stack = LiveStack(*flags, **settings)
    try:
        before(stack)
        stack.up()
        yield stack
    finally:
        stack.close()


def free_udp_port() -> int:
    """A UDP port that nobody has at the moment."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
