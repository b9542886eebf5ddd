"""The guest's programs that stand by, as far as they can be run without changing this host."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from mvm import guest
from mvm.drivers.builtin import moment, mounter


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "moment"
    path.write_bytes(moment.program())
    path.chmod(0o700)
    return path


def said(program: Path, given: bytes) -> bytes:
    done = subprocess.run([program], input=given, capture_output=True, timeout=10, check=True)
    return done.stdout


@pytest.mark.parametrize(("length", "lines"), [(0, b""), (15, b"1\n"), (16, b"2\n"), (58, b"2\n")])
def test_too_little_input_is_a_call_that_fails(program: Path, length: int, lines: bytes) -> None:
    assert said(program, bytes(length)) == lines


def test_an_impossible_time_is_the_third_and_it_goes_on(program: Path) -> None:
    microseconds = (10**6).to_bytes(8, "little")  # too many, so that nobody's clock is moved
    assert said(program, (bytes(8) + microseconds + bytes(43)) * 2) == b"3\n3\n"


def test_it_is_the_same_each_time_and_small() -> None:
    assert moment.program() == moment.program()
    assert len(moment.program()) <= 1024


def test_a_disk_that_is_not_there_is_not_mounted(tmp_path: Path) -> None:
    path = tmp_path / "mounter"
    path.write_bytes(mounter.program())
    path.chmod(0o700)
    name = b"/dev/vd-none".ljust(guest.DISK_NAME_BYTES, b"\0")
    assert said(path, name * 2) == b"2\n2\n"
    assert said(path, name[:9]) == b"1\n"
    assert len(mounter.program()) <= 1024
