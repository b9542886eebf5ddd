"""ports/storage.py."""

from __future__ import annotations

import os
from base64 import b64decode
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from mvm.domain.disk import Kind
from mvm.domain.ids import PoolId, PoolRef, Revision
from mvm.domain.layout import StateLayout
from mvm.domain.pool import ImageSource
from mvm.drivers.fake import FakeHost
from mvm.drivers.file_storage import FileStorage
from mvm.drivers.shell import LocalShell
from mvm.errors import Failed, NotFound
from mvm.ports.storage import NodeStorage
from tests.support.make import ACME, instance_ref
from tests.support.revisions import build_revision

ONE, TWO = instance_ref(1), instance_ref(2)
ELSEWHERE = instance_ref(1, PoolRef(ACME, PoolId("db")))
NOWHERE = Revision("0" * 64)


@dataclass
class Side:
    """A storage under test, with one built revision."""

    storage: NodeStorage
    built: Revision
    rootfs: Path

    @property
    def files(self) -> bool:
        return isinstance(self.storage, FileStorage)


@pytest.fixture
def layout(tmp_path: Path) -> StateLayout:
    return StateLayout(tmp_path / "state")


@pytest.fixture(params=["fake", "files"])
def side(request: pytest.FixtureRequest, layout: StateLayout) -> Side:
    if request.param == "fake":
        host = FakeHost()
        built = host.images.build(ImageSource("builtin:", "minimal"), lambda step: None)
        return Side(host.storage, built, host.storage.revision(built).rootfs)
    built = build_revision(layout)
    return Side(FileStorage(layout, LocalShell()), built, layout.revision(built) / "rootfs.ext4")


def touch_runtime(side: Side) -> None:
    """What a VMM leaves in the directory of instance ONE; the fake host's VMM does so by itself."""
    if side.files:
        for name in ("qmp.sock", "agent.sock", "agent.lock", "vmm.pid", "console.log", "data.img.tmp"):
            (side.storage.directory(ONE) / name).write_text("x")


# --- directories


def test_nothing_is_there_at_first(side: Side) -> None:
    assert side.storage.instances() == frozenset()
    assert side.storage.leftovers() == {}
    assert side.storage.data_disk(ONE) is None


def test_instances_have_directories_until_removed(side: Side) -> None:
    for ref in (ONE, TWO, ELSEWHERE):
        for _ in range(2):
            side.storage.prepare(ref, data_disk_mib=0)
    assert side.storage.instances() == {ONE, TWO, ELSEWHERE}
    assert len({side.storage.directory(ref) for ref in (ONE, TWO, ELSEWHERE)}) == 3
    for _ in range(2):
        side.storage.remove(ONE)
        assert side.storage.instances() == {TWO, ELSEWHERE}
    side.storage.remove(ELSEWHERE)
    side.storage.prepare(ONE, data_disk_mib=0)
    assert side.storage.instances() == {ONE, TWO}


def test_each_instance_keeps_keys_of_its_own(side: Side) -> None:
    side.storage.prepare(ONE, data_disk_mib=0)
    side.storage.prepare(TWO, data_disk_mib=0)
    keys = side.storage.keys(ONE)
    assert keys != side.storage.keys(TWO)
    side.storage.prepare(ONE, data_disk_mib=0)
    side.storage.clean_runtime(ONE)
    assert side.storage.keys(ONE) == keys
    assert keys.host_public.startswith("ssh-ed25519 ")


def test_what_was_not_prepared_has_no_keys_and_no_overlay(side: Side) -> None:
    with pytest.raises(Failed) as refused:
        side.storage.keys(ONE)
    assert refused.value.code == "storage.failed"
    with pytest.raises(Failed):
        side.storage.fresh_overlay(ONE, side.rootfs)
    side.storage.clean_runtime(ONE)


def test_a_data_disk_is_there_when_asked_for_and_lasts(side: Side) -> None:
    side.storage.prepare(ONE, data_disk_mib=8)
    side.storage.prepare(TWO, data_disk_mib=0)
    disk = side.storage.data_disk(ONE)
    assert disk is not None
    assert disk.parent == side.storage.directory(ONE)
    assert side.storage.data_disk(TWO) is None
    side.storage.clean_runtime(ONE)
    side.storage.prepare(ONE, data_disk_mib=16)
    assert side.storage.data_disk(ONE) == disk


def test_the_files_of_a_run_are_told_and_cleaned(side: Side) -> None:
    side.storage.prepare(ONE, data_disk_mib=8)
    side.storage.prepare(TWO, data_disk_mib=0)
    overlay = side.storage.fresh_overlay(ONE, side.rootfs)
    assert overlay.parent == side.storage.directory(ONE)
    assert side.storage.leftovers() == {ONE: [overlay.name]}
    touch_runtime(side)
    for _ in range(2):
        side.storage.clean_runtime(ONE)
        assert side.storage.leftovers() == {}
    assert side.storage.instances() == {ONE, TWO}
    assert side.storage.data_disk(ONE) is not None


def test_removing_takes_the_files_of_a_run_along(side: Side) -> None:
    side.storage.prepare(ONE, data_disk_mib=8)
    side.storage.fresh_overlay(ONE, side.rootfs)
    touch_runtime(side)
    side.storage.remove(ONE)
    assert side.storage.leftovers() == {}
    assert side.storage.data_disk(ONE) is None


# --- revisions


def test_a_built_revision_has_its_files(side: Side) -> None:
    for _ in range(2):
        files = side.storage.revision(side.built)
        assert [path.name for path in (files.kernel, files.initramfs, files.rootfs)] == [
            "vmlinux", "initramfs.cpio", "rootfs.ext4",
        ]  # fmt: skip


def test_an_unknown_revision_is_not_found(side: Side) -> None:
    with pytest.raises(NotFound) as refused:
        side.storage.revision(NOWHERE)
    assert refused.value.code == "revision.not_found"


def test_revisions_are_told_and_removed(side: Side) -> None:
    assert side.storage.revisions() == {side.built}
    for _ in range(2):
        side.storage.remove_revision(side.built)
        assert side.storage.revisions() == frozenset()
    with pytest.raises(NotFound):
        side.storage.revision(side.built)


def test_templates_nobody_made_are_not_there_and_can_be_removed(side: Side) -> None:
    side.storage.remove_template(ONE.pool_ref, side.built)
    assert side.storage.templates() == frozenset()


def test_usage_tells_whose_it_is_and_what(side: Side) -> None:
    side.storage.prepare(ONE, data_disk_mib=8)
    side.storage.fresh_overlay(ONE, side.rootfs)
    found = {(item.kind, item.pool, item.revision) for item in side.storage.usage()}
    assert found >= {
        (Kind.REVISION, None, side.built), (Kind.DATA_DISK, ONE.pool_ref, None), (Kind.OVERLAY, ONE.pool_ref, None),
    }  # fmt: skip
    assert all(item.bytes > 0 for item in side.storage.usage())
    side.storage.remove(ONE)
    assert Kind.DATA_DISK not in {item.kind for item in side.storage.usage()}


def test_space_is_a_part_of_the_whole(side: Side) -> None:
    space = side.storage.space()
    assert 0 < space.free < space.total
    assert space.path


# --- the file system's side


@pytest.fixture
def files(layout: StateLayout) -> FileStorage:
    return FileStorage(layout, LocalShell())


def test_everything_is_private(files: FileStorage, layout: StateLayout) -> None:
    files.prepare(ONE, data_disk_mib=8)
    rootfs = layout.revision(build_revision(layout)) / "rootfs.ext4"
    files.fresh_overlay(ONE, rootfs)
    directory = files.directory(ONE)
    assert {path.name for path in directory.iterdir()} == {"ssh_host_key", "data.img", "overlay.qcow2"}
    assert {path.stat().st_mode & 0o777 for path in directory.iterdir()} == {0o600}
    for path in (directory, *directory.parents[:3]):
        assert path.stat().st_mode & 0o777 == 0o700


def test_the_host_key_is_what_dropbear_reads(files: FileStorage) -> None:
    files.prepare(ONE, data_disk_mib=0)
    keys = files.keys(ONE)
    assert keys.host_private[:19] == b"\x00\x00\x00\x0bssh-ed25519\x00\x00\x00\x40"
    seed, public = keys.host_private[19:51], keys.host_private[51:]
    assert Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw() == public
    blob = b64decode(keys.host_public.split()[1])
    assert blob == b"\x00\x00\x00\x0bssh-ed25519\x00\x00\x00\x20" + public


def test_ssh_reads_the_public_line(files: FileStorage, tmp_path: Path) -> None:
    files.prepare(ONE, data_disk_mib=0)
    (tmp_path / "key.pub").write_text(files.keys(ONE).host_public + "\n")
    assert "ED25519" in LocalShell().run(["ssh-keygen", "-l", "-f", str(tmp_path / "key.pub")]).stdout


@pytest.mark.parametrize("mib", [4, 64])
def test_the_data_disk_is_a_sparse_journalled_ext4(files: FileStorage, mib: int) -> None:
    files.prepare(ONE, data_disk_mib=mib)
    disk = files.data_disk(ONE)
    assert disk is not None
    assert disk.stat().st_size == mib << 20
    assert disk.stat().st_blocks * 512 < mib << 20
    about = LocalShell().run(["dumpe2fs", "-h", str(disk)]).stdout
    assert "volume name:   mvm-data" in about
    assert "has_journal" in about
    LocalShell().run(["e2fsck", "-fn", str(disk)])


def test_a_data_disk_is_not_formatted_again(files: FileStorage) -> None:
    files.prepare(ONE, data_disk_mib=4)
    disk = files.data_disk(ONE)
    assert disk is not None
    with disk.open("r+b") as file:
        file.write(b"mine")
    files.prepare(ONE, data_disk_mib=4)
    assert disk.read_bytes()[:4] == b"mine"


def test_a_data_disk_left_half_made_is_made_anew(files: FileStorage) -> None:
    files.prepare(ONE, data_disk_mib=0)
    (files.directory(ONE) / "data.img.tmp").write_text("half")
    files.prepare(ONE, data_disk_mib=4)
    assert {path.name for path in files.directory(ONE).iterdir()} == {"ssh_host_key", "data.img"}


def test_keys_disk_and_console_outlive_a_run(files: FileStorage, layout: StateLayout) -> None:
    files.prepare(ONE, data_disk_mib=4)
    files.fresh_overlay(ONE, layout.revision(build_revision(layout)) / "rootfs.ext4")
    names = ("qmp.sock", "agent.sock", "agent.lock", "vmm.pid", "overlay.qcow2.tmp", "console.log")
    for name in names:
        (files.directory(ONE) / name).touch()
    assert files.leftovers() == {ONE: sorted([*names[:5], "overlay.qcow2"])}
    files.clean_runtime(ONE)
    assert {path.name for path in files.directory(ONE).iterdir()} == {"ssh_host_key", "data.img", "console.log"}


def test_names_that_no_instance_has_are_passed_over(files: FileStorage, layout: StateLayout) -> None:
    files.prepare(ONE, data_disk_mib=0)
    for path in ("lost+found", "Acme/web/i-00000009", "acme/WEB/i-00000009", "acme/web/i-9", "acme/web/I-00000009"):
        (layout.instances / path).mkdir(parents=True)
    (layout.instances / "acme" / "web" / "i-00000003").touch()
    (layout.instances / "acme" / "web" / "i-00000004").symlink_to(files.directory(ONE))
    (layout.instances / "notes").touch()
    assert files.instances() == {ONE}
    assert files.leftovers() == {}


def test_directories_that_became_empty_go_too(files: FileStorage, layout: StateLayout) -> None:
    for ref in (ONE, TWO, ELSEWHERE):
        files.prepare(ref, data_disk_mib=0)
    files.remove(ONE)
    assert (layout.instances / "acme" / "web").is_dir()
    files.remove(TWO)
    assert not (layout.instances / "acme" / "web").exists()
    files.remove(ELSEWHERE)
    assert list(layout.instances.iterdir()) == []


# --- a disk that is full


@pytest.fixture
def small(tmp_path: Path) -> Iterator[StateLayout]:
    """A state directory on a file system of 256 KiB."""
    (tmp_path / "small").mkdir()
    LocalShell().run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path / "small")])
    try:
        yield StateLayout(tmp_path / "small")
    finally:
        LocalShell().run(["umount", str(tmp_path / "small")])


def fill(layout: StateLayout) -> None:
    free = os.statvfs(layout.root).f_bavail * os.statvfs(layout.root).f_frsize
    (layout.root / "filler").write_bytes(bytes(free))


@pytest.mark.root
def test_a_data_disk_that_does_not_fit_leaves_nothing_half_made(small: StateLayout) -> None:
    storage = FileStorage(small, LocalShell())
    storage.prepare(ONE, data_disk_mib=0)
    with pytest.raises(Failed) as full:
        storage.prepare(ONE, data_disk_mib=64)
    assert full.value.code == "disk.full"
    assert {path.name for path in storage.directory(ONE).iterdir()} == {"ssh_host_key"}
    assert storage.data_disk(ONE) is None


@pytest.mark.root
def test_keys_and_overlays_that_do_not_fit_leave_nothing_half_made(small: StateLayout, tmp_path: Path) -> None:
    storage = FileStorage(small, LocalShell())
    storage.prepare(ONE, data_disk_mib=0)
    fill(small)
    rootfs = tmp_path / "rootfs"
    rootfs.touch()
    os.truncate(rootfs, 64 << 20)
    with pytest.raises(Failed) as full:
        storage.fresh_overlay(ONE, rootfs)
    assert full.value.code == "disk.full"
    assert storage.leftovers() == {}
    with pytest.raises(Failed) as full:
        storage.prepare(TWO, data_disk_mib=0)
    assert full.value.code == "disk.full"
    (small.root / "filler").unlink()
    storage.prepare(TWO, data_disk_mib=0)
    assert len(storage.keys(TWO).host_private) == 83
