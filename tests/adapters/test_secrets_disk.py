"""The disk of secrets: a file system that others' tools find in order."""

from __future__ import annotations

import os
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mvm.domain.secrets import MAX_BYTES, MAX_COUNT, Secrets
from mvm.drivers import processes, secrets_disk

NOW = datetime(2026, 1, 2, tzinfo=UTC)
NAMES = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", fullmatch=True)


def disk(values: dict[str, str], into: Path) -> Path:
    fd = secrets_disk.create(Secrets(1, NOW, values))
    try:
        into.write_bytes(os.pread(fd, secrets_disk.SIZE, 0))
    finally:
        os.close(fd)
    return into


def check(image: Path, values: dict[str, str], out: Path) -> None:
    """e2fsck finds nothing, and debugfs finds the files."""
    done = subprocess.run(["e2fsck", "-fn", str(image)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    out.mkdir(exist_ok=True)
    subprocess.run(["debugfs", "-R", f"rdump / {out}", str(image)], capture_output=True, check=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {n: v.encode() for n, v in values.items()}
    for path in out.iterdir():
        path.unlink()


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(NAMES, st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=9000), min_size=1))
def test_any_secrets(tmp_path: Path, values: dict[str, str]) -> None:
    check(disk(values, tmp_path / "disk"), values, tmp_path / "out")


@pytest.mark.parametrize(
    "values",
    [
        {"one": "x" * (MAX_BYTES - 4)},
        {f"{n:0128d}": "x" for n in range(MAX_COUNT)},
        {f"{n:0128d}": "y" * (MAX_BYTES // MAX_COUNT - 129) for n in range(MAX_COUNT)},
        {"page": "z" * 4096, "more": "z" * 4097},
    ],
)
def test_the_largest(tmp_path: Path, values: dict[str, str]) -> None:
    check(disk(values, tmp_path / "disk"), values, tmp_path / "out")


def test_what_is_replaced_leaves_nothing(tmp_path: Path) -> None:
    us = processes.identify(os.getpid())
    assert us is not None
    fd = secrets_disk.create(Secrets(1, NOW, {"A": "hush" * 5000}))
    try:
        secrets_disk.replace(us, Secrets(2, NOW, {"B": "x"}))
        data = os.pread(fd, secrets_disk.SIZE, 0)
        assert b"hush" not in data
        (tmp_path / "disk").write_bytes(data)
        check(tmp_path / "disk", {"B": "x"}, tmp_path / "out")
        secrets_disk.replace(us, None)
        assert not any(os.pread(fd, secrets_disk.SIZE, 0))
    finally:
        os.close(fd)
    with pytest.raises(FileNotFoundError):
        secrets_disk.replace(us, None)
