"""However a guest's agent lies, each verb ends in time, the host does what it has to, and what is recorded is true.

The real channel over real sockets, and the real services. What came of each is in ``build/liars.txt``. Deadlines are
short; with ``MVM_TEST_LIARS=whole`` they are those of a node.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from unittest.mock import patch

import pytest

from mvm.domain.commands import ExecEnd
from mvm.domain.ids import InstanceRef
from mvm.domain.job import Job, JobState, JobVerb, Reason
from mvm.domain.lifecycle import Status
from mvm.drivers import guest_commands
from mvm.drivers.guest_channel import UnixGuestChannel
from mvm.drivers.memory_queue import MemoryQueue
from mvm.drivers.memory_registry import MemoryRegistry
from mvm.drivers.sqlite_store import SqliteStore
from mvm.errors import MvmError
from mvm.settings import Settings
from mvm.wiring import NodePorts, NodeServices, build_node
from tests.services.conftest import NODE
from tests.support.liars import Lie, SocketHost, socket_host

WHOLE = os.environ.get("MVM_TEST_LIARS") == "whole"
REPORT = Path(__file__).parents[2] / "build" / "liars.txt"
SHORT_S, GUEST_S = (10.0, 10.0) if WHOLE else (0.4, 0.4)
GRACE_S = 5.0  # for a busy machine
MOST_SENT = 2 << 20  # bytes: what is heard in a few calls, and what sockets hold back
V, S = JobVerb, Status

pytestmark = pytest.mark.timeout(900 if WHOLE else 300)


@dataclass
class Row:
    """What came of a lie: how the verb ended, and what it cost."""

    verb: str
    lie: Lie
    ended: str
    seconds: float
    sent: int

    def __str__(self) -> str:
        return f"{self.verb:<14} {self.lie:<24} {self.ended:<34} {self.seconds:6.2f} s {self.sent >> 10:>6} KiB heard"


class Told:
    """One guest for each lie, and what became of them."""

    def __init__(self, host: SocketHost, services: NodeServices) -> None:
        self.host = host
        self.services = services
        self.rows: list[Row] = []
        self.ok(V.TENANT_CREATE, "acme")
        self.ok(V.POOL_CREATE, "acme/web", flake_ref="builtin:", profile="minimal", start="cold")
        self.ok(V.POOL_BUILD, "acme/web")
        made = self.ok(V.INSTANCE_CREATE, "acme/web", count=len(Lie))
        refs = [InstanceRef.parse(each["ref"]) for each in made.result["instances"]]  # type: ignore[index]
        self.guests = dict(zip(Lie, refs, strict=True))

    def run(self, verb: JobVerb, subject: str, **params: object) -> Job:
        job = self.services.jobs.submit(verb, subject, NODE, params=params, actor="test", reason=Reason.MANUAL)
        return self.services.runner.run(job)

    def ok(self, verb: JobVerb, subject: str, **params: object) -> Job:
        job = self.run(verb, subject, **params)
        assert job.state is JobState.SUCCEEDED, job.error
        return job

    def status(self, lie: Lie) -> Status:
        return self.services.store.instance(self.guests[lie]).status

    def all_of(self, verb: JobVerb, **params: object) -> None:
        """Every guest is asked, and none lies."""
        for ref in self.guests.values():
            self.host.lie(ref, None)
        with ThreadPoolExecutor(len(Lie)) as threads:
            list(threads.map(lambda ref: self.ok(verb, str(ref), **params), self.guests.values()))

    def lied_to(self, name: str, verb: JobVerb, within_s: float, **params: object) -> dict[Lie, Job]:
        """What came of `verb` with each guest while it lied: within `within_s`, and heard in part only."""
        for lie, ref in self.guests.items():
            self.host.lie(ref, lie)
        with ThreadPoolExecutor(len(Lie)) as threads:
            jobs = dict(zip(Lie, threads.map(lambda lie: self._one(name, verb, lie, params), Lie), strict=True))
        for row in self.rows[-len(Lie) :]:
            assert row.seconds < within_s + GRACE_S, row
            assert row.sent < MOST_SENT, row
        return jobs

    def command(self, lie: Lie) -> Row:
        """What came of a command in the guest that tells this lie."""
        ref, began, ended = self.guests[lie], monotonic(), "nothing"
        before = self.host.heard[ref]
        try:
            for part in self.services.view.run(ref, b"true", deadline_s=SHORT_S):
                if isinstance(part, ExecEnd):
                    ended = "timed out" if part.timed_out else "believed"
        except MvmError as error:
            ended = error.code
        return Row("exec", lie, ended, monotonic() - began, self.host.heard[ref] - before)

    def _one(self, name: str, verb: JobVerb, lie: Lie, params: dict[str, object]) -> Job:
        ref = self.guests[lie]
        before, began = self.host.heard[ref], monotonic()
        job = self.run(verb, str(ref), **params)
        took = monotonic() - began
        ended = str(job.error["code"]) if job.error else job.state.value
        self.rows.append(Row(name, lie, ended, took, self.host.heard[ref] - before))
        return job


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    root = tmp_path_factory.mktemp("liars")
    settings = Settings(
        state_dir=root / "state", node_id="n1", driver="fake", parallel_boots=64, boot_deadline_s=SHORT_S,
        sleep_deadline_s=SHORT_S, stop_grace_s=SHORT_S, health_answer_s=SHORT_S, job_attempts=1,
    )  # fmt: skip
    with ExitStack() as stack:
        for module in ("microvm", "snapshots", "secrets"):
            stack.enter_context(patch(f"mvm.services.{module}._GUEST_S", GUEST_S))
        host = stack.enter_context(socket_host(root / "state"))
        store = SqliteStore(root / "node.db")
        stack.callback(store.close)
        ports = NodePorts(
            store, MemoryRegistry(host.clock), MemoryQueue(host.clock), host.locks, host.clock, host.vmm,
            UnixGuestChannel(), host.network, host.packets, None, host.storage, host.images, host.memory, host.audit,
            host.cgroups, host.secrets,
        )  # fmt: skip
        made = Told(host, build_node(ports, settings, authorized_key="ssh-ed25519 AAAA test"))
        yield made
        REPORT.parent.mkdir(exist_ok=True)
        REPORT.write_text("".join(f"{row}\n" for row in made.rows))


HONEST = {Lie.PRETENDS}  # nobody can see that it lies, until it is to end


def test_a_start_fails_and_leaves_no_vmm(told: Told) -> None:
    jobs = told.lied_to("start", V.INSTANCE_START, 2 * SHORT_S + 2 * GUEST_S)
    for lie, job in jobs.items():
        assert job.state is JobState.FAILED, (lie, job.result)  # hello has three words, which "yes" has not
        assert told.status(lie) is S.READY, lie
    assert not told.host.machines
    assert not told.host.leaks()


def test_warm_needs_no_word_of_the_guest(told: Told) -> None:
    told.all_of(V.INSTANCE_START)
    for lie, job in told.lied_to("warm", V.INSTANCE_WARM, 1.0).items():
        assert job.state is JobState.SUCCEEDED, (lie, job.error)
        assert told.host.machines[told.guests[lie]].paused, lie


def test_a_wake_of_a_warm_one_is_told_and_it_runs(told: Told) -> None:
    for lie, job in told.lied_to("wake (warm)", V.INSTANCE_WAKE, GUEST_S).items():
        assert job.state is (JobState.SUCCEEDED if lie in HONEST else JobState.FAILED), (lie, job.result, job.error)
        assert told.status(lie) is S.RUNNING, lie
        assert not told.host.machines[told.guests[lie]].paused, lie


def test_health_finds_them_out(told: Told) -> None:
    for lie, ref in told.guests.items():
        told.host.lie(ref, lie)
    before, began = told.host.heard.copy(), monotonic()
    found = told.ok(V.SWEEP_HEALTH, str(NODE))
    took = monotonic() - began
    assert found.result is not None
    assert took < SHORT_S * (len(Lie) / 8 + 1) + GRACE_S
    failing = {each["ref"] for each in found.result["failing"]}
    told.rows += [
        Row("health", lie, "not well" if str(ref) in failing else "well", took, told.host.heard[ref] - before[ref])
        for lie, ref in told.guests.items()
    ]
    assert {lie for lie, ref in told.guests.items() if str(ref) not in failing} <= HONEST


def test_a_sleep_fails_and_the_guest_runs_on_and_a_forced_one_does_not_ask(told: Told) -> None:
    for lie, job in told.lied_to("sleep", V.INSTANCE_SLEEP, SHORT_S).items():
        if lie in HONEST or lie is Lie.HUGE or lie is Lie.NAN:  # a yes with more words is a yes
            assert told.status(lie) is S.SLEEPING, (lie, job.error)
            continue
        assert job.error is not None, lie
        assert job.error["code"] in ("guest.not_ready", "guest.gone"), (lie, job.error)
        assert told.status(lie) is S.RUNNING, lie
        assert not told.host.machines[told.guests[lie]].paused, lie
    for lie in Lie:
        if told.status(lie) is S.RUNNING:
            told.ok(V.INSTANCE_SLEEP, str(told.guests[lie]), force=True)
        assert told.status(lie) is S.SLEEPING, lie


def test_a_wake_fails_and_it_sleeps_on_and_wakes_once_it_is_honest(told: Told) -> None:
    for lie, job in told.lied_to("wake", V.INSTANCE_WAKE, GUEST_S).items():
        woken = lie in HONEST
        assert job.state is (JobState.SUCCEEDED if woken else JobState.FAILED), (lie, job.result, job.error)
        assert told.status(lie) is (S.RUNNING if woken else S.SLEEPING), lie
    for lie, ref in told.guests.items():
        told.host.lie(ref, None)
        if told.status(lie) is S.SLEEPING:
            told.ok(V.INSTANCE_WAKE, str(ref))


def test_a_command_ends_in_time_and_nobody_is_believed(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest_commands, "_OLD_GRACE_S", GUEST_S)
    for lie, ref in told.guests.items():
        told.host.lie(ref, lie)
    with ThreadPoolExecutor(len(Lie)) as threads:
        rows = list(threads.map(told.command, Lie))
    told.rows += rows
    for row in rows:
        assert row.seconds < SHORT_S + GUEST_S + GRACE_S, row
        assert row.ended in ("guest.refused", "guest.silent", "guest.gone", "timed out"), row
    assert [row.lie for row in rows if row.ended == "timed out"] == [Lie.CRUMBS]  # it is output


@pytest.mark.parametrize("verb", [V.INSTANCE_STOP, V.INSTANCE_DESTROY])
def test_a_stop_and_a_destroy_end_the_vmm(told: Told, verb: JobVerb) -> None:
    if any(told.status(lie) is not S.RUNNING for lie in Lie):
        told.all_of(V.INSTANCE_START)
    for lie, job in told.lied_to(verb.value.partition(".")[2], verb, 2 * SHORT_S).items():
        assert job.state is JobState.SUCCEEDED, (lie, job.error)
    assert not told.host.machines
    assert not told.host.leaks()
