"""Real files: what they take, what they share, and what is removed of them."""

from __future__ import annotations

import fcntl
import json
import os
import struct
from pathlib import Path

import pytest

from mvm.domain.disk import Kind, Stored
from mvm.domain.ids import PoolRef, Revision
from mvm.domain.layout import StateLayout
from mvm.drivers import disk_usage, extents
from mvm.drivers.file_storage import FileStorage
from mvm.drivers.shell import LocalShell
from tests.support.make import WEB, instance_ref
from tests.support.revisions import build_revision

ONE = instance_ref(1)
MIB = 1 << 20


@pytest.fixture
def layout(tmp_path: Path) -> StateLayout:
    layout = StateLayout(tmp_path / "state")
    layout.root.mkdir()
    return layout


@pytest.fixture
def storage(layout: StateLayout) -> FileStorage:
    return FileStorage(layout, LocalShell())


def put(path: Path, size: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(os.urandom(size))
    return path


def by_kind(layout: StateLayout) -> dict[Kind, Stored]:
    return {item.kind: item for item in disk_usage.measure(layout)}


def test_everything_has_a_kind_and_an_owner(layout: StateLayout) -> None:
    revision = Revision("a" * 64)
    for path in (
        layout.revision(revision) / "rootfs.ext4", layout.template(WEB, revision) / "memory",
        layout.instance(ONE) / "overlay.qcow2", layout.instance(ONE) / "data.img", layout.snapshot(ONE) / "delta",
        layout.instance(ONE) / "console.log", layout.instance(ONE) / "ssh_host_key", layout.logs / "worker.log",
        layout.package_cache / "x.deb", layout.images / ".build-x" / "vmlinux", layout.database,
    ):  # fmt: skip
        put(path, 4096)
    found = {(item.kind, item.name, item.pool, item.revision) for item in disk_usage.measure(layout)}
    assert found >= {
        (Kind.REVISION, revision, None, revision),
        (Kind.TEMPLATE, f"templates/{WEB}/{revision}", WEB, revision),
        (Kind.OVERLAY, str(ONE), WEB, None),
        (Kind.DATA_DISK, str(ONE), WEB, None),
        (Kind.SNAPSHOT, str(ONE), WEB, None),
        (Kind.LOG, str(ONE), WEB, None),
        (Kind.OTHER, str(ONE), WEB, None),
        (Kind.LOG, "logs", None, None),
        (Kind.CACHE, "cache", None, None),
        (Kind.CACHE, "images/.build-x", None, None),
        (Kind.OTHER, "node.db", None, None),
    }


def test_the_sum_is_what_du_says(layout: StateLayout, storage: FileStorage) -> None:
    build_revision(layout)
    storage.prepare(ONE, data_disk_mib=64)
    put(layout.logs / "worker.log", 3 * MIB)
    said = int(LocalShell().run(["du", "--block-size=1", "-s", str(layout.root)]).stdout.split()[0])
    own = layout.root.stat().st_blocks * 512  # the directory itself, which du counts, too
    assert sum(item.bytes for item in storage.usage()) == said - own
    assert by_kind(layout)[Kind.DATA_DISK].bytes < 8 * MIB  # of 64


def test_a_file_with_two_names_is_counted_once(layout: StateLayout) -> None:
    first = put(layout.instance(ONE) / "data.img", MIB)
    other = layout.instance(instance_ref(2)) / "data.img"
    other.parent.mkdir(parents=True)
    os.link(first, other)
    found = [item for item in disk_usage.measure(layout) if item.kind is Kind.DATA_DISK]
    assert sorted((item.bytes // MIB, item.shared // MIB) for item in found) == [(0, 1), (1, 0)]


def test_shared_extents_are_counted_once(layout: StateLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's answer is made up: few file systems can share extents, and this one need not."""
    for number in (1, 2):
        put(layout.instance(instance_ref(number)) / "data.img", 2 * MIB)

    def told(fd: int, request: int, buffer: bytearray) -> int:
        assert request == 0xC020660B
        if Path(f"/proc/self/fd/{fd}").readlink().name != "data.img":
            raise OSError(95, "not supported")
        struct.pack_into("=L", buffer, 20, 2)
        struct.pack_into("=QQQ16xL", buffer, 32, 0, 777 * MIB, MIB, 0x2000)  # shared
        struct.pack_into("=QQQ16xL", buffer, 32 + 56, MIB, fd * MIB, MIB, 0x1)  # its own, and the last
        return 0

    monkeypatch.setattr(extents.fcntl, "ioctl", told)
    found = [item for item in disk_usage.measure(layout) if item.kind is Kind.DATA_DISK]
    assert sorted((item.bytes // MIB, item.shared // MIB) for item in found) == [(1, 1), (2, 0)]


def test_what_the_kernel_really_says_of_an_ordinary_file(tmp_path: Path) -> None:
    with put(tmp_path / "file", MIB).open("rb") as file:
        os.fsync(file.fileno())
        try:
            assert list(extents.shared_extents(file.fileno())) == []
        except OSError:
            pytest.skip("this file system does not tell")


def test_what_goes_away_meanwhile_is_left_out(layout: StateLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    put(layout.instance(ONE) / "data.img", MIB)
    walk = disk_usage._walk

    def losing(directory: str, *, top: bool = True) -> object:
        for found in walk(directory, top=top):
            if found[0].endswith("instances"):
                LocalShell().run(["rm", "-r", str(layout.instances / "acme")])
            yield found

    monkeypatch.setattr(disk_usage, "_walk", losing)
    assert Kind.DATA_DISK not in by_kind(layout)


def test_a_part_that_was_put_elsewhere_is_followed_and_its_space_counts(layout: StateLayout, tmp_path: Path) -> None:
    elsewhere = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else tmp_path
    target = elsewhere / f"mvm-test-{os.getpid()}"
    target.mkdir()
    try:
        layout.instances.symlink_to(target)
        put(layout.instance(ONE) / "data.img", MIB)
        assert by_kind(layout)[Kind.DATA_DISK].bytes == MIB
        free = min(os.statvfs(path).f_bavail * os.statvfs(path).f_frsize for path in (target, layout.root))
        assert abs(disk_usage.space(layout).free - free) < 64 * MIB
    finally:
        LocalShell().run(["rm", "-r", str(target)])


def test_revisions_in_a_place_of_others_are_known(layout: StateLayout, storage: FileStorage, tmp_path: Path) -> None:
    assert storage.shared_with_others() is None
    (tmp_path / "images").mkdir()
    layout.images.symlink_to(tmp_path / "images")
    assert storage.shared_with_others() == str(tmp_path / "images")


def test_packages_of_no_kept_revision_go_but_not_during_a_build(layout: StateLayout, storage: FileStorage) -> None:
    revision = Revision("a" * 64)
    manifest = put(layout.revision(revision) / "manifest.json", 1)
    manifest.write_text(json.dumps({"inputs": {"bash": "b" * 64}}))
    kept, old = (put(layout.package_cache / f"{name * 64}.deb", MIB) for name in "bc")
    with (layout.images / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert storage.remove_packages([revision]) == 0
    assert storage.remove_packages([revision]) == MIB
    assert (kept.exists(), old.exists()) == (True, False)


def test_templates_are_found_by_their_names(layout: StateLayout, storage: FileStorage) -> None:
    revision = Revision("a" * 64)
    for path in (layout.template(WEB, revision) / "memory", layout.templates / "acme" / "web" / "x.new" / "memory"):
        put(path, 1)
    assert storage.templates() == {(PoolRef.parse("acme/web"), revision)}
    storage.remove_template(WEB, revision)
    assert storage.templates() == frozenset()
