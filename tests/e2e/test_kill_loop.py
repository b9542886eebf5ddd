"""``kill -9`` of the worker, of QEMU, or of both after every step of sleep and of wake, on real guests.

The table of what came of it is ``build/kill-loop.txt``. ``MVM_TEST_KILLS=all`` kills each of the three at each step;
otherwise each step has its turn with one of them.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import pytest

from mvm.domain.ids import InstanceRef, NodeId
from mvm.domain.job import Job, JobState, JobVerb, Reason
from mvm.domain.layout import StateLayout
from mvm.domain.lifecycle import Status
from mvm.drivers import netns
from mvm.drivers.cgroups import LinuxCgroups
from mvm.drivers.clock import SystemClock
from mvm.drivers.guest_channel import UnixGuestChannel
from mvm.drivers.identity import mark
from mvm.drivers.linux_network import LinuxNetwork
from mvm.drivers.memory_queue import MemoryQueue
from mvm.drivers.memory_registry import MemoryRegistry
from mvm.drivers.qemu import driver as qemu
from mvm.drivers.qemu import memory
from mvm.drivers.qemu.driver import QemuDriver
from mvm.drivers.qemu.qmp import Qmp
from mvm.drivers.shell import LocalShell
from mvm.services.runner import Runner
from mvm.settings import Settings
from mvm.wiring import NodeServices, build_node, open_ports
from tests.support.microvm import SshKey, image_cache, minimal_image
from tests.support.namespace import unique_name

pytestmark = [pytest.mark.root, pytest.mark.guest, pytest.mark.timeout(900)]

V = JobVerb
NODE = NodeId("n1")
TABLE = Path(__file__).parents[2] / "build" / "kill-loop.txt"
KEY = SshKey.make().public

Point = tuple[str, Any, str, str]
"""What has just been done, and how that is noticed: the holder of a function, its name, and before or after it."""

SLEEP: tuple[Point, ...] = (
    ("began", UnixGuestChannel, "prepare_sleep", "before"),
    ("guest got ready", UnixGuestChannel, "prepare_sleep", "after"),
    ("memory and devices written", qemu, "_write_state", "after"),
    ("snapshot in place", QemuDriver, "_kill", "before"),
    ("QEMU ended", QemuDriver, "save", "after"),
    ("TAP removed", LinuxNetwork, "remove_taps", "after"),
    ("recorded as sleeping", Runner, "_publish", "before"),
)
WAKE: tuple[Point, ...] = (
    ("began", LinuxNetwork, "ensure_tap", "before"),
    ("TAP there", LinuxNetwork, "ensure_tap", "after"),
    ("QEMU started", Qmp, "__enter__", "after"),
    ("memory written", memory, "unpack_into", "after"),
    ("restored", QemuDriver, "restore", "after"),
    ("resumed", QemuDriver, "resume", "after"),
    ("time told", UnixGuestChannel, "wake", "after"),
    ("recorded as running", QemuDriver, "discard", "before"),
    ("snapshot dropped", Runner, "_publish", "before"),
)
KILLED = ("worker", "QEMU", "worker and QEMU")
STEPS = [(V.INSTANCE_SLEEP, point) for point in SLEEP] + [(V.INSTANCE_WAKE, point) for point in WAKE]
KILLS = [
    pytest.param(verb, point, killed, id=f"{verb}-{point[0].replace(' ', '_')}-{killed.replace(' ', '_')}")
    for number, (verb, point) in enumerate(STEPS)
    for turn, killed in enumerate(KILLED)
    if number % len(KILLED) == turn or os.environ.get("MVM_TEST_KILLS") == "all"
]


@dataclass
class Node:
    """A node whose jobs run here or, to be killed, in a child."""

    layout: StateLayout
    services: NodeServices
    queue: MemoryQueue

    @classmethod
    def open(cls, layout: StateLayout) -> Node:
        registry, queue = MemoryRegistry(SystemClock()), MemoryQueue(SystemClock())
        settings = Settings(state_dir=layout.root, node_id=NODE, orphan_grace_s=0)
        ports = replace(open_ports(settings), registry=registry, queue=queue)
        return cls(layout, build_node(ports, settings, authorized_key=KEY), queue)

    def do(self, verb: JobVerb, subject: str, reason: Reason = Reason.MANUAL, **params: Any) -> Job:
        job = self.services.jobs.submit(verb, subject, NODE, params=params, actor="test", reason=reason)
        self.queue.drain(self.services.runner.run)
        return self.services.jobs.job(job.job_id)

    def ok(self, verb: JobVerb, subject: str, **params: Any) -> dict[str, Any]:
        job = self.do(verb, subject, **params)
        assert job.state is JobState.SUCCEEDED, job.error
        return dict(job.result or {})

    def sweep(self) -> dict[str, Any]:
        """Both sweeps, twice; what the last one of orphans still found."""
        found: dict[str, Any] = {}
        for _ in range(2):
            for verb in (V.SWEEP_STALE_PIDS, V.SWEEP_ORPHANS):
                job = self.do(verb, str(NODE), Reason.SWEEP)
                assert job.state is JobState.SUCCEEDED, job.error
                found = dict(job.result or {})
        return found

    @property
    def driver(self) -> QemuDriver:
        return QemuDriver(self.layout, LocalShell())


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    minimal_image()
    layout = StateLayout(tmp_path_factory.mktemp("node") / "s")
    layout.root.mkdir(mode=0o700)
    layout.images.symlink_to(image_cache().images)
    layout.package_cache.parent.mkdir(parents=True)
    layout.package_cache.symlink_to(image_cache().package_cache)
    shell, name = LocalShell(), unique_name()
    netns.create(shell, name)
    try:
        with netns.entered(netns.path_of(name)):
            opened = Node.open(layout)
            try:
                opened.ok(V.TENANT_CREATE, "acme")
                opened.ok(
                    V.POOL_CREATE, "acme/web", flake_ref="builtin:", profile="minimal", resources={"mem_mib": 128}
                )
                opened.ok(V.POOL_BUILD, "acme/web")
                yield opened
            finally:
                for ref in opened.driver.processes():
                    opened.driver.kill(ref, None)
                LinuxCgroups(mark(layout)).close()
    finally:
        netns.delete(shell, name)


@pytest.fixture(scope="module")
def rows() -> Iterator[list[tuple[str, ...]]]:
    table: list[tuple[str, ...]] = [("VERB", "AFTER THE STEP", "KILLED", "JOB", "STATE", "THEN")]
    yield table
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ("  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in table)
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text("\n".join(lines) + "\n")


def run_and_kill(node: Node, job: Job, ref: InstanceRef, point: Point, killed: str) -> int:
    """Run `job` in a child that is a worker of its own; the wait status it ended with."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    try:
        _work(node.layout, job, ref, point, killed)
    finally:
        os._exit(3)


def _work(layout: StateLayout, job: Job, ref: InstanceRef, point: Point, killed: str) -> NoReturn:
    _, holder, name, when = point
    real: Callable[..., Any] = getattr(holder, name)
    begun = False

    def kill() -> None:
        if "QEMU" in killed:
            driver = QemuDriver(layout, LocalShell())
            for process in driver.processes().get(ref, ()):
                os.kill(process.pid, signal.SIGKILL)
                driver.wait_gone(process, deadline_s=10)
        if "worker" in killed:
            os.kill(os.getpid(), signal.SIGKILL)

    def then_kill(*args: Any, **kwargs: Any) -> Any:
        nonlocal begun
        first, begun = not begun, True
        if first and when == "before":
            kill()
        result = real(*args, **kwargs)
        if first and when == "after":
            kill()
        return result

    worker = Node.open(layout)
    setattr(holder, name, then_kill)
    final = worker.services.runner.run(job)
    os._exit(0 if begun and final.state.final else 2)


@pytest.mark.parametrize(("verb", "point", "killed"), KILLS)
def test_what_is_left_is_true_and_can_go_on(
    node: Node, rows: list[tuple[str, ...]], verb: JobVerb, point: Point, killed: str
) -> None:
    subject = node.ok(V.INSTANCE_CREATE, "acme/web")["instances"][0]["ref"]
    ref = InstanceRef.parse(subject)
    node.ok(V.INSTANCE_START, subject)
    if verb is V.INSTANCE_WAKE:
        node.ok(V.INSTANCE_SLEEP, subject)
    job = node.services.jobs.new(verb, subject, NODE, actor="test")

    status = run_and_kill(node, job, ref, point, killed)
    if "worker" in killed:
        assert os.WIFSIGNALED(status)
        assert os.WTERMSIG(status) == signal.SIGKILL
    else:
        assert os.waitstatus_to_exitcode(status) == 0
    done = node.services.runner.run(job)  # delivered again
    assert done.state.final
    node.sweep()
    after = node.services.store.instance(ref).status
    check(node, ref, after)

    then = {Status.RUNNING: V.INSTANCE_SLEEP, Status.SLEEPING: V.INSTANCE_WAKE}.get(after, V.INSTANCE_START)
    node.ok(then, subject)
    check(node, ref, node.services.store.instance(ref).status)
    node.ok(V.INSTANCE_DESTROY, subject)
    assert not node.driver.processes()
    assert not LinuxNetwork(LocalShell()).taps()
    assert not node.layout.instance(ref).exists()
    outcome = done.state.value if done.error is None else f"{done.state.value}: {done.error['code']}"
    did, next_ = (each.value.partition(".")[2] for each in (verb, then))
    rows.append((did, point[0], killed, outcome, after.value, f"{next_}: succeeded"))


def check(node: Node, ref: InstanceRef, status: Status) -> None:
    """The host is as `status` says, and nothing is left over."""
    record, runs = node.services.store.instance(ref), node.driver.processes().get(ref, ())
    assert record.in_flight is None
    assert len(runs) == (status is Status.RUNNING)
    if runs:
        assert record.process == runs[0]
        UnixGuestChannel().hello(ref, node.layout.instance(ref), deadline_s=20)
    taps = LinuxNetwork(LocalShell()).taps()
    assert len(taps) == (status is Status.RUNNING), taps
    left = {path.name for path in node.layout.instance(ref).glob("snapshot*")}
    assert left == ({"snapshot"} if status is Status.SLEEPING else set())
