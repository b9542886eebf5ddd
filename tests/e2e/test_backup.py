"""A backup while real guests write, restored into an empty directory and brought up beside the original."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mvm.domain.ids import InstanceRef
from mvm.domain.layout import StateLayout
from tests.support.local import free_port
from tests.support.stack import Stack, running_stack
from tests.support.waiting import until

pytestmark = [pytest.mark.root, pytest.mark.guest, pytest.mark.redis, pytest.mark.timeout(600)]

WRITER = """
(i=0; while :; do i=$((i + 1)); echo $i >/data/draft; sync; mv /data/draft /data/count; sync; usleep 500000; done) \
  >/dev/null 2>&1 &
"""
IN_MEMORY = "echo only in memory >/run/kept; cat /run/kept /data/count"


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack() as running:
        running.mvm("tenant", "create", "acme")
        pool = ("acme/web", "--flake", "builtin:", "--profile", "minimal", "--mem", "128", "--data-disk", "32")
        running.mvm("pool", "create", *pool)
        running.mvm("pool", "build", "acme/web")
        yield running


def execute(stack: Stack, ref: str, command: str) -> str:
    return stack.mvm("instance", "exec", ref, "--", "sh", "-c", command).strip()


def disk_of(layout: StateLayout, ref: str) -> Path:
    return layout.instance(InstanceRef.parse(ref)) / "data.img"


def sound(stack: Stack, disk: Path, tmp_path: Path) -> None:
    """A data disk passes fsck once its journal is replayed, as the guest does when it mounts it."""
    copy = tmp_path / "fsck.img"
    shutil.copyfile(disk, copy)
    for words in (["e2fsck", "-p"], ["e2fsck", "-fn"]):
        done = os.spawnvp(os.P_WAIT, words[0], [*words, str(copy)])
        assert done in ((0, 1) if words[1] == "-p" else (0,))


@contextmanager
def restored(original: Stack, file: Path, root: Path) -> Iterator[Stack]:
    """What was backed up, up beside the original."""
    ports = {f"MVM_{name}_PORT": str(free_port()) for name in ("FLOWER", "METRICS", "AGENT")}
    stack = Stack(StateLayout(root), original.env | ports | {"MVM_STATE_DIR": str(root)})
    said = stack.run("backup", "restore", str(file))
    assert said.returncode == 0, said.stderr
    try:
        stack.mvm("up", "--detach")
        yield stack
    finally:
        stack.end()


def test_a_backup_of_guests_that_write_comes_back(stack: Stack, tmp_path: Path) -> None:
    refs = [i["ref"] for i in stack.json("instance", "create", "acme/web", "--count", "2")]
    stack.mvm("instance", "start", *refs)
    running, asleep = refs
    for ref in refs:
        execute(stack, ref, WRITER)
    for ref in refs:
        until(lambda ref=ref: execute(stack, ref, "cat /data/count || true") != "", 60, "it writes")  # type: ignore[misc]
    execute(stack, asleep, IN_MEMORY)
    stack.mvm("instance", "sleep", asleep)
    stack.mvm("tenant", "secrets", "set", "acme", "--from-file", _secrets(tmp_path))
    before = int(execute(stack, running, "cat /data/count"))
    file = tmp_path / "node.backup"
    made = stack.json("backup", "create", str(file))
    assert made["node_id"] == "n1"
    after = int(execute(stack, running, "cat /data/count"))
    assert stack.statuses() == {running: "running", asleep: "sleeping"}
    assert file.stat().st_mode & 0o777 == 0o600
    assert b"hunter2" not in file.read_bytes()
    assert stack.json("backup", "verify", str(file))["files"] > 10

    _damaged_is_refused(stack, file, tmp_path)

    root = stack.layout.root.parent / "r"
    with restored(stack, file, root) as again:
        assert again.statuses() == {running: "stopped", asleep: "sleeping"}
        for ref in refs:
            sound(again, disk_of(again.layout, ref), tmp_path)
        assert again.mvm("audit", "verify", "acme").split()[1] == "whole"
        again.mvm("instance", "wake", asleep)
        assert execute(again, asleep, "cat /run/kept") == "only in memory"
        again.mvm("instance", "start", running)
        assert before <= int(execute(again, running, "cat /data/count")) <= after + 1
        assert execute(again, running, "cat /run/secrets/TOKEN") == "hunter2"
        again.mvm("down", "--instances")
    assert stack.statuses()[running] == "running", "the original goes on"
    assert int(execute(stack, running, "cat /data/count")) > after


def _secrets(tmp_path: Path) -> str:
    path = tmp_path / "secrets.env"
    path.write_text("TOKEN=hunter2\n")
    return str(path)


def _damaged_is_refused(stack: Stack, file: Path, tmp_path: Path) -> None:
    spoilt, root = tmp_path / "spoilt", tmp_path / "none"
    shutil.copyfile(file, spoilt)
    with spoilt.open("r+b") as writable:
        writable.seek(file.stat().st_size // 3)
        writable.write(b"?")
    stack.fails(1, "backup.damaged", "backup", "verify", str(spoilt))
    stack.fails(1, "backup.damaged", "backup", "restore", str(spoilt), MVM_STATE_DIR=str(root))
    assert not root.exists()
    stack.fails(4, "backup.not_empty", "backup", "restore", str(file))
    stack.fails(4, "backup.exists", "backup", "create", str(file))
