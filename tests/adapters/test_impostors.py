"""A process is a VMM of ours by its command line and its user; one that only says so is left alone."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mvm.domain.addressing import bridge_mac, is_guest_uid, tap_uid
from mvm.domain.ids import InstanceRef
from mvm.domain.instance import ProcessIdentity
from mvm.domain.layout import StateLayout
from mvm.drivers import processes
from mvm.drivers.disk_usage import mounted_within
from mvm.drivers.file_storage import FileStorage
from mvm.drivers.identity import mark
from mvm.drivers.qemu.argv import BINARY
from mvm.drivers.qemu.driver import QemuDriver
from mvm.drivers.shell import LocalShell
from mvm.ports.vmm import Presence
from tests.support.make import instance_ref
from tests.support.waiting import until

ONE, TWO = instance_ref(1), instance_ref(2)
ONES_UID, TWOS_UID, NOBODY = 0x6000_0003, 0x6000_0004, 65534

Pretend = Callable[[InstanceRef, int], ProcessIdentity]

pytestmark = pytest.mark.root


@pytest.fixture
def layout(tmp_path: Path) -> StateLayout:
    return StateLayout(tmp_path / "state")


@pytest.fixture
def pretend(layout: StateLayout) -> Iterator[Pretend]:
    """Starts a shell that calls itself QEMU, as some user."""
    started: list[subprocess.Popen[bytes]] = []

    def start(ref: InstanceRef, uid: int) -> ProcessIdentity:
        words = [BINARY, "-c", "read x", "-name", f"guest={mark(layout)}:{ref}"]
        started.append(
            subprocess.Popen(words, executable="/bin/sh", user=uid, group=uid, extra_groups=[], cwd="/",
                             stdin=subprocess.PIPE)
        )  # fmt: skip
        pid = started[-1].pid
        until(lambda: processes.arguments(pid) == words, 10, "it runs")
        process = processes.identify(pid)
        assert process is not None
        return process

    yield start
    for each in started:
        each.kill()
        each.communicate()


def test_the_nodes_own_user_and_guests_users_may_be_vmms(layout: StateLayout, pretend: Pretend) -> None:
    own, guest, foreign = pretend(ONE, os.geteuid()), pretend(TWO, TWOS_UID), pretend(TWO, NOBODY)
    driver = QemuDriver(layout, LocalShell())
    assert driver.processes() == {ONE: (own,), TWO: (guest,)}
    assert driver.strangers() == {f"process {foreign.pid} of {TWO}": f"it runs as user {NOBODY}"}
    assert driver.observe(TWO, guest) is Presence.PRESENT
    assert driver.observe(TWO, foreign) is Presence.ABSENT


def test_a_vmm_that_poses_as_anothers_is_not_taken_for_it_and_not_ended(layout: StateLayout, pretend: Pretend) -> None:
    driver = QemuDriver(layout, LocalShell(), uid_of={ONE: ONES_UID, TWO: TWOS_UID}.get)
    mine, posing = pretend(ONE, ONES_UID), pretend(ONE, TWOS_UID)
    assert driver.processes() == {ONE: (mine,)}
    assert driver.strangers() == {f"process {posing.pid} of {ONE}": f"it runs as user {TWOS_UID}"}
    driver.kill(ONE, None)
    assert driver.processes() == {}
    assert driver.observe(ONE, None) is Presence.ABSENT
    assert processes.runs(posing)


def test_a_directory_with_a_mount_or_of_another_user_is_not_surely_ours(layout: StateLayout) -> None:
    storage = FileStorage(layout, LocalShell())
    assert storage.not_ours(ONE) is None
    storage.prepare(ONE, data_disk_mib=0)
    assert storage.not_ours(ONE) is None
    directory = storage.directory(ONE)
    os.chown(directory, NOBODY, NOBODY)
    assert storage.not_ours(ONE) == f"{directory} belongs to user {NOBODY}"


def test_what_an_instance_has_written_is_kept_though_the_store_has_lost_it(layout: StateLayout) -> None:
    storage = FileStorage(layout, LocalShell())
    storage.prepare(ONE, data_disk_mib=8)
    disk = storage.data_disk(ONE)
    assert (storage.not_ours(ONE) or "").startswith(f"there may be data on {disk}")
    storage.snapshot(ONE).mkdir()
    assert (storage.not_ours(ONE) or "").startswith(f"somebody may sleep in {storage.snapshot(ONE)}")


def test_mounts_are_found_where_they_are() -> None:
    assert mounted_within(Path("/proc")) == Path("/proc")
    assert mounted_within(Path("/proc/self/fd")) is None


@pytest.mark.parametrize(
    ("name", "uid", "mac"),
    [("tn7i9", 0x6007_0009, None), ("tn0i3", ONES_UID, None), ("br-tenant-258", None, "02:6d:01:02:00:01"),
     ("tn7", None, None), ("tnxi3", None, None), ("br-tenant-", None, None), ("eth0", None, None)],
)  # fmt: skip
def test_names_tell_the_other_mark(name: str, uid: int | None, mac: str | None) -> None:
    assert (tap_uid(name), bridge_mac(name)) == (uid, mac)


def test_the_range_of_guests_users() -> None:
    assert [is_guest_uid(uid) for uid in (0, 1000, NOBODY, 0x5FFF_FFFF, 0x6000_0000, 0x6FFF_FFFF, 0x7000_0000)] == [
        False, False, False, False, True, True, False,
    ]  # fmt: skip
