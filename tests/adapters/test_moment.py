"""The guest's program ``moment``, as far as it can be run without moving this host's clock."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from mvm.drivers.builtin import moment


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "moment"
    path.write_bytes(moment.program())
    path.chmod(0o700)
    return path


@pytest.mark.parametrize(("length", "call"), [(0, 1), (15, 1), (16, 2), (87, 2)])
def test_too_little_input_is_a_call_that_fails(program: Path, length: int, call: int) -> None:
    assert subprocess.run([program], input=bytes(length), check=False).returncode == call


def test_an_impossible_time_is_the_third(program: Path) -> None:
    microseconds = (10**6).to_bytes(8, "little")  # too many, so that nobody's clock is moved
    assert subprocess.run([program], input=bytes(8) + microseconds + bytes(72), check=False).returncode == 3


def test_it_is_the_same_each_time_and_small() -> None:
    assert moment.program() == moment.program()
    assert len(moment.program()) <= 516
