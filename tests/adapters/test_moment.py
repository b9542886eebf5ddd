"""The guest's program ``moment``, as far as it can be run without setting this host's clock."""

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


@pytest.mark.parametrize("data", [b"", b"x" * 87])
def test_too_little_input_is_the_first_call_that_fails(program: Path, data: bytes) -> None:
    assert subprocess.run([program], input=data, check=False).returncode == 1


def test_an_impossible_time_is_the_second(program: Path) -> None:
    nanoseconds = (10**9).to_bytes(8, "little")  # too many, so that nobody's clock is set
    assert subprocess.run([program], input=bytes(8) + nanoseconds + bytes(72), check=False).returncode == 2


def test_it_is_the_same_each_time_and_small() -> None:
    assert moment.program() == moment.program()
    assert len(moment.program()) < 512
