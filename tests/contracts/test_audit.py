"""ports/audit.py; and what only files can suffer."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mvm.domain.ids import TenantId
from mvm.drivers import audit_log
from mvm.drivers.audit_log import FileAuditLog
from mvm.drivers.fake import FakeHost
from mvm.drivers.locks import FileLocks
from mvm.errors import Failed
from mvm.ports.audit import AuditLog

ACME, OTHER = TenantId("acme"), TenantId("acme-2")


def files_in(directory: Path, rotate_bytes: int = audit_log.ROTATE_BYTES) -> FileAuditLog:
    return FileAuditLog(directory / "audit", FileLocks(directory / "locks"), rotate_bytes=rotate_bytes)


@pytest.fixture(params=["fake", "files", "small files"])
def trails(request: pytest.FixtureRequest, tmp_path: Path) -> AuditLog:
    if request.param == "fake":
        return FakeHost().audit
    return files_in(tmp_path, 20 if request.param == "small files" else audit_log.ROTATE_BYTES)


def add(trails: AuditLog, *lines: str, tenant: TenantId = ACME) -> None:
    with trails.hold(tenant) as trail:
        trail.append(lines)


def text_of(trails: AuditLog, tenant: TenantId = ACME) -> bytes:
    with trails.hold(tenant) as trail:
        return b"".join(data for _, data in trail.files())


def test_lines_stay_in_their_order(trails: AuditLog) -> None:
    with trails.hold(ACME) as trail:
        assert (trail.tail(5), trail.half(), list(trail.files())) == ([], b"", [])
    for number in range(10):
        add(trails, f"line {number}", f"and {number}")
    with trails.hold(ACME) as trail:
        assert trail.tail(1) == [b"and 9"]
        assert trail.tail(3) == [b"and 8", b"line 9", b"and 9"]
        assert len(trail.tail(1000)) == 20
        assert trail.half() == b""
        names = [name for name, _ in trail.files()]
        assert names == sorted(set(names))
    assert text_of(trails).split(b"\n")[:3] == [b"line 0", b"and 0", b"line 1"]


def test_tenants_have_trails_of_their_own(trails: AuditLog) -> None:
    add(trails, "a")
    add(trails, "b", tenant=OTHER)
    assert (text_of(trails), text_of(trails, OTHER)) == (b"a\n", b"b\n")


def test_long_lines_are_found_from_behind(trails: AuditLog) -> None:
    long = "x" * 300_000
    add(trails, "a", long, "b", long)
    with trails.hold(ACME) as trail:
        assert trail.tail(1) == [long.encode()]
        assert trail.tail(3) == [long.encode(), b"b", long.encode()]


def test_threads_add_whole_lines(trails: AuditLog) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: add(trails, f"{n:03}" * 40), range(64)))
    lines = text_of(trails).split(b"\n")[:-1]
    assert sorted(lines) == [(f"{n:03}" * 40).encode() for n in range(64)]


# --- files


def test_a_broken_append_is_seen_and_cut_off_wherever_it_broke(tmp_path: Path) -> None:
    line = json.dumps({"seq": 2, "what": "the line in which it happened"})
    for cut in range(1, len(line) + 1):
        directory = tmp_path / f"{cut}"
        directory.mkdir()
        add(files_in(directory), "first")
        with (directory / "audit/acme/000001.jsonl").open("a") as file:
            file.write(line[:cut])
        trails = files_in(directory)
        with trails.hold(ACME) as trail:
            assert trail.half() == line[:cut].encode()
            assert trail.tail(5) == [b"first"]
            trail.append([line])
            assert trail.half() == b""
        assert text_of(trails) == f"first\n{line}\n".encode()


def test_a_broken_append_to_a_new_file_is_cut_off_too(tmp_path: Path) -> None:
    trails = files_in(tmp_path, rotate_bytes=5)
    add(trails, "first")
    (tmp_path / "audit/acme/000002.jsonl").write_text("sec")
    with trails.hold(ACME) as trail:
        assert (trail.tail(1), trail.half()) == ([b"first"], b"sec")
        trail.append(["second"])
        assert list(trail.files()) == [("000001.jsonl", b"first\n"), ("000002.jsonl", b"second\n")]


def test_a_full_file_is_left_and_another_begun(tmp_path: Path) -> None:
    trails = files_in(tmp_path, rotate_bytes=20)
    for number in range(6):
        add(trails, f"entry {number}")
    assert sorted(path.name for path in (tmp_path / "audit/acme").iterdir()) == [
        "000001.jsonl", "000002.jsonl",
    ]  # fmt: skip
    with trails.hold(ACME) as trail:
        assert trail.tail(4) == [b"entry 2", b"entry 3", b"entry 4", b"entry 5"]


def test_trails_are_private(tmp_path: Path) -> None:
    add(files_in(tmp_path), "a")
    assert (tmp_path / "audit").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "audit/acme").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "audit/acme/000001.jsonl").stat().st_mode & 0o777 == 0o600


def test_a_full_disk_is_said_and_leaves_nothing_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trails = files_in(tmp_path)
    add(trails, "first")
    real = os.write

    def full(fd: int, data: bytes) -> int:
        if len(data) > 3:
            return real(fd, data[:3])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(Failed) as refused:
            add(trails, "sec")
    assert refused.value.code == "disk.full"
    assert text_of(trails) == b"first\n"
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(Failed) as broken:
        add(trails, "second")
    assert broken.value.code == "audit.failed"
    assert text_of(trails) == b"first\n"


_ADDER = """
import sys
from pathlib import Path
from mvm.domain.ids import TenantId
from mvm.drivers.audit_log import FileAuditLog
from mvm.drivers.locks import FileLocks
root, name = Path(sys.argv[1]), sys.argv[2]
trails = FileAuditLog(root / "audit", FileLocks(root / "locks"), rotate_bytes=2000)
for number in range(100):
    with trails.hold(TenantId("acme")) as trail:
        last = trail.tail(1)
        seq = int(last[0].split()[0]) + 1 if last else 1
        trail.append([f"{seq} {name} {number} " + "x" * 50])
"""


def test_processes_take_turns(tmp_path: Path) -> None:
    adders = [subprocess.Popen([sys.executable, "-c", _ADDER, str(tmp_path), name]) for name in "abc"]
    assert [adder.wait(120) for adder in adders] == [0, 0, 0]
    lines = [line.split() for line in text_of(files_in(tmp_path)).decode().splitlines()]
    assert [int(line[0]) for line in lines] == list(range(1, 301))
    for name in "abc":
        assert [int(line[2]) for line in lines if line[1] == name] == list(range(100))
    assert len(list((tmp_path / "audit/acme").iterdir())) > 5


_LIMITED = """
import resource, signal, sys
from pathlib import Path
from mvm.domain.ids import TenantId
from mvm.drivers.audit_log import FileAuditLog
from mvm.drivers.locks import FileLocks
from mvm.errors import Failed
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
root = Path(sys.argv[1])
trails = FileAuditLog(root / "audit", FileLocks(root / "locks"))
with trails.hold(TenantId("acme")) as trail:
    trail.append(["x" * 1000])
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
    try:
        trail.append(["y" * 1000])
    except Failed as error:
        print(error.code, [len(data) for _, data in trail.files()])
"""


def test_a_file_that_may_not_grow_is_said(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _LIMITED, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == "audit.failed [1001]\n"
