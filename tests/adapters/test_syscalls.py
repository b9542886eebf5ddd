"""Programs assembled from lists of system calls."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mvm.drivers.syscalls import ARGUMENTS, FAILED, Call, failure, program, text

_WRITE, _CHDIR, _EXIT, _EXECVE = 1, 80, 60, 59


def run(path: Path, calls: list[Call], *arguments: str) -> subprocess.CompletedProcess[str]:
    path.unlink(missing_ok=True)
    path.write_bytes(program(calls))
    path.chmod(0o700)
    return subprocess.run(
        ["its-name", *arguments], executable=path, capture_output=True, text=True, timeout=10, check=False
    )


def test_calls_are_made_in_order(tmp_path: Path) -> None:
    calls = [Call("say", _WRITE, (1, word, len(word))) for word in (b"one ", b"two ", b"one ")]
    done = run(tmp_path / "p", [*calls, Call("end", _EXIT, (7,))])
    assert (done.stdout, done.stderr, done.returncode) == ("one two one ", "", 7)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_first_call_that_fails_is_named_and_ends_it(tmp_path: Path, number: int) -> None:
    calls = [Call(f"go to {n}", _CHDIR, (text("/nowhere" if n == number else "/"),)) for n in range(3)]
    done = run(tmp_path / "p", [*calls, Call("end", _EXIT, (0,))])
    assert done.returncode == FAILED
    assert done.stderr == f"cage: go to {number}: errno 002\n"
    assert failure(f"before\n{done.stderr}") == f"go to {number}: No such file or directory"


def test_it_becomes_another_program_with_its_own_arguments(tmp_path: Path) -> None:
    shown = "import sys, os; print(sys.argv[1:], dict(os.environ).get('HOME'))"
    start = Call("start", _EXECVE, (text(sys.executable), ARGUMENTS, bytes(8)))
    done = run(tmp_path / "p", [start], "-c", shown, "a", "b c")
    assert done.stdout == "['a', 'b c'] None\n", done.stderr


def test_the_same_list_is_the_same_program() -> None:
    calls = [Call("end", _EXIT, (1 << 40,))]
    assert program(calls) == program(calls)
    assert failure("qemu: something else") is None
