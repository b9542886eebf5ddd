"""Killed between the store and the trail, or within an append: no entry is lost, and none is there twice."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from mvm.domain.audit import START, AuditEntry, Kind, chained, read_line, verify
from mvm.domain.ids import NodeId, TenantId
from mvm.drivers.audit_log import FileAuditLog
from mvm.drivers.clock import SystemClock
from mvm.drivers.locks import FileLocks
from mvm.drivers.sqlite_store import SqliteStore
from mvm.services.audit import Audit
from mvm.services.precedence import Precedence
from tests.support import make

ACME = TenantId("acme")

_VICTIM = """
import os, signal, sys
from pathlib import Path
from mvm.drivers import audit_log
from tests.services.test_audit_crash import Trails

root, moment = Path(sys.argv[1]), sys.argv[2]
trails = Trails(root)
trails.end_jobs(2)
trails.audit.complete()

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

if moment == "before append":
    audit_log.FileTrail.append = die
elif moment == "after append":
    trails.store.drop_audit = die
else:
    real = os.write
    def half(fd, data):
        real(fd, data[: int(moment)])
        die()
    audit_log.os.write = half
trails.end_jobs(3)
trails.audit.complete()
"""


class Trails:
    """The audit service over a store and files below `root`."""

    def __init__(self, root: Path) -> None:
        self.store = SqliteStore(root / "node.db")
        locks = FileLocks(root / "locks")
        self.log = FileAuditLog(root / "audit", locks, rotate_bytes=1500)
        self.audit = Audit(self.store, self.log, SystemClock(), Precedence(locks), NodeId("n1"))

    def end_jobs(self, count: int, **changes: Any) -> None:
        for _ in range(count):
            job = make.ended(make.job(**changes))
            with self.store.transaction():
                self.audit.job_ended(job, {})
                self.store.put_job(job)

    def entries(self) -> list[dict[str, Any]]:
        with self.log.hold(ACME) as trail:
            return [read_line(line) or {} for line in trail.tail(1000)]

    def whole(self) -> bool:
        with self.log.hold(ACME) as trail:
            return not verify(trail.files(), self.store.audit_head(ACME)).findings


def kill(root: Path, moment: str) -> None:
    done = subprocess.run([sys.executable, "-c", _VICTIM, str(root), moment], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize("moment", ["before append", "after append", "1", "400", "900", "1300"])
def test_killed_at_any_moment_every_entry_is_there_once(tmp_path: Path, moment: str) -> None:
    kill(tmp_path, moment)
    after = Trails(tmp_path)
    after.audit.complete()
    entries = after.entries()
    jobs = [entry["job_id"] for entry in entries if entry["kind"] == "job"]
    assert len(jobs) == len(set(jobs)) == 5
    recovered = [entry["cut"]["bytes"] for entry in entries if entry["kind"] == "recovered"]
    assert len(recovered) == moment.isdigit()
    assert after.whole()
    assert after.store.pending_audit(ACME) == []
    after.end_jobs(1)
    after.audit.complete()
    assert len(after.entries()) == len(entries) + 1
    assert after.whole()
    after.store.close()


def test_killed_while_it_recovers_the_recovery_is_noted_once(tmp_path: Path) -> None:
    kill(tmp_path, "400")
    after = Trails(tmp_path)
    with after.log.hold(ACME) as trail:
        half = trail.half()
    assert half
    for _ in range(2):  # noted, and killed before it was cut off
        after.audit._note_recovery(ACME, half)
    after.audit.complete()
    assert [entry["cut"]["bytes"] for entry in after.entries() if entry["kind"] == "recovered"] == [len(half)]
    assert after.whole()
    after.store.close()


def test_two_services_append_what_either_has_ended(tmp_path: Path) -> None:
    one, two = Trails(tmp_path), Trails(tmp_path)
    for _ in range(5):
        one.end_jobs(2)
        two.end_jobs(1)
        two.audit.complete()
        one.end_jobs(1)
        one.audit.complete()
    assert [entry["seq"] for entry in one.entries()] == list(range(1, 21))
    assert two.whole()
    one.store.close()
    two.store.close()


def test_a_trail_that_cannot_be_written_holds_up_no_other(tmp_path: Path) -> None:
    trails, later = Trails(tmp_path), TenantId("zeta")
    (tmp_path / "audit").mkdir()
    (tmp_path / "audit/acme").write_text("in the way")
    trails.store.put_audit(ACME, *chained(_entry(), START))
    trails.end_jobs(1, subject="zeta/web/i-00000001")
    with capture_logs() as logs:
        trails.audit.complete()
    assert [(log["tenant"], log["code"]) for log in logs] == [("acme", "audit.failed")]
    assert (len(trails.store.pending_audit(ACME)), len(trails.store.pending_audit(later))) == (1, 0)
    (tmp_path / "audit/acme").unlink()
    trails.audit.complete()
    assert trails.whole()
    assert len(trails.entries()) == 1
    trails.store.close()


def _entry() -> AuditEntry:
    return AuditEntry(make.START, make.NODE, Kind.JOB, "ann", "manual", "tenant.create", ACME, "succeeded")
