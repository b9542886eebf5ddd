"""ports/vmm.py."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest

from mvm.domain.addressing import TenantNetwork, parse_subnet
from mvm.domain.instance import ProcessIdentity
from mvm.domain.pool import ImageSource
from mvm.domain.vmm import Ending, VmmState
from mvm.drivers.fake import FakeHost
from mvm.errors import Failed, GuestFault, Unreachable
from mvm.ports.guest import GuestChannel
from mvm.ports.vmm import BootSpec, Nic, Presence, VmmDriver
from tests.support.make import instance_ref
from tests.support.microvm import ANSWER_S, BOOT_S, QemuHost, qemu_host

ONE, TWO = instance_ref(1), instance_ref(2)
NETWORK = TenantNetwork(1, parse_subnet("10.240.1.0/24"))


@dataclass
class Side:
    """A driver under test, what its guests need to boot, and the channel to them."""

    vmm: VmmDriver
    guest: GuestChannel
    spec: Callable[[int], BootSpec]
    end: Callable[[BootSpec, ProcessIdentity, Ending], None]
    """The guest ends by itself, or its VMM is ended, in one of these ways; returns when it is gone."""


def fake_side() -> Side:
    host = FakeHost()
    revision = host.images.build(ImageSource("builtin:", "minimal"), lambda step: None)

    def spec(number: int) -> BootSpec:
        ref, files = instance_ref(number), host.storage.revision(revision)
        host.storage.prepare(ref, data_disk_mib=0)
        host.network.ensure_tap(NETWORK, number + 2)
        return BootSpec(
            ref=ref, directory=host.storage.directory(ref), kernel=files.kernel, initramfs=files.initramfs,
            rootfs=files.rootfs, overlay=host.storage.fresh_overlay(ref, files.rootfs), data_disk=None, vcpus=1,
            mem_mib=192, nic=Nic(NETWORK.tap(number + 2), NETWORK.mac(number + 2)), uid=NETWORK.uid(number + 2),
        )  # fmt: skip

    def end(spec: BootSpec, process: ProcessIdentity, how: Ending) -> None:
        if how.by_guest:
            host.halt_guest(spec.ref, how)
        elif how is Ending.PANICKED:
            host.panic_guest(spec.ref)
        else:
            host.end_process(spec.ref, how)

    return Side(host.vmm, host.guest, spec, end)


_COMMANDS = {
    Ending.HALTED: "poweroff -f", Ending.REBOOTED: "reboot -f", Ending.PANICKED: "echo c >/proc/sysrq-trigger",
}  # fmt: skip
_SIGNALS = {Ending.TERMINATED: signal.SIGTERM, Ending.CRASHED: signal.SIGKILL}


def end_qemu(host: QemuHost, spec: BootSpec, process: ProcessIdentity, how: Ending) -> None:
    host.guest.hello(spec.ref, spec.directory, deadline_s=BOOT_S)
    if how in _SIGNALS:
        os.kill(process.pid, _SIGNALS[how])
    else:
        with suppress(GuestFault):
            host.guest.execute(spec.ref, spec.directory, _COMMANDS[how], deadline_s=ANSWER_S)
    assert host.vmm.wait_gone(process, deadline_s=ANSWER_S)


def open_side(kind: str, root: Path, stack: ExitStack) -> Side:
    if kind == "fake":
        return fake_side()
    host = stack.enter_context(qemu_host(root))
    return Side(host.vmm, host.guest, host.spec, partial(end_qemu, host))


@pytest.fixture(params=["fake", pytest.param("qemu", marks=[pytest.mark.root, pytest.mark.guest])])
def side(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Side]:
    with ExitStack() as stack:
        yield open_side(request.param, tmp_path, stack)


def test_nothing_runs_at_first(side: Side) -> None:
    assert side.vmm.observe(ONE, None) is Presence.ABSENT
    assert side.vmm.observe(ONE, ProcessIdentity(1, 1)) is Presence.ABSENT
    assert side.vmm.processes() == {}


def test_a_booted_vmm_is_present_under_its_identity_alone(side: Side) -> None:
    process = side.vmm.boot(side.spec(1))
    assert side.vmm.observe(ONE, process) is Presence.PRESENT
    assert side.vmm.observe(ONE, None) is Presence.PRESENT
    assert side.vmm.observe(TWO, process) is Presence.ABSENT
    assert side.vmm.observe(ONE, process._replace(start_ticks=process.start_ticks + 1)) is Presence.ABSENT


def test_a_second_boot_keeps_the_process(side: Side) -> None:
    spec = side.spec(1)
    process = side.vmm.boot(spec)
    assert side.vmm.boot(spec) == process
    assert side.vmm.processes() == {ONE: (process,)}


def test_kill_ends_one_instance_and_no_other(side: Side) -> None:
    first, second = side.vmm.boot(side.spec(1)), side.vmm.boot(side.spec(2))
    side.vmm.kill(ONE, first)
    assert side.vmm.observe(ONE, first) is Presence.ABSENT
    assert side.vmm.processes() == {TWO: (second,)}


def test_kill_needs_no_identity_and_may_be_repeated(side: Side) -> None:
    process = side.vmm.boot(side.spec(1))
    side.vmm.kill(ONE, None)
    side.vmm.kill(ONE, None)
    side.vmm.kill(ONE, process)
    assert side.vmm.processes() == {}


def test_wait_gone(side: Side) -> None:
    process = side.vmm.boot(side.spec(1))
    assert side.vmm.wait_gone(process, deadline_s=0.05) is False
    side.vmm.kill(ONE, process)
    assert side.vmm.wait_gone(process, deadline_s=0.05) is True


@pytest.mark.parametrize("how", list(Ending))
def test_how_a_run_ended_is_known_though_nobody_listened(side: Side, how: Ending) -> None:
    spec = side.spec(1)
    process = side.vmm.boot(spec)
    assert side.vmm.state(ONE, process) is VmmState.RUNNING
    side.end(spec, process, how)
    assert side.vmm.ending(spec.directory) is how
    with pytest.raises(Unreachable) as caught:
        side.vmm.state(ONE, process)
    assert caught.value.code == "vmm.gone"
    again = side.vmm.boot(side.spec(1))
    side.vmm.kill(ONE, again)
    assert side.vmm.ending(spec.directory) is Ending.CRASHED  # not what it was the time before


def test_of_an_instance_that_never_ran_no_end_is_known(side: Side, tmp_path: Path) -> None:
    assert side.vmm.ending(tmp_path / "none") is Ending.CRASHED


def test_an_instance_boots_again_after_its_end(side: Side) -> None:
    first = side.vmm.boot(side.spec(1))
    side.vmm.kill(ONE, first)
    second = side.vmm.boot(side.spec(1))
    assert second != first
    assert side.vmm.processes() == {ONE: (second,)}


def test_no_boot_without_its_tap(side: Side) -> None:
    spec = side.spec(1)
    with pytest.raises(Failed):
        side.vmm.boot(replace(spec, nic=replace(spec.nic, tap="tn1i99")))
    assert side.vmm.processes() == {}


def test_the_console_of_an_instance_that_never_ran_is_empty(side: Side, tmp_path: Path) -> None:
    assert side.vmm.console_tail(tmp_path / "none", lines=10) == ""
    assert side.vmm.console(tmp_path / "none", offset=0) == ("", 0)
    side.vmm.trim_console(tmp_path / "none", keep=1)
