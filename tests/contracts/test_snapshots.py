"""`Snapshotting` of ports/vmm.py."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Protocol

import pytest

from mvm.domain.ids import Revision
from mvm.domain.instance import ProcessIdentity
from mvm.domain.pool import ImageSource
from mvm.domain.snapshot import Compression, Kind
from mvm.drivers.fake import FakeHost
from mvm.errors import Failed, NotFound, TimedOut, Unreachable
from mvm.ports.guest import GuestChannel
from mvm.ports.vmm import BootSpec, Nic, Presence, Snapshotting, TemplateSpec, VmmDriver
from tests.contracts.test_vmm import NETWORK
from tests.support.make import instance_ref
from tests.support.microvm import ANSWER_S, BOOT_S, REVISION, identity, qemu_host

KINDS = ["fake", pytest.param("qemu", marks=[pytest.mark.root, pytest.mark.guest])]
OTHER = Revision("6" * 64)
_numbers = count(20)


class Vmm(VmmDriver, Snapshotting, Protocol):
    """A driver that can do both."""


@dataclass
class Host:
    """A driver under test, a template made with it, and how to spoil what is on disk."""

    vmm: Vmm
    guest: GuestChannel
    make_spec: Callable[[int], BootSpec]
    template: Path
    spoil: Callable[[Path], None]

    def spec(self) -> BootSpec:
        """Of an instance that never was."""
        return self.make_spec(next(_numbers))

    def clone(self, spec: BootSpec) -> ProcessIdentity:
        process = self.vmm.clone(self.template, spec, revision=REVISION)
        self.vmm.resume(spec.ref, process)
        return process

    def named(self, spec: BootSpec, name: str) -> None:
        who = identity(name, mac=spec.nic.mac)
        self.guest.configure(spec.ref, spec.directory, who, deadline_s=BOOT_S)

    def hostname(self, spec: BootSpec) -> str:
        return self.guest.execute(spec.ref, spec.directory, "hostname", deadline_s=ANSWER_S).stdout.decode().strip()

    def save(self, spec: BootSpec, process: ProcessIdentity, template: Path | None) -> Path:
        into = spec.directory / "snapshot"
        self.vmm.save(
            spec, process, template=template, revision=REVISION, into=into, compression=Compression.ZSTD
        )  # fmt: skip
        return into

    def restore(self, spec: BootSpec, snapshot: Path, template: Path | None) -> ProcessIdentity:
        return self.vmm.restore(snapshot, template, spec, revision=REVISION)


def _fake() -> Host:
    host = FakeHost()
    files = host.storage.revision(host.images.build(ImageSource("builtin:", "minimal"), lambda step: None))

    def spec(number: int) -> BootSpec:
        ref = instance_ref(number)
        host.storage.prepare(ref, data_disk_mib=0)
        host.network.ensure_tap(NETWORK, number)
        return BootSpec(
            ref, host.storage.directory(ref), files.kernel, files.initramfs, files.rootfs,
            host.storage.fresh_overlay(ref, files.rootfs), None, 1, 192, Nic(NETWORK.tap(number), NETWORK.mac(number)),
            NETWORK.uid(number),
        )  # fmt: skip

    own = spec(9)
    template = TemplateSpec(
        own.ref,
        own.directory,
        own.kernel,
        own.initramfs,
        own.rootfs,
        own.overlay,
        0,
        own.vcpus,
        own.mem_mib,
        own.uid,
    )
    process = host.vmm.boot_template(template)
    host.guest.settle(own.ref, own.directory, deadline_s=ANSWER_S)
    into = Path("/fake/template")
    host.vmm.save_template(template, process, revision=REVISION, into=into)
    return Host(host.vmm, host.guest, spec, into, host.damage)


def _flip_a_bit(snapshot: Path) -> None:
    path = snapshot / "memory"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)


@pytest.fixture(params=KINDS, scope="module")
def host(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    if request.param == "fake":
        yield _fake()
        return
    with ExitStack() as stack:
        real = stack.enter_context(qemu_host(tmp_path_factory.mktemp("host")))
        yield Host(real.vmm, real.guest, real.spec, real.template(real.template_spec()), _flip_a_bit)


@pytest.fixture
def spec(host: Host) -> Iterator[BootSpec]:
    spec = host.spec()
    yield spec
    host.vmm.kill(spec.ref, None)


def test_a_driver_says_that_it_can(host: Host) -> None:
    assert isinstance(host.vmm, Snapshotting)


def test_a_template_says_what_it_is_and_nothing_runs_any_more(host: Host) -> None:
    said = host.vmm.manifest(host.template)
    assert (said.kind, said.revision, said.template, said.disk) == (Kind.TEMPLATE, REVISION, None, None)
    assert said.size == sum(file.size for file in said.files.values()) > 0
    assert instance_ref(9) not in host.vmm.processes()


def test_clones_stand_still_until_they_are_resumed_and_become_who_they_are_told_to_be(host: Host) -> None:
    specs = [host.spec() for _ in range(3)]
    try:
        for number, spec in enumerate(specs):
            process = host.vmm.clone(host.template, spec, revision=REVISION)
            assert host.vmm.paused(spec.ref, process)
            assert host.vmm.clone(host.template, spec, revision=REVISION) == process
            host.vmm.resume(spec.ref, process)
            host.named(spec, f"clone-{number}")
        assert [host.hostname(spec) for spec in specs] == ["clone-0", "clone-1", "clone-2"]
    finally:
        for spec in specs:
            host.vmm.kill(spec.ref, None)


def test_paused_it_is_silent_and_resumed_it_answers(host: Host, spec: BootSpec) -> None:
    process = host.clone(spec)
    host.named(spec, "here")
    for _ in range(2):
        host.vmm.pause(spec.ref, process)
    assert host.vmm.paused(spec.ref, process)
    with pytest.raises(TimedOut):
        host.guest.ping(spec.ref, spec.directory, deadline_s=0.2)
    for _ in range(2):
        host.vmm.resume(spec.ref, process)
    assert not host.vmm.paused(spec.ref, process)
    assert host.hostname(spec) == "here"


def test_it_sleeps_and_wakes_for_generations(host: Host, spec: BootSpec) -> None:
    process = host.clone(spec)
    host.named(spec, "here")
    for _ in range(3):
        host.guest.prepare_sleep(spec.ref, spec.directory, deadline_s=ANSWER_S)
        snapshot = host.save(spec, process, host.template)
        assert host.vmm.observe(spec.ref, process) is Presence.ABSENT
        said = host.vmm.manifest(snapshot)
        assert (said.kind, said.template) == (Kind.DELTA, host.vmm.manifest(host.template).id)
        process = host.restore(spec, snapshot, host.template)
        assert host.vmm.paused(spec.ref, process)
        assert host.restore(spec, snapshot, host.template) == process
        host.vmm.resume(spec.ref, process)
        now, entropy = datetime.now(UTC), os.urandom(64)
        host.guest.wake(spec.ref, spec.directory, now=now, entropy=entropy, deadline_s=ANSWER_S)
        assert host.hostname(spec) == "here"


def test_what_was_booted_cold_sleeps_as_well(host: Host, spec: BootSpec) -> None:
    process = host.vmm.boot(spec)
    host.guest.hello(spec.ref, spec.directory, deadline_s=BOOT_S)
    host.named(spec, "cold")
    snapshot = host.save(spec, process, None)
    assert host.vmm.manifest(snapshot).kind is Kind.FULL
    host.vmm.resume(spec.ref, host.restore(spec, snapshot, None))
    assert host.hostname(spec) == "cold"


def test_a_snapshot_of_the_past_is_refused(host: Host, spec: BootSpec) -> None:
    process = host.clone(spec)
    host.named(spec, "here")
    snapshot = host.save(spec, process, host.template)
    woken = host.restore(spec, snapshot, host.template)
    host.vmm.resume(spec.ref, woken)
    host.guest.execute(spec.ref, spec.directory, "echo more >/root/more; sync", deadline_s=ANSWER_S)
    host.vmm.kill(spec.ref, woken)
    assert _refused(lambda: host.restore(spec, snapshot, host.template)) == "snapshot.other_disk"


def test_what_differs_is_refused_and_named(host: Host, spec: BootSpec) -> None:
    snapshot = host.save(spec, host.clone(spec), host.template)
    small = replace(spec, mem_mib=spec.mem_mib - 64)
    for wrong, code in (
        (lambda: host.vmm.restore(snapshot, host.template, spec, revision=OTHER), "snapshot.other_revision"),
        (lambda: host.vmm.clone(host.template, spec, revision=OTHER), "snapshot.other_revision"),
        (lambda: host.restore(small, snapshot, host.template), "snapshot.other_machine"),
        (lambda: host.restore(spec, snapshot, None), "snapshot.other_base"),
    ):
        assert _refused(wrong) == code
    assert spec.ref not in host.vmm.processes()


def test_a_damaged_snapshot_is_refused(host: Host, spec: BootSpec) -> None:
    snapshot = host.save(spec, host.clone(spec), host.template)
    host.spoil(snapshot)
    assert _refused(lambda: host.restore(spec, snapshot, host.template)) == "snapshot.damaged"
    assert spec.ref not in host.vmm.processes()
    host.vmm.discard(snapshot)
    host.vmm.discard(snapshot)
    with pytest.raises(NotFound) as caught:
        host.restore(spec, snapshot, host.template)
    assert caught.value.code == "snapshot.not_found"


def test_what_does_not_run_is_gone(host: Host, spec: BootSpec) -> None:
    process = host.clone(spec)
    used = host.vmm.memory(process)
    assert 0 < used.private <= used.pss <= used.rss
    host.vmm.kill(spec.ref, process)
    for call in (
        lambda: host.vmm.pause(spec.ref, process),
        lambda: host.vmm.resume(spec.ref, process),
        lambda: host.vmm.paused(spec.ref, process),
        lambda: host.save(spec, process, host.template),
        lambda: host.vmm.memory(process),
    ):
        with pytest.raises(Unreachable) as caught:
            call()
        assert caught.value.code == "vmm.gone"


def _refused(call: Callable[[], object]) -> str:
    with pytest.raises(Failed) as caught:
        call()
    return caught.value.code
