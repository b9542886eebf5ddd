"""QEMU's own locks on a guest's disks: no second VMM writes to them, whatever mvm believes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mvm.domain.ids import InstanceRef
from mvm.errors import Failed, MvmError
from mvm.ports.vmm import BootSpec
from tests.support.microvm import REVISION, QemuHost, qemu_host

pytestmark = [pytest.mark.root, pytest.mark.guest]

_DATA_MIB = 16


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QemuHost]:
    with qemu_host(tmp_path_factory.mktemp("locks")) as host:
        yield host


@pytest.fixture(scope="module")
def disk(host: QemuHost, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("disk") / "data.img"
    host.shell.run(["mkfs.ext4", "-q", str(path), f"{_DATA_MIB}M"])
    return path


@pytest.fixture(scope="module")
def holder(host: QemuHost, disk: Path) -> BootSpec:
    """A guest that has the disk, and runs on."""
    spec = replace(host.spec(1), data_disk=disk)
    host.running(spec)
    return spec


def ended(host: QemuHost, ref: InstanceRef) -> bool:
    return ref not in host.vmm.processes()


def test_a_second_vmm_on_a_data_disk_is_refused(host: QemuHost, holder: BootSpec, disk: Path) -> None:
    second = replace(host.spec(2), data_disk=disk)
    with pytest.raises(Failed, match='"write" lock') as caught:
        host.vmm.boot(second)
    assert caught.value.code == "vmm.start_failed"
    assert ended(host, second.ref)


def test_a_second_vmm_on_an_overlay_is_refused(host: QemuHost, holder: BootSpec) -> None:
    second = replace(host.spec(3), overlay=holder.overlay)
    with pytest.raises(Failed, match='"write" lock'):
        host.vmm.boot(second)
    assert ended(host, second.ref)


def test_a_clone_on_a_held_data_disk_does_not_run(host: QemuHost, holder: BootSpec, disk: Path) -> None:
    template = host.template(host.template_spec(90, data_disk_mib=_DATA_MIB))
    second = replace(host.spec(4), data_disk=disk)

    def run() -> None:
        process = host.vmm.clone(template, second, revision=REVISION)
        host.vmm.resume(second.ref, process)

    try:
        with pytest.raises(MvmError, match='"write" lock'):
            run()
    finally:
        host.vmm.kill(second.ref, None)


def test_a_disk_whose_vmm_was_killed_is_free_at_once(host: QemuHost, holder: BootSpec, disk: Path) -> None:
    own = host.spec(5)
    for _ in range(5):
        host.vmm.boot(own)
        host.vmm.kill(own.ref, None)
