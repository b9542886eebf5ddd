"""ports/locks.py."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Thread

import pytest

from mvm.drivers.fake import FakeHost
from mvm.drivers.locks import FileLocks
from mvm.errors import TimedOut
from mvm.ports.locks import Locks


@pytest.fixture(params=["fake", "files"])
def locks(request: pytest.FixtureRequest, tmp_path: Path) -> Locks:
    return FakeHost().locks if request.param == "fake" else FileLocks(tmp_path / "locks")


def test_a_lock_is_held_by_one(locks: Locks) -> None:
    with locks.hold("acme/web/i-00000001", deadline_s=0):
        with pytest.raises(TimedOut) as busy, locks.hold("acme/web/i-00000001", deadline_s=0.05):
            pytest.fail("two hold it")
        assert busy.value.code == "lock.busy"
    with locks.hold("acme/web/i-00000001", deadline_s=0):
        pass


@pytest.mark.parametrize("other", ["acme/web", "acme/web/i-00000001/", "acme%2fweb", ".", "..", "", "a b", "x" * 400])
def test_other_names_are_other_locks(locks: Locks, other: str) -> None:
    with locks.hold("acme/web/i-00000001", deadline_s=0), locks.hold("x" * 399, deadline_s=0):
        with locks.hold(other, deadline_s=0):
            pass


def test_one_may_wait_until_nobody_holds_a_lock(locks: Locks) -> None:
    assert locks.wait_free("x", deadline_s=0)
    with locks.hold("x", deadline_s=0):
        assert not locks.wait_free("x", deadline_s=0.02)
    assert locks.wait_free("x", deadline_s=0)
    with locks.hold("x", deadline_s=0):
        pass


def test_an_error_within_frees_the_lock(locks: Locks) -> None:
    with pytest.raises(ZeroDivisionError), locks.hold("x", deadline_s=0):
        _ = 1 / 0
    with locks.hold("x", deadline_s=0):
        pass


def test_one_that_waits_gets_it_when_it_is_freed(locks: Locks) -> None:
    got = Event()

    def wait() -> None:
        with locks.hold("x", deadline_s=30):
            got.set()

    waiter = Thread(target=wait)
    with locks.hold("x", deadline_s=0):
        waiter.start()
        assert not got.wait(0.05)
    assert got.wait(30)
    waiter.join()


def test_threads_exclude_each_other(locks: Locks) -> None:
    inside, most, total = 0, 0, 0

    def work(_: int) -> None:
        nonlocal inside, most, total
        with locks.hold("x", deadline_s=60):
            inside += 1
            most = max(most, inside)
            before = total
            Event().wait(0.0005)  # gives the others their chance
            total = before + 1
            inside -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(64)))
    assert (most, total) == (1, 64)


# --- between processes

_HOLDER = """
import sys
from pathlib import Path
from mvm.drivers.locks import FileLocks
with FileLocks(Path(sys.argv[1])).hold("x", deadline_s=30):
    print("held", flush=True)
    sys.stdin.read()
"""

_COUNTER = """
import sys
from pathlib import Path
from mvm.drivers.locks import FileLocks
locks, total = FileLocks(Path(sys.argv[1])), Path(sys.argv[2])
for _ in range(100):
    with locks.hold("x", deadline_s=60):
        total.write_text(str(int(total.read_text()) + 1))
"""


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    locks = FileLocks(tmp_path)
    argv = [sys.executable, "-c", _HOLDER, str(tmp_path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(TimedOut), locks.hold("x", deadline_s=0):
            pytest.fail("two hold it")
        os.kill(holder.pid, signal.SIGKILL)
        with locks.hold("x", deadline_s=30):
            pass


def test_processes_exclude_each_other_though_lock_files_come_and_go(tmp_path: Path) -> None:
    total = tmp_path / "total"
    total.write_text("0")
    argv = [sys.executable, "-c", _COUNTER, str(tmp_path / "locks"), str(total)]
    workers = [subprocess.Popen(argv) for _ in range(3)]
    assert [worker.wait(60) for worker in workers] == [0, 0, 0]
    assert total.read_text() == "300"
    assert list((tmp_path / "locks").iterdir()) == []


def test_a_file_that_was_removed_before_it_was_locked_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when its last holder ends between another's opening and locking it."""
    locks, flock = FileLocks(tmp_path), fcntl.flock

    def late(fd: int, operation: int) -> None:
        monkeypatch.undo()
        (file,) = tmp_path.iterdir()
        file.unlink()
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with locks.hold("x", deadline_s=0), pytest.raises(TimedOut), locks.hold("x", deadline_s=0):
        pytest.fail("two hold it")


def test_lock_files_are_private(tmp_path: Path) -> None:
    with FileLocks(tmp_path / "locks").hold("acme/web", deadline_s=0):
        (file,) = (tmp_path / "locks").iterdir()
        assert file.stat().st_mode & 0o777 == 0o600
        assert (tmp_path / "locks").stat().st_mode & 0o777 == 0o700
    assert not file.exists()
