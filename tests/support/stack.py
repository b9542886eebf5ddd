"""A whole stack as ``mvm up`` brings it up, driven through the command line."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import xmlrpc.client
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from supervisor.xmlrpc import SupervisorTransport

from mvm.domain.instance import ProcessIdentity
from mvm.domain.layout import StateLayout
from mvm.drivers import processes
from mvm.drivers.shell import LocalShell
from mvm.drivers.supervisor import Supervisor
from tests.support.local import free_port
from tests.support.microvm import image_cache, lay_in, minimal_image
from tests.support.waiting import until

COMMAND = (sys.executable, "-m", "mvm")
_ROOT = Path(__file__).parents[2]
_PREFIX, _OWNER = "mvm-e2e-", "owner"


@dataclass
class Stack:
    """A stack that is up. `mvm` runs a command and wants it to succeed."""

    layout: StateLayout
    env: dict[str, str]
    code: Path = _ROOT
    """Where the mvm is that it runs."""

    def run(
        self, *words: str, timeout_s: float = 180, prefix: tuple[str, ...] = (), **env: str
    ) -> subprocess.CompletedProcess[str]:
        """One command, whatever comes of it; behind another program's words, and with `env` added."""
        return subprocess.run(
            [*prefix, *COMMAND, *words], env=self.env | env, cwd=self.code, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=timeout_s, check=False,
        )  # fmt: skip

    def mvm(self, *words: str, timeout_s: float = 180) -> str:
        """A command that must succeed; its standard output."""
        done = self.run(*words, timeout_s=timeout_s)
        assert done.returncode == 0, f"mvm {' '.join(words)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def json(self, *words: str, timeout_s: float = 180) -> Any:
        """What a command that must succeed prints as JSON."""
        return json.loads(self.mvm(*words, "-o", "json", timeout_s=timeout_s))

    def fails(self, exit_code: int, code: str, *words: str, **env: str) -> dict[str, Any]:
        """A command that must end so, saying why on stderr and as JSON on stdout; the error."""
        before, dashes, after = list(words), [], []
        if "--" in words:
            at = words.index("--")
            before, dashes, after = list(words[:at]), ["--"], list(words[at + 1 :])
        done = self.run(*before, "-o", "json", *dashes, *after, **env)
        assert done.returncode == exit_code, (words, done.returncode, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        error: dict[str, Any] = json.loads(done.stdout)["error"]
        assert error["code"] == code, error
        assert error["hint"], "tells what to do"
        assert f"error[{code}]: {error['message']}" in done.stderr
        return error

    @contextlib.contextmanager
    def without(self, part: str) -> Iterator[None]:
        """Within the block `part` is stopped and stays so; afterwards every part answers again."""
        self._supervisor("stopProcess", part)
        try:
            yield
        finally:
            self._supervisor("startProcess", part)
            until(lambda: self.run("status").returncode == 0, 60, f"{part} is back")

    @contextlib.contextmanager
    def frozen(self, part: str) -> Iterator[None]:
        """Within the block `part` is there and does nothing."""
        pid = self.pid(part)
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)
            until(lambda: self.run("status").returncode == 0, 60, f"{part} goes on")

    def _supervisor(self, method: str, part: str) -> None:
        transport = SupervisorTransport(None, None, f"unix://{self.layout.run / 'supervisor.sock'}")
        try:
            proxy = cast("Any", xmlrpc.client.ServerProxy("http://localhost", transport=cast("Any", transport)))
            group = next(each["group"] for each in proxy.supervisor.getAllProcessInfo() if each["name"] == part)
            assert getattr(proxy.supervisor, method)(f"{group}:{part}") is True
        finally:
            transport.close()

    def pid(self, part: str) -> int:
        """The pid of a part of the stack, once it has one."""
        supervisor = Supervisor(self.layout, LocalShell())  # a command would take a second or more of CPU to ask it
        found: list[int] = []

        def seen() -> bool:
            pid = supervisor.parts()[part].pid
            found[:] = [pid] if pid else []
            return bool(found)

        until(seen, 60, f"{part} has a process")
        return found[0]

    def statuses(self) -> dict[str, str]:
        """Every instance's status."""
        return {i["ref"]: i["status"] for i in self.json("instance", "list")}

    def in_namespace(self, *argv: str) -> str:
        """What a program says that runs in the stack's network namespace."""
        name = json.loads(self.layout.connection.read_text())["netns"]
        return subprocess.run(["ip", "netns", "exec", name, *argv], capture_output=True, text=True, check=True).stdout

    def taps(self) -> set[str]:
        """TAPs in the stack's namespace."""
        return {link["ifname"] for link in json.loads(self.in_namespace("ip", "-j", "tuntap", "show"))}

    def vmms(self) -> list[int]:
        """Pids of the VMM processes of this state directory."""
        from mvm.drivers.qemu.driver import QemuDriver

        found = QemuDriver(self.layout, LocalShell()).processes().values()
        return [process.pid for several in found for process in several]

    def told(self) -> str:
        """What it is at, for whoever looks into a failure: parts, open jobs, and what workers and agent said last."""
        for worker in ("worker", "urgent"):
            with contextlib.suppress(OSError, AssertionError):
                os.kill(self.pid(worker), signal.SIGUSR1)  # Celery logs where its threads are
        asked = [("status",), ("job", "list", "--state", "running"), ("job", "list", "--state", "queued")]
        texts = [self.run(*words, "-o", "json", timeout_s=60).stdout for words in asked]
        for part in ("worker", "urgent", "agent"):
            lines = (self.layout.logs / f"{part}.log").read_text(errors="replace").splitlines()
            texts += [f"--- {part}.log", *lines[-150:]]
        return "\n".join(texts)

    def end(self) -> None:
        """Whatever it is in the middle of, it and its instances are gone."""
        try:
            self.run("down", "--instances", timeout_s=60)
        except subprocess.TimeoutExpired:  # its workers may have been stopped
            for pid in self.vmms():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.run("down")

    def rest(self) -> list[str]:
        """Processes that still name this state directory."""
        left = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with contextlib.suppress(OSError):
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    if str(self.layout.root) in line:
                        left.append(line)
        return left


def _end_abandoned() -> None:
    """End the stacks of those that have ended without doing so themselves."""
    for mark in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{_OWNER}"):
        with contextlib.suppress(FileNotFoundError, BlockingIOError), mark.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # or somebody else is at it
            owner = json.loads(file.read() or "null")
            if owner is None or processes.runs(ProcessIdentity(*owner)):
                continue
            env = {**os.environ, "MVM_STATE_DIR": str(mark.parent / "s"), "PYTHONPATH": str(_ROOT)}
            Stack(StateLayout(mark.parent / "s"), env).end()
            shutil.rmtree(mark.parent, ignore_errors=True)


@contextlib.contextmanager
def running_stack(
    driver: str = "qemu",
    *,
    builds: bool = False,
    up: bool = True,
    before: Callable[[Stack], None] | None = None,
    **settings: str,
) -> Iterator[Stack]:
    """A stack of its own state directory, namespace and ports; nothing of it is left at the end.

    It has the minimal image already, unless it `builds`; what `before` does comes before it is up. Without `up` whoever
    uses it brings it up. What a test run left that was killed goes first.
    """
    _end_abandoned()
    root = Path(tempfile.mkdtemp(prefix=_PREFIX))
    owner = processes.identify(os.getpid())
    assert owner is not None
    (root / _OWNER).write_text(json.dumps([owner.pid, owner.start_ticks]))
    layout = StateLayout(root / "s")
    layout.package_cache.parent.mkdir(parents=True)
    image_cache().package_cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    layout.package_cache.symlink_to(image_cache().package_cache)
    if driver == "qemu" and not builds:
        lay_in(layout, minimal_image())
    env = {name: value for name, value in os.environ.items() if not name.startswith("MVM_")}
    env |= {
        "MVM_STATE_DIR": str(layout.root), "MVM_FLOWER_PORT": str(free_port()), "MVM_METRICS_PORT": str(free_port()),
        "MVM_AGENT_PORT": str(free_port()), "MVM_DRIVER": driver, "PYTHONPATH": str(_ROOT), "MVM_NODE_ID": "n1",
        "MVM_STALE_PID_SWEEP_S": "2", "MVM_BOOT_DEADLINE_S": "120",  # a slow machine is no failure
        "MVM_RECONCILE_SWEEP_S": "2", "MVM_ORPHAN_SWEEP_S": "3", "MVM_ORPHAN_GRACE_S": "3", **settings,
    }  # fmt: skip
    stack, down = Stack(layout, env), False
    try:
        if before:
            before(stack)
        if up:
            stack.mvm("up", "--detach")
        yield stack
        try:
            stack.mvm("down", "--instances", timeout_s=600)  # of the 1,000 jobs there are 400, beside other work
        except (AssertionError, subprocess.TimeoutExpired):
            print(stack.told())
            raise
        assert not stack.rest()
        down = True
    finally:
        if not down:
            stack.end()
        shutil.rmtree(root, ignore_errors=True)
