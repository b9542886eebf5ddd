"""Backups: the file, what is wrong with one, and restoring it, without guests."""

from __future__ import annotations

import filecmp
import io
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import zstandard
from click.testing import CliRunner

from mvm.cli.main import cli
from mvm.domain.backup import FORMAT, About
from mvm.domain.ids import NodeId, Revision
from mvm.domain.instance import Instance
from mvm.domain.layout import STATE_VERSION, StateLayout
from mvm.domain.lifecycle import Status
from mvm.domain.snapshot import Compression, Kind, SnapshotManifest
from mvm.drivers import snapshot_files, state_dir
from mvm.drivers.audit_log import FileAuditLog
from mvm.drivers.backup import archive, restoring
from mvm.drivers.backup.taking import Taking
from mvm.drivers.clock import SystemClock
from mvm.drivers.fake import FakeHost
from mvm.drivers.locks import FileLocks
from mvm.drivers.sqlite_store import SqliteStore
from mvm.errors import Failed, NotAllowed, NotFound
from mvm.settings import place_of, remembered
from tests.support import make

ABOUT = About(NodeId("n1"), datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), STATE_VERSION)
MTIME = 1_700_000_000_123_456_789
MIB = 1 << 20
REVISION = Revision("1" * 64)


class Killed(BaseException):
    """What a process does not survive."""


def quiet(*_: object) -> None:
    """No progress."""


def holes(path: Path, size: int, *at: int) -> None:
    """A file of `size` bytes that has data at these places."""
    with path.open("wb") as file:
        file.truncate(size)
        for offset in at:
            file.seek(offset)
            file.write(os.urandom(4096))
    os.utime(path, ns=(MTIME, MTIME))


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Files of all kinds, by the names that they have in a backup."""
    directory = tmp_path / "files"
    directory.mkdir()
    made = {name: directory / str(number) for number, name in enumerate(
        ["empty", "text", "a" * 60 + "/" + "ä" * 60 + "/long", "hole", "sparse", "sparse at its end"]
    )}  # fmt: skip
    paths = list(made.values())
    paths[0].touch(mode=0o600)
    paths[1].write_bytes(b"words\n" * 10_000)
    paths[1].chmod(0o400)
    paths[2].write_bytes(b"x")
    holes(paths[3], 64 * MIB)
    holes(paths[4], 64 * MIB, 0, 8 * MIB, 9 * MIB, 40 * MIB)
    holes(paths[5], MIB + 4096, MIB)
    return made


def pack(into: Path, files: dict[str, Path]) -> None:
    with into.open("wb") as file:
        writer = archive.Writer(file, ABOUT)
        for name, path in files.items():
            writer.add(name, path)
        writer.close()


@pytest.fixture
def packed(tmp_path: Path, files: dict[str, Path]) -> Path:
    pack(tmp_path / "backup", files)
    return tmp_path / "backup"


def test_what_is_packed_comes_back_with_its_holes_and_times(
    packed: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    assert packed.stat().st_size < MIB
    about, listed = archive.check(packed)
    assert about == ABOUT
    assert set(listed) == set(files)
    (tmp_path / "out").mkdir()
    archive.extract(packed, tmp_path / "out")
    for name, path in files.items():
        back, was = tmp_path / "out" / name, path.stat()
        assert filecmp.cmp(back, path, shallow=False)
        found = back.stat()
        assert (found.st_mtime_ns, found.st_size) == (was.st_mtime_ns, was.st_size)
        assert found.st_mode & 0o777 == was.st_mode & 0o700
        assert found.st_blocks <= was.st_blocks + 8


def test_gnu_tar_reads_it(packed: Path, files: dict[str, Path], tmp_path: Path) -> None:
    """Should there be no mvm at hand."""
    (tmp_path / "out").mkdir()
    plain = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(packed.read_bytes())).read()
    subprocess.run(["tar", "-xf", "-", "-C", str(tmp_path / "out")], input=plain, check=True)
    for name, path in files.items():
        back = tmp_path / "out" / name
        assert filecmp.cmp(back, path, shallow=False)
        assert back.stat().st_mtime_ns == path.stat().st_mtime_ns


def test_any_damage_is_found(tmp_path: Path) -> None:
    """Each byte of a small backup changed in turn, each length that it could be cut to, and bytes added."""
    (tmp_path / "f").write_bytes(os.urandom(64))
    pack(tmp_path / "whole", {"f": tmp_path / "f"})
    whole, spoilt = (tmp_path / "whole").read_bytes(), tmp_path / "spoilt"
    random.seed(1)
    changed = [whole[:at] + bytes([whole[at] ^ random.randrange(1, 256)]) + whole[at + 1 :] for at in range(len(whole))]
    for content in [*changed, *(whole[:length] for length in range(len(whole))), whole + b"\0", b"", bytes(5000)]:
        spoilt.write_bytes(content)
        with pytest.raises(Failed) as caught:
            archive.check(spoilt)
        assert caught.value.code == "backup.damaged"
    archive.check(tmp_path / "whole")


def test_what_is_put_together_wrongly_is_damage_too(tmp_path: Path, files: dict[str, Path]) -> None:
    """Its digest is right, its files are not those that it lists, or lead elsewhere."""
    for wrong in ("unlisted", "../out", "/etc/passwd"):
        with (tmp_path / "b").open("wb") as file:
            writer = archive.Writer(file, ABOUT)
            writer.add(wrong if wrong != "unlisted" else "text", files["text"])
            if wrong == "unlisted":
                writer._entries.clear()
            writer.close()
        with pytest.raises(Failed) as caught:
            restoring.restore(tmp_path / "b", StateLayout(tmp_path / "s"), quiet)
        assert caught.value.code == "backup.damaged"
        assert not (tmp_path / "s").exists()
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["device", "pipe", "directory"])
def test_what_has_no_end_is_not_read(tmp_path: Path, what: str) -> None:
    path = {"device": Path("/dev/zero"), "pipe": tmp_path / "pipe", "directory": tmp_path}[what]
    if what == "pipe":
        os.mkfifo(path)
    with pytest.raises(Failed) as caught:
        archive.check(path)
    assert caught.value.code == "backup.unreadable"
    assert "not a regular file" in caught.value.message


def test_a_newer_one_is_refused_as_newer(tmp_path: Path) -> None:
    for about, code in (
        (About(ABOUT.node_id, ABOUT.taken_at, STATE_VERSION + 1), "state.version"),
        (About(ABOUT.node_id, ABOUT.taken_at, STATE_VERSION, FORMAT + 1), "backup.newer"),
    ):
        with (tmp_path / "b").open("wb") as file:
            archive.Writer(file, about).close()
        with pytest.raises(NotAllowed) as caught:
            archive.check(tmp_path / "b")
        assert caught.value.code == code


# --- a node
@pytest.fixture
def layout(tmp_path: Path) -> StateLayout:
    layout = StateLayout(tmp_path / "node" / "s")
    state_dir.prepare(layout)
    return layout


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> FakeHost:
    """Its snapshots are the files that they are on a real one."""
    host = FakeHost()
    monkeypatch.setattr(host.vmm, "manifest", snapshot_files.manifest)
    return host


@pytest.fixture
def store(layout: StateLayout) -> Iterator[SqliteStore]:
    with closing(SqliteStore(layout.database)) as store:
        yield store


@pytest.fixture
def taking(layout: StateLayout, host: FakeHost, store: SqliteStore) -> Taking:
    return Taking(layout, NodeId("n1"), store, FileLocks(layout.locks), host.vmm, SystemClock())


def saved(directory: Path, kind: Kind, **more: Any) -> SnapshotManifest:
    """A template or a snapshot."""
    directory.mkdir(parents=True)
    holes(directory / "memory", MIB, 0)
    manifest = SnapshotManifest(
        kind=kind, files={"memory": snapshot_files.digest(directory / "memory")}, vmm="fake", vmm_version="1",
        machine="m", mem_mib=1, vcpus=1, revision=REVISION, compression=Compression.NONE, guest_protocol=2, disk=None,
        taken_at=make.START, **{"owner": None, "template": None} | more,
    )  # fmt: skip
    snapshot_files.write_manifest(directory, manifest)
    return manifest


def instance(layout: StateLayout, store: SqliteStore, number: int, status: Status, **more: Any) -> Path:
    made = Instance(make.instance_ref(number), make.NODE, number + 2, status, make.START, **more)
    store.insert_instance(made)
    directory = layout.instance(made.ref)
    directory.mkdir(parents=True, mode=0o700)
    holes(directory / "data.img", 16 * MIB, 4 * MIB)
    (directory / "ssh_host_key").write_bytes(b"key")
    (directory / "vmm.pid").write_text("1")
    return directory


@pytest.fixture
def node(layout: StateLayout, store: SqliteStore) -> StateLayout:
    """One asleep, one stopped, one that was running when its VMM ended, and an unfinished job."""
    asleep = instance(layout, store, 1, Status.SLEEPING, cloned=True, revision=REVISION)
    template = saved(layout.template(make.WEB, REVISION), Kind.TEMPLATE)
    saved(asleep / "snapshot", Kind.DELTA, owner=str(make.instance_ref(1)), template=template.id)
    holes(asleep / "overlay.qcow2", MIB, 0)
    instance(layout, store, 2, Status.STOPPED)
    gone = instance(layout, store, 3, Status.RUNNING)
    (gone / "overlay.qcow2").touch()
    store.put_job(make.job(subject=str(make.instance_ref(3))))
    with FileAuditLog(layout.audit, FileLocks(layout.locks)).hold(make.ACME) as trail:
        trail.append(["{}"])
    (layout.images / ".build-1").mkdir()
    (layout.images / ".build-1" / "half").touch()
    return layout


def statuses(layout: StateLayout) -> list[tuple[Status, str | None]]:
    with closing(SqliteStore(layout.database)) as store:
        return [(each.status, each.last_error) for each in store.instances()]


@pytest.mark.parametrize("shared", [False, True])
def test_a_restore_warns_of_the_original_where_both_would_take_the_same_jobs(
    node: StateLayout, taking: Taking, tmp_path: Path, shared: bool
) -> None:
    replace(taking, shared=shared).take(tmp_path / "b", lambda _: None)
    words = ["--state-dir", str(tmp_path / "back"), "backup", "restore", str(tmp_path / "b")]
    done = CliRunner().invoke(cli, words, prog_name="mvm", env={"MVM_REDIS_URL": "", "MVM_BROKER_URL": ""})
    assert done.exit_code == 0, done.output
    assert ("take the same jobs" in done.stderr) == shared
    if not shared:
        assert done.stderr == ""


def test_a_node_comes_back_as_it_was(node: StateLayout, taking: Taking, tmp_path: Path) -> None:
    said: list[str] = []
    taking.take(tmp_path / "b", said.append)
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o600
    assert any("3 of 3" in text for text in said)
    assert not (node.run / "backup").exists()
    back = StateLayout(tmp_path / "back")
    restoring.restore(tmp_path / "b", back, quiet)
    assert state_dir.check_version(back) == STATE_VERSION
    known = remembered(back)
    assert known is not None
    assert known.node_id == "n1", "it is that node on whatever host"
    assert known.place == place_of(back)
    assert back.root.stat().st_mode & 0o777 == 0o700
    (slept, _), (stopped, none), (ran, why) = statuses(back)
    assert (slept, stopped, none, ran) == (Status.SLEEPING, Status.STOPPED, None, Status.STOPPED)
    assert why is not None
    assert "restored from a backup" in why
    with closing(SqliteStore(back.database)) as store:
        assert store.unfinished_jobs() == []
    asleep, was = back.instance(make.instance_ref(1)), node.instance(make.instance_ref(1))
    for name in ("data.img", "overlay.qcow2", "snapshot/memory", "ssh_host_key"):
        assert filecmp.cmp(asleep / name, was / name, shallow=False)
        assert (asleep / name).stat().st_mtime_ns == (was / name).stat().st_mtime_ns
    assert not (back.instance(make.instance_ref(3)) / "overlay.qcow2").exists(), "it ends with its run"
    assert not list(back.root.rglob("vmm.pid"))
    assert not list(back.images.rglob("*"))
    assert back.secrets_key.read_bytes() == node.secrets_key.read_bytes()
    assert not [path for path in back.root.rglob("*") if path.stat().st_mode & 0o077]
    assert (back.audit / make.ACME / "000001.jsonl").read_text() == "{}\n"


def test_no_second_one_at_once_and_none_is_replaced(node: StateLayout, taking: Taking, tmp_path: Path) -> None:
    with taking.locks.hold("backup", deadline_s=0), pytest.raises(NotAllowed) as caught:
        taking.take(tmp_path / "b", quiet)
    assert caught.value.code == "backup.busy"
    assert not list(tmp_path.glob("*b*"))
    (tmp_path / "b").write_text("another")
    with pytest.raises(NotAllowed) as caught:
        taking.take(tmp_path / "b", quiet)
    assert caught.value.code == "backup.exists"
    assert (tmp_path / "b").read_text() == "another"


def gone(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def cut_off(path: Path) -> None:
    path.chmod(0o600)
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (gone, "overlay.qcow2"),
        (gone, "snapshot"),
        (gone, "snapshot/manifest.json"),
        (cut_off, "snapshot/manifest.json"),
        (gone, "snapshot/memory"),
        (cut_off, "snapshot/memory"),
        (gone, "template"),
        (gone, "template/memory"),
        (gone, "."),
    ],
)
def test_a_sleeper_that_cannot_be_woken_keeps_no_node_from_its_backup(
    node: StateLayout, taking: Taking, tmp_path: Path, spoil: Callable[[Path], None], what: str
) -> None:
    """It comes back as what it is by then: stopped, with its data disk."""
    ref = make.instance_ref(1)
    top = node.template(make.WEB, REVISION) if what.startswith("template") else node.instance(ref)
    spoil(top / what.removeprefix("template").removeprefix("/"))
    said: list[str] = []
    taking.take(tmp_path / "b", said.append)
    assert any(text.startswith(f"WARNING: {ref} ") for text in said)
    back = StateLayout(tmp_path / "back")
    restoring.restore(tmp_path / "b", back, quiet)
    (status, why), *others = statuses(back)
    assert status is Status.STOPPED
    assert why is not None
    assert "what it held when it slept is lost" in why
    assert len(others) == 2
    assert (back.instance(ref) / "data.img").exists() is (what != ".")
    assert not (back.instance(ref) / "snapshot").exists()


def test_an_instance_destroyed_meanwhile_is_not_in_it(
    node: StateLayout, taking: Taking, store: SqliteStore, tmp_path: Path
) -> None:
    def report(text: str) -> None:
        if "1 of 3" in text:
            store.delete_instance(make.instance_ref(2))
            shutil.rmtree(node.instance(make.instance_ref(2)))

    taking.take(tmp_path / "b", report)
    restoring.restore(tmp_path / "b", StateLayout(tmp_path / "back"), quiet)
    assert len(statuses(StateLayout(tmp_path / "back"))) == 2


@pytest.fixture
def taken(node: StateLayout, taking: Taking, tmp_path: Path) -> Path:
    taking.take(tmp_path / "b", quiet)
    return tmp_path / "b"


def test_only_into_what_is_empty(taken: Path, tmp_path: Path, node: StateLayout) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    for used in (tmp_path / "full", node.root):
        before = sorted(used.rglob("*"))
        with pytest.raises(NotAllowed) as caught:
            restoring.restore(taken, StateLayout(used), quiet)
        assert caught.value.code == "backup.not_empty"
        assert sorted(used.rglob("*")) == before
    with pytest.raises(NotFound):
        restoring.restore(tmp_path / "none", StateLayout(tmp_path / "empty"), quiet)
    restoring.restore(taken, StateLayout(tmp_path / "empty"), quiet)
    assert len(statuses(StateLayout(tmp_path / "empty"))) == 3


def test_a_damaged_one_is_refused_before_anything_is_written(taken: Path, tmp_path: Path) -> None:
    with taken.open("r+b") as file:
        file.seek(taken.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(Failed) as caught:
        restoring.restore(taken, StateLayout(tmp_path / "back"), quiet)
    assert caught.value.code == "backup.damaged"
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("mounted", [False, True])
def test_a_killed_restore_leaves_nothing_half(
    taken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mounted: bool
) -> None:
    """Killed at each rename and in the middle of the data, into a plain directory and into one that is a mount."""
    root = tmp_path / "back"
    for number in range(80):
        shutil.rmtree(root, ignore_errors=True)
        if mounted:
            (root / "lost+found").mkdir(parents=True)
        left = [number]

        def die(*_: object, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Killed

        with monkeypatch.context() as patch:
            renames = Path.rename

            def rename(self: Path, to: Path, die: object = die, renames: object = renames) -> object:
                die()  # type: ignore[operator]
                return renames(self, to)  # type: ignore[operator]

            patch.setattr(Path, "rename", rename)
            patch.setattr(restoring.shutil, "rmtree", lambda *_, **__: None)  # who is killed tidies nothing up
            try:
                restoring.restore(taken, StateLayout(root), lambda what, _, die=die: die() if "ing" in what else None)
            except Killed:
                pass
            else:
                break
        with pytest.raises(NotAllowed) if (root / ".restoring").exists() else nullcontext():
            assert state_dir.check_version(StateLayout(root)) is None
        restoring.restore(taken, StateLayout(root), quiet)
        assert len(statuses(StateLayout(root))) == 3
        assert not list(tmp_path.glob(".back*"))
        assert not (root / ".restoring").exists()
    else:
        pytest.fail("it never went through")
