"""drivers/files.py: what is written is whole and on the disk, whoever writes it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from threading import Barrier, Thread

import pytest

from mvm.domain.ids import NodeId, TenantId
from mvm.domain.layout import StateLayout
from mvm.domain.secrets import Secrets
from mvm.drivers import state_dir
from mvm.drivers.files import write_once, write_private
from mvm.drivers.quic.known_nodes import KnownNodes
from mvm.drivers.secret_files import SecretFiles
from mvm.drivers.shell import LocalShell
from mvm.drivers.stack import Stack
from mvm.errors import Failed
from mvm.settings import load_settings


def at_once(count: int, act: Callable[[int], None]) -> list[OSError]:
    """What `act` raised, called with each number by a thread of its own at the same moment, many times."""
    start, raised = Barrier(count), list[OSError]()

    def run(number: int) -> None:
        start.wait()
        try:
            for _ in range(50):
                act(number)
        except OSError as error:
            raised.append(error)

    threads = [Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def test_several_threads_may_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert at_once(4, lambda number: write_private(path, b"%d" % number * 1000)) == []
    assert path.read_bytes() in [b"%d" % number * 1000 for number in range(4)]
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_what_is_written_once_is_the_firsts_for_everybody(tmp_path: Path) -> None:
    path, seen = tmp_path / "key", set[bytes]()

    def make(number: int) -> None:
        write_once(path, b"%d" % number)
        seen.add(path.read_bytes())

    assert at_once(4, make) == []
    assert len(seen) == 1
    assert [each.name for each in tmp_path.iterdir()] == ["key"]


def test_it_is_written_once_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(*_: object) -> None:
        raise PermissionError(errno.EPERM, "no links here")

    monkeypatch.setattr(Path, "hardlink_to", cannot)
    for text in (b"first", b"second"):
        write_once(tmp_path / "key", text)
    assert (tmp_path / "key").read_bytes() == b"first"
    assert [each.name for each in tmp_path.iterdir()] == ["key"]


def synced(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> set[str]:
    """The directories that were synced while `act` was done, and those of files that were."""
    found, real = set[str](), os.fsync

    def fsync(fd: int) -> None:
        path = Path(f"/proc/self/fd/{fd}").readlink()
        found.add(f"{path}/" if path.is_dir() else f"{path.parent}/*")
        real(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        act()
    return found


def test_whatever_is_kept_reaches_the_disk_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = StateLayout(tmp_path / "state")
    keys = layout.secrets_key.parent
    assert synced(monkeypatch, lambda: state_dir.prepare(layout)) >= {
        f"{directory}{what}" for directory in (layout.root, keys) for what in ("/", "/*")
    }
    known = KnownNodes(layout.known_nodes)
    learnt = synced(monkeypatch, lambda: known.learn("127.0.0.1:4433", NodeId("n1"), declared=False))
    assert learnt == {f"{layout.known_nodes}/", f"{layout.known_nodes}/*"}
    stack = Stack(load_settings(state_dir=layout.root, driver="fake", netns="host"), LocalShell())
    assert synced(monkeypatch, stack.publish) == {f"{layout.run}/", f"{layout.run}/*"}


def test_a_full_disk_is_told_with_the_file_that_it_has_no_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = StateLayout(tmp_path / "state")
    state_dir.prepare(layout)

    def full(_fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    tenant, given = TenantId("acme"), Secrets(1, datetime.now(UTC), {"KEY": "hush"}, None)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Failed) as caught:
        SecretFiles(layout).save(tenant, given)
    assert caught.value.code == "disk.full"
    assert str(layout.secrets) in caught.value.message
    assert list(layout.secrets.iterdir()) == []
