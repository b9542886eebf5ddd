"""The fake host behaves as a host would, and fails as it is told."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from inspect import signature
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import pytest

from mvm.domain.addressing import TenantNetwork
from mvm.domain.ids import InstanceRef
from mvm.domain.instance import ProcessIdentity
from mvm.domain.pool import ImageSource
from mvm.drivers.fake import POINTS, FakeHost, ManualClock
from mvm.drivers.fake.shared import SharedFakeHost
from mvm.errors import Failed, MvmError, TimedOut, Unreachable
from mvm.guest import PROTOCOL_VERSION
from mvm.ports.guest import GuestIdentity
from mvm.ports.vmm import BootSpec, Nic, Presence
from tests.support.make import instance_ref

ACME = TenantNetwork(7, IPv4Network("10.240.7.0/24"))
REF = instance_ref(1)
BROKEN = Failed("x.broken", "broken on purpose")


@pytest.fixture
def host() -> FakeHost:
    return FakeHost()


def spec(host: FakeHost, ref: InstanceRef = REF, offset: int = 3) -> BootSpec:
    """Everything `ref` needs to boot, made."""
    files = host.storage.revision(host.images.build(ImageSource("builtin:", "minimal"), lambda step: None))
    host.network.ensure_tap(ACME, offset)
    host.storage.prepare(ref, data_disk_mib=0)
    return BootSpec(
        ref, host.storage.directory(ref), files.kernel, files.initramfs, files.rootfs,
        host.storage.fresh_overlay(ref, files.rootfs), None, 1, 256, Nic(ACME.tap(offset), ACME.mac(offset)),
        ACME.uid(offset),
    )  # fmt: skip


def run(host: FakeHost, command: str) -> tuple[int, str, str]:
    done = host.guest.execute(REF, host.storage.directory(REF), command, deadline_s=5)
    return done.exit_code, done.stdout.decode(), done.stderr.decode()


# --- a life


def test_a_guest_boots_answers_and_shuts_down(host: FakeHost) -> None:
    what = spec(host)
    process = host.vmm.boot(what)
    assert host.vmm.boot(what) == process
    assert host.vmm.observe(REF, process) is Presence.PRESENT
    assert host.vmm.observe(REF, ProcessIdentity(1, 1)) is Presence.ABSENT
    assert host.vmm.processes() == {REF: (process,)}
    assert host.guest.hello(REF, what.directory, deadline_s=5).version == PROTOCOL_VERSION
    assert isinstance(host.clock, ManualClock)
    host.clock.advance(4)
    assert host.guest.ping(REF, what.directory, deadline_s=5) == 4
    host.guest.shutdown(REF, what.directory, deadline_s=5)
    assert host.vmm.wait_gone(process, deadline_s=5)
    assert host.vmm.observe(REF, process) is Presence.ABSENT
    with pytest.raises(Unreachable) as gone:
        host.guest.ping(REF, what.directory, deadline_s=5)
    assert gone.value.code == "guest.gone"
    assert host.vmm.console_tail(what.directory, lines=1) == "reboot: Power down"
    assert host.vmm.boot(spec(host)) != process


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("echo hello   world", (0, "hello world\n", "")),
        ("echo 'a; b'", (0, "a; b\n", "")),
        ("exit 7", (7, "", "")),
        ("echo out; echo err >&2; exit 3; echo never", (3, "out\n", "err\n")),
        ("hostname", (0, "i-00000001\n", "")),
        ("cat /etc/hostname", (0, "i-00000001\n", "")),
        ("false", (1, "", "")),
        ("false; true", (0, "", "")),
        ("frobnicate now", (127, "", "sh: frobnicate: not found\n")),
        ("", (0, "", "")),
    ],
)
def test_a_guest_knows_a_few_commands(host: FakeHost, command: str, expected: tuple[int, str, str]) -> None:
    what = spec(host)
    host.vmm.boot(what)
    assert run(host, "hostname")[1] == "localhost\n"
    identity = GuestIdentity(
        "i-00000001", "1" * 32, "02:6d:00:07:00:03", "10.240.7.3/24", "10.240.7.1", datetime.now(UTC), b"key", "ssh",
        b"seed",
    )  # fmt: skip
    host.guest.configure(REF, what.directory, identity, deadline_s=5)
    assert run(host, command) == expected


def test_a_vmm_without_its_tap_or_overlay_does_not_start(host: FakeHost) -> None:
    what = spec(host)
    host.network.remove_taps(frozenset({what.nic.tap}))
    with pytest.raises(Failed) as refused:
        host.vmm.boot(what)
    assert refused.value.code == "vmm.start_failed"
    what = spec(host)
    host.storage.clean_runtime(REF)
    with pytest.raises(Failed):
        host.vmm.boot(what)
    assert host.vmm.processes() == {}


def test_many_guests_boot_at_once(host: FakeHost) -> None:
    refs = [instance_ref(n) for n in range(1, 33)]
    with ThreadPoolExecutor(8) as pool:
        processes = list(pool.map(lambda n: host.vmm.boot(spec(host, refs[n], n + 3)), range(32)))
    assert len(set(processes)) == 32
    assert host.leaks() == []


# --- bad luck


@pytest.mark.parametrize("point", sorted(POINTS))
def test_every_point_fails_as_often_as_told(host: FakeHost, point: str) -> None:
    part, method = point.split(".")
    act = getattr(getattr(host, part), method)
    host.fail(point, BROKEN, times=2)
    for _ in range(2):
        with pytest.raises(Failed) as caught:
            _call(act)
        assert caught.value is BROKEN
    assert not host._faults[point]


def _call(act: Any) -> None:
    """Call with anything: a fault comes before the arguments are looked at."""
    wanted = [parameter.name for parameter in signature(act).parameters.values()]
    made = act(**dict.fromkeys(wanted))
    if isinstance(made, AbstractContextManager):
        made.__enter__()


def test_a_point_that_is_not_there_is_a_mistake(host: FakeHost) -> None:
    with pytest.raises(ValueError, match=r"vmm\.boot"):
        host.fail("vmm.bot", BROKEN)


def test_a_failure_changes_nothing(host: FakeHost) -> None:
    what = spec(host)
    host.fail("vmm.boot", BROKEN)
    with pytest.raises(MvmError):
        host.vmm.boot(what)
    assert host.vmm.processes() == {}
    host.vmm.boot(what)


def test_a_guest_that_hangs_is_silent_until_it_is_booted_again(host: FakeHost) -> None:
    what = spec(host)
    host.hang_guest(REF)
    process = host.vmm.boot(what)
    before = host.clock.monotonic()
    with pytest.raises(TimedOut) as silent:
        host.guest.hello(REF, what.directory, deadline_s=30)
    assert silent.value.code == "guest.silent"
    assert host.clock.monotonic() - before == 30
    assert not host.vmm.wait_gone(process, deadline_s=2)
    host.vmm.kill(REF, process)
    host.vmm.boot(what)
    host.guest.hello(REF, what.directory, deadline_s=30)
    host.hang_guest(REF)
    with pytest.raises(TimedOut):
        host.guest.ping(REF, what.directory, deadline_s=1)


def test_a_guest_that_panics_ends_its_vmm_and_says_so(host: FakeHost) -> None:
    what = spec(host)
    host.panic_guest(REF)
    process = host.vmm.boot(what)
    assert host.vmm.observe(REF, process) is Presence.ABSENT
    with pytest.raises(Unreachable):
        host.guest.hello(REF, what.directory, deadline_s=30)
    assert "Kernel panic" in host.vmm.console_tail(what.directory, lines=3)
    assert host.vmm.observe(REF, host.vmm.boot(what)) is Presence.PRESENT
    host.panic_guest(REF)
    assert host.vmm.processes() == {}
    assert host.vmm.observe(REF, host.vmm.boot(what)) is Presence.PRESENT


def test_a_process_that_cannot_be_seen_is_unknown(host: FakeHost) -> None:
    process = host.vmm.boot(spec(host))
    host.unseen.add(REF)
    assert host.vmm.observe(REF, process) is Presence.UNKNOWN


def test_what_is_left_behind_is_told(host: FakeHost) -> None:
    what = spec(host)
    assert host.leaks() == [f"file {REF}/overlay.qcow2", "tap tn7i3"]
    host.vmm.boot(what)
    assert host.leaks() == []
    host.storage.remove(REF)
    with host.locks.hold("x", deadline_s=0):
        assert host.leaks() == ["lock x", f"process {REF}"]
    host.kill_process(REF)
    assert host.leaks() == [f"control group {REF}", "tap tn7i3"]
    host.vmm.kill(REF, None)
    assert host.leaks() == ["tap tn7i3"]
    host.network.remove_taps(frozenset({"tn7i3"}))
    assert host.leaks() == []


def test_a_damaged_revision_is_refused(host: FakeHost) -> None:
    steps: list[str] = []
    built = host.images.build(ImageSource("builtin:", "minimal"), steps.append)
    assert steps
    assert built == host.images.build(ImageSource("builtin:", "minimal"), steps.append)
    assert built != host.images.build(ImageSource("builtin:", "python"), steps.append)
    host.damaged.add(built)
    with pytest.raises(Failed) as damaged:
        host.storage.revision(built)
    assert damaged.value.code == "revision.damaged"


# --- shared


def test_processes_share_one_host_through_a_file(tmp_path: Path) -> None:
    one, other = (SharedFakeHost(ManualClock(), tmp_path / "host") for _ in range(2))
    process = one.vmm.boot(spec(one))
    assert other.vmm.processes() == {REF: (process,)}
    assert other.network.taps() == {ACME.tap(3): ACME.bridge}
    other.vmm.kill(REF, process)
    assert one.vmm.observe(REF, process) is Presence.ABSENT
    another = one.vmm.boot(spec(one))
    assert another != process
    other.fail("vmm.observe", BROKEN)
    assert one.vmm.observe(REF, another) is Presence.PRESENT, "a fault is of one process"


def test_many_hosts_on_one_file_lose_nothing(tmp_path: Path) -> None:
    hosts = [SharedFakeHost(ManualClock(), tmp_path / "host") for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: hosts[n % 4].vmm.boot(spec(hosts[n % 4], instance_ref(n), 3 + n)), range(40)))
    assert len({process for (process,) in hosts[0].vmm.processes().values()}) == 40
