"""A guest that stands still, as the host's disk is full, on a real stack: it is told, and goes on by itself."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.microvm import minimal_image
from tests.support.stack import COMMAND, Stack, running_stack
from tests.support.waiting import until

pytestmark = [pytest.mark.root, pytest.mark.guest, pytest.mark.redis, pytest.mark.timeout(420)]

MIB = 1 << 20
LITTLE = 8 * MIB  # room for records, and less than a guest goes on with


@pytest.fixture
def small_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """State directories are on a file system that a test can fill, under a short name, which sockets need."""
    minimal_image()  # its cache is somewhere else
    mount = Path(tempfile.mkdtemp(prefix="mvm-small-"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1g,mode=755", "small", str(mount)], check=True)
    monkeypatch.setattr(tempfile, "tempdir", str(mount))
    try:
        yield mount
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)
        mount.rmdir()


@pytest.fixture
def stack(small_disk: Path) -> Iterator[Stack]:
    settings = {"MVM_HEALTH_SWEEP_S": "1", "MVM_HEALTH_ANSWER_S": "1", "MVM_HEALTH_CHECKS": "2"}
    with running_stack(**settings) as running:
        running.mvm("tenant", "create", "acme")
        running.mvm(
            "pool", "create", "acme/db", "--flake", "builtin:", "--profile", "minimal", "--mem", "128",
            "--data-disk", "256", "--cold",
        )  # fmt: skip
        running.mvm("pool", "build", "acme/db")
        yield running


def free(disk: Path) -> int:
    """Bytes that can be written there still."""
    told = os.statvfs(disk)
    return told.f_bavail * told.f_frsize


def test_a_guest_without_room_is_told_and_goes_on_when_there_is_room(stack: Stack, small_disk: Path) -> None:
    """Its guest takes the last byte; then there is room for the stack's own records, and then for the guest, too."""
    stack.mvm("pool", "scale", "acme/db", "--running", "1")
    until(lambda: [*stack.statuses().values()] == ["running"], 120, "it runs")
    (ref,) = stack.statuses()
    before = stack.json("instance", "info", ref)
    ballast = small_disk / "ballast"
    subprocess.run(["fallocate", "-l", str(free(small_disk) - 24 * MIB), str(ballast)], check=True)
    write = "dd if=/dev/urandom of=/data/file bs=1M count=64 conv=fsync 2>/dev/null && echo written"
    words = [*COMMAND, "instance", "exec", ref, "--timeout", "300", "--", "sh", "-c", write]
    with subprocess.Popen(words, env=stack.env, stdout=subprocess.PIPE, text=True) as writing:

        def stalled() -> bool:
            return bool(stack.json("instance", "explain", ref)["stalled"] == "io-error")

        until(lambda: not free(small_disk), 120, "the disk is full")
        until(lambda: "no space left" in stack.run("status").stdout, 60, "that is told")
        os.truncate(ballast, ballast.stat().st_size - LITTLE)
        until(stalled, 120, "it stands still")
        (row,) = stack.json("instance", "list")
        assert (row["status"], row["stalled"]) == ("running", "io-error")
        assert "vmm.io_error" in row["last_error"]
        assert "disk is full" in stack.json("instance", "explain", ref)["next"]["reason"]
        ballast.unlink()
        assert writing.communicate(timeout=300)[0] == "written\n"
        until(lambda: not stalled(), 120, "that is over")
    after = stack.json("instance", "info", ref)
    assert (after["pid"], after["status"], after["last_error"]) == (before["pid"], "running", None)
