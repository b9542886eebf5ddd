"""A copy of a real guest's data disk at one instant, while the guest writes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from mvm.drivers.backup import archive
from mvm.drivers.qemu import disk_copy
from mvm.errors import Failed
from mvm.ports.vmm import BootSpec
from tests.support.microvm import ANSWER_S, BOOT_S, QemuHost, identity, qemu_host
from tests.support.waiting import until

pytestmark = [pytest.mark.root, pytest.mark.guest]
# Each file is written, then named; so the newest name is of a file that is whole, wherever this is cut off.
WRITER = """
i=0; while :; do
  i=$((i + 1)); yes $i | head -c 100000 >/data/draft; sync; mv /data/draft /data/file; sync; echo $i >/run/written
done >/dev/null 2>&1 &
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QemuHost]:
    with qemu_host(tmp_path_factory.mktemp("host")) as made:
        yield made


@pytest.fixture
def spec(host: QemuHost, tmp_path: Path) -> Iterator[BootSpec]:
    """A guest that has a data disk and writes to it."""
    disk = tmp_path / "data.img"
    host.shell.run(["mkfs.ext4", "-q", "-O", "has_journal", str(disk), "64M"])
    spec = replace(host.spec(2), data_disk=disk)
    host.running(spec)
    host.guest.configure(spec.ref, spec.directory, identity(data_disk=True), deadline_s=BOOT_S)
    host.guest.execute(spec.ref, spec.directory, WRITER, deadline_s=ANSWER_S)
    until(lambda: written(host, spec) > 0, 30, "it writes")
    yield spec
    host.vmm.kill(spec.ref, None)


def written(host: QemuHost, spec: BootSpec) -> int:
    said = host.guest.execute(spec.ref, spec.directory, "cat /run/written", deadline_s=ANSWER_S).stdout
    return int(said or 0)


def take(host: QemuHost, spec: BootSpec, into: Path) -> None:
    (process,) = host.vmm.processes()[spec.ref]
    assert spec.data_disk
    host.vmm.copy_data_disk(spec.ref, process, spec.data_disk, into)


def kept(host: QemuHost, copy: Path) -> int:
    """The number in the file that the copy has, all of which is the same; the copy's file system is sound."""
    with suppress(Failed):  # the journal is replayed, which e2fsck calls a change
        host.shell.run(["e2fsck", "-p", str(copy)])
    host.shell.run(["e2fsck", "-fn", str(copy)])
    lines = set(host.shell.run(["debugfs", "-R", "cat file", str(copy)]).stdout.split())
    assert len({line for line in lines if len(line) == max(map(len, lines))}) == 1, lines
    return max(map(int, lines))


def test_a_copy_is_of_one_instant_and_the_guest_goes_on(host: QemuHost, spec: BootSpec, tmp_path: Path) -> None:
    for number in range(3):
        before, copy = written(host, spec), tmp_path / f"copy{number}"
        take(host, spec, copy)
        after = written(host, spec)
        assert before <= kept(host, copy) <= after + 1
        assert copy.stat().st_size == 64 << 20
        with copy.open("rb") as file:
            assert sum(count for _, count in archive._extents(file.fileno(), 64 << 20)) < 32 << 20, "it has holes"
        assert copy.stat().st_mode & 0o777 == 0o600
        until(lambda last=after: written(host, spec) > last, 30, "it goes on")  # type: ignore[misc]


def test_a_copy_of_a_guest_that_stands_still_and_after_one_that_was_killed(
    host: QemuHost, spec: BootSpec, tmp_path: Path
) -> None:
    (process,) = host.vmm.processes()[spec.ref]
    with host.vmm._monitor(spec.ref, process) as qmp, (tmp_path / "left").open("w+b") as left:
        left.truncate(64 << 20)
        disk_copy._begin(qmp, left.fileno())
    host.vmm.pause(spec.ref, process)
    take(host, spec, tmp_path / "copy")
    assert kept(host, tmp_path / "copy") > 0
    host.vmm.resume(spec.ref, process)
    with host.vmm._monitor(spec.ref, process) as qmp:
        assert qmp.run("query-jobs") == []
        assert not any(fd.get("opaque") for each in qmp.run("query-fdsets") for fd in each["fds"])
