"""Processes and the shell that starts them."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from mvm.domain.instance import ProcessIdentity
from mvm.drivers import processes
from mvm.drivers.shell import LocalShell
from mvm.errors import Failed, TimedOut
from tests.support.waiting import until

LONG = 60.0


@pytest.fixture
def shell() -> LocalShell:
    return LocalShell()


def spawn(shell: LocalShell, tmp_path: Path, *argv: str, pass_fds: tuple[int, ...] = ()) -> ProcessIdentity:
    return shell.spawn(argv, log=tmp_path / "log", pass_fds=pass_fds)


def end(process: ProcessIdentity) -> None:
    processes.kill(process)
    assert processes.wait_gone(process, LONG)


# --- run
def test_run_returns_both_streams(shell: LocalShell, tmp_path: Path) -> None:
    done = shell.run(["sh", "-c", "cat; echo $X >&2; pwd"], stdin="in\n", env={"X": "é"}, cwd=tmp_path)
    assert (done.stdout, done.stderr) == (f"in\n{tmp_path}\n", "é\n")


def test_run_tells_how_a_program_failed(shell: LocalShell) -> None:
    with pytest.raises(Failed) as caught:
        shell.run(["sh", "-c", "echo out; echo why >&2; exit 3"])
    assert caught.value.code == "shell.failed"
    assert "why" in caught.value.message
    assert caught.value.fields == {"exit_code": 3, "stdout": "out\n", "stderr": "why\n"}


def test_run_has_a_deadline(shell: LocalShell) -> None:
    with pytest.raises(TimedOut) as caught:
        shell.run(["sh", "-c", "echo so far; exec sleep 600"], timeout_s=0.2)
    assert caught.value.code == "shell.timed_out"


@pytest.mark.parametrize("start", ["run", "spawn"])
def test_a_missing_program_is_named(shell: LocalShell, tmp_path: Path, start: str) -> None:
    with pytest.raises(Failed) as caught:
        shell.run(["no-such-program"]) if start == "run" else spawn(shell, tmp_path, "no-such-program")
    assert caught.value.code == "shell.missing"
    assert "no-such-program" in caught.value.message


# --- spawn
def test_what_is_spawned_has_a_session_and_a_log_of_its_own(shell: LocalShell, tmp_path: Path) -> None:
    process = spawn(shell, tmp_path, "sh", "-c", "echo out; echo err >&2; cat; exec sleep 600")
    assert os.getsid(process.pid) == process.pid
    until(lambda: (tmp_path / "log").read_text() == "out\nerr\n", LONG, "its words are in the log")
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600
    end(process)


def test_it_inherits_what_it_is_given_and_nothing_else(shell: LocalShell, tmp_path: Path) -> None:
    given, kept = os.pipe()
    process = spawn(shell, tmp_path, "sh", "-c", "ls -l /proc/self/fd; exec sleep 600", pass_fds=(kept,))
    until(lambda: "total" in (tmp_path / "log").read_text() and _ended(tmp_path), LONG, "it has listed them")
    listed = {int(line.split()[8]) for line in (tmp_path / "log").read_text().splitlines() if " -> " in line}
    assert kept in listed
    assert given not in listed
    assert not os.get_inheritable(kept)
    end(process)
    os.close(given)
    os.close(kept)


def _ended(tmp_path: Path) -> bool:
    return (tmp_path / "log").read_text().count("->") >= 4


def test_signals_that_python_ignores_have_their_meaning_again(shell: LocalShell, tmp_path: Path) -> None:
    process = spawn(shell, tmp_path, "sleep", "600")
    status = Path(f"/proc/{process.pid}/status").read_text()
    (ignored,) = (int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigIgn"))
    assert not ignored & (1 << (signal.SIGPIPE - 1))
    end(process)


# --- identity
def test_a_process_runs_under_its_identity_alone(shell: LocalShell, tmp_path: Path) -> None:
    process = spawn(shell, tmp_path, "sleep", "600")
    assert processes.identify(process.pid) == process
    assert processes.runs(process)
    until(lambda: processes.arguments(process.pid) == ["sleep", "600"], LONG, "the kernel has set its words up")
    other = process._replace(start_ticks=process.start_ticks + 1)
    assert not processes.runs(other)
    processes.kill(other)
    assert processes.wait_gone(other, 0)
    assert processes.runs(process)
    end(process)


def test_one_that_has_ended_is_no_zombie_once_looked_at(shell: LocalShell, tmp_path: Path) -> None:
    process = spawn(shell, tmp_path, "true")
    until(lambda: not processes.runs(process), LONG, "it ended")
    assert not Path(f"/proc/{process.pid}").exists()
    assert processes.identify(process.pid) is None
    assert processes.arguments(process.pid) == []
    processes.kill(process)
    assert processes.wait_gone(process, 0)


def test_waiting_has_a_deadline(shell: LocalShell, tmp_path: Path) -> None:
    process = spawn(shell, tmp_path, "sleep", "600")
    assert not processes.wait_gone(process, 0.05)
    end(process)


_LEADER_LEAVES = """
import ctypes, threading, time
threading.Thread(target=lambda: threading.Event().wait(600), daemon=True).start()
print("ready", flush=True)
ctypes.CDLL(None).pthread_exit(None)
"""


def test_a_process_whose_first_thread_has_ended_still_runs(shell: LocalShell, tmp_path: Path) -> None:
    process = spawn(shell, tmp_path, sys.executable, "-c", _LEADER_LEAVES)

    def leader_is_a_zombie() -> bool:
        return ") Z " in Path(f"/proc/{process.pid}/stat").read_text()

    until(leader_is_a_zombie, LONG, "its first thread has ended")
    assert processes.runs(process)
    assert not processes.wait_gone(process, 0.05)
    end(process)


def test_a_name_like_a_stat_line_misleads_nobody(shell: LocalShell, tmp_path: Path) -> None:
    program = tmp_path / ") Z 1 (x"
    program.symlink_to("/bin/sleep")
    process = spawn(shell, tmp_path, str(program), "600")
    assert processes.runs(process)
    end(process)


def test_every_pid_is_listed(shell: LocalShell) -> None:
    assert {1, os.getpid()} <= set(processes.pids())


# --- children that others end
def test_a_child_that_another_process_ended_is_no_zombie(shell: LocalShell, tmp_path: Path) -> None:
    child = spawn(shell, tmp_path, "sleep", "600")
    shell.run(["sh", "-c", f"kill -9 {child.pid}"])
    until(lambda: not Path(f"/proc/{child.pid}").exists(), LONG, "it is gone though nobody asked")


def test_many_children_that_end_at_once_are_all_reaped(shell: LocalShell, tmp_path: Path) -> None:
    children = [spawn(shell, tmp_path, "true") for _ in range(30)]
    until(lambda: not any(Path(f"/proc/{each.pid}").exists() for each in children), LONG, "they are gone")


def test_a_process_that_is_forked_off_takes_leave_of_its_own_children(shell: LocalShell, tmp_path: Path) -> None:
    """And its parent hears of none of them: it would look for descriptors that it does not have."""
    forked = os.fork()
    if not forked:
        try:
            ended = spawn(shell, tmp_path, "true").pid
            until(lambda: processes.identify(ended) is None, LONG, "it is gone though nobody asked")
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(forked, 0)[1] == 0
    mine = spawn(shell, tmp_path, "true").pid
    until(lambda: processes.identify(mine) is None, LONG, "that of the parent is gone, too")
