"""A worker process that is stopped in the middle of a job, taken for dead, and continued: it can do nothing late."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mvm.domain.ids import NodeId
from mvm.domain.job import Job, JobState, JobVerb
from mvm.domain.lifecycle import Status
from mvm.drivers.locks import FileLocks
from mvm.errors import TimedOut
from tests.support.stoppable import open_worker
from tests.support.waiting import until

V = JobVerb
NODE = NodeId("n1")
REPO = Path(__file__).parents[2]


class Fleet:
    """The process of the test, which is one worker of the node."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.node, self.host = open_worker(root, takeover_s=1)
        for verb, subject, params in (
            (V.TENANT_CREATE, "acme", {}),
            (V.POOL_CREATE, "acme/web", {"flake_ref": "builtin:", "profile": "minimal", "start": "cold"}),
            (V.POOL_BUILD, "acme/web", {}),
            (V.INSTANCE_CREATE, "acme/web", {}),
        ):
            assert self.do(verb, subject, **params).state is JobState.SUCCEEDED
        self.ref = self.node.store.instances()[0].ref

    def job(self, verb: JobVerb, subject: str, **params: Any) -> Job:
        return self.node.jobs.new(verb, subject, NODE, params=params, actor="test")

    def do(self, verb: JobVerb, subject: str, **params: Any) -> Job:
        return self.node.runner.run(self.job(verb, subject, **params))

    def world(self) -> tuple[Any, Any]:
        """The instance's row, and what runs."""
        with self.host.turn():
            taps = dict(self.host.taps)
        return self.node.store.instance(self.ref), (self.host.vmm.processes(), taps)


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path)


@contextmanager
def stopped(fleet: Fleet, job: Job, moment: str) -> Iterator[Callable[[str], dict[str, Any]]]:
    """Another worker of the node, stopped at `moment` of `job`; what is yielded continues it and returns its record."""
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.support.stoppable", str(fleet.root), json.dumps(job.to_dict()), moment],
        cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdin is not None
    assert child.stdout is not None
    stdout = child.stdout
    try:
        line = next(line for line in stdout if line.startswith("at "))
        assert line == f"at {moment}\n"
        child.send_signal(signal.SIGSTOP)
        until(lambda: _state(child.pid) == "T", 10, "it is stopped")

        def resume(how: str) -> dict[str, Any]:
            child.send_signal(signal.SIGCONT)
            out, _ = child.communicate(f"{how}\n", timeout=60)
            record: dict[str, Any] = json.loads(out.splitlines()[-1])
            return record

        yield resume
    finally:
        child.kill()
        child.communicate()


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("how", ["go on", "fail"])
@pytest.mark.parametrize("moment", ["network.ensure_tap", "vmm.boot", "guest.hello", "guest.configure"])
def test_late_work_on_an_instance_that_another_job_has_taken_over(fleet: Fleet, moment: str, how: str) -> None:
    job = fleet.job(V.INSTANCE_START, str(fleet.ref))
    with stopped(fleet, job, moment) as resume:
        taken = fleet.do(V.INSTANCE_START, str(fleet.ref))
        assert taken.state is JobState.SUCCEEDED
        before = fleet.world()
        assert before[0].status is Status.RUNNING
        late = resume(how)
    assert late["state"] == "failed"
    assert late["error"]["code"] == "job.fenced"
    assert fleet.world() == before
    assert not fleet.host.leaks()
    assert fleet.do(V.INSTANCE_STOP, str(fleet.ref)).state is JobState.SUCCEEDED
    assert not fleet.host.leaks()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("how", ["go on", "fail"])
def test_late_work_on_a_job_that_another_worker_has_ended(fleet: Fleet, how: str) -> None:
    job = fleet.job(V.INSTANCE_START, str(fleet.ref))
    with stopped(fleet, job, "guest.hello") as resume:
        done = fleet.node.runner.run(job)
        assert (done.state, done.deaths) == (JobState.SUCCEEDED, 1)
        before = fleet.world()
        late = resume(how)
    assert late == done.to_dict(), "it tells what the other one has recorded"
    assert fleet.node.store.job(job.job_id) == done
    assert fleet.world() == before


@pytest.mark.timeout(60)
def test_a_stopped_holder_loses_its_lock_and_nobody_elses(tmp_path: Path) -> None:
    script = ("import sys; from pathlib import Path; from mvm.drivers.locks import FileLocks\n"
              "with FileLocks(Path(sys.argv[1])).hold('x', deadline_s=1):\n"
              "    print('held', flush=True); sys.stdin.readline()\n"
              "print('released', flush=True)")  # fmt: skip
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=REPO,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        locks = FileLocks(tmp_path, takeover_s=1)
        with pytest.raises(TimedOut), locks.hold("x", deadline_s=2):
            pass  # it runs: nobody takes it over
        child.send_signal(signal.SIGSTOP)
        with pytest.raises(TimedOut), locks.hold("x", deadline_s=0):
            pass  # who does not wait has not seen it stopped
        with locks.hold("x", deadline_s=20):
            child.send_signal(signal.SIGCONT)
            out, _ = child.communicate("\n", timeout=20)
            assert out == "released\n"
            with pytest.raises(TimedOut), locks.hold("x", deadline_s=0.1):
                pass  # its release left the file of ours
        assert not list(tmp_path.glob("x*"))
    finally:
        child.kill()
        child.communicate()
