"""Templates and snapshots of real guests: what only they can show.

``MVM_TEST_CLONES`` is how many clones are compared, 20 for the whole proof.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from mvm.domain.instance import ProcessIdentity
from mvm.domain.snapshot import Compression
from mvm.domain.vmm import Ending, VmmState
from mvm.drivers import processes, snapshot_files
from mvm.drivers.qemu import driver, memory
from mvm.drivers.qemu.qmp import Qmp
from mvm.errors import Failed, GuestFault, Unreachable
from mvm.ports.guest import Worker
from mvm.ports.vmm import BootSpec, Presence
from tests.support.microvm import ANSWER_S, BOOT_S, GUEST_IP, REVISION, QemuHost, identity, qemu_host
from tests.support.waiting import until

pytestmark = [pytest.mark.root, pytest.mark.guest]

MIB = 1 << 20
DATA_MIB = 16
CLONES = int(os.environ.get("MVM_TEST_CLONES", "8"))


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QemuHost]:
    with qemu_host(tmp_path_factory.mktemp("host")) as host:
        yield host


@pytest.fixture(scope="module")
def template(host: QemuHost) -> Path:
    return host.template(host.template_spec(90, data_disk_mib=DATA_MIB))


@pytest.fixture
def own(host: QemuHost) -> Iterator[BootSpec]:
    """An instance of the test's own, with a data disk."""
    spec = with_data(host, host.spec(1))
    yield spec
    host.vmm.kill(spec.ref, None)
    for left in spec.directory.glob("snapshot*"):
        host.vmm.discard(left)


def with_data(host: QemuHost, spec: BootSpec) -> BootSpec:
    disk = spec.directory / "data.img"
    disk.unlink(missing_ok=True)
    host.shell.run(["mkfs.ext4", "-q", str(disk), f"{DATA_MIB}M"])
    return replace(spec, data_disk=disk)


def execute(host: QemuHost, spec: BootSpec, command: str) -> str:
    result = host.guest.execute(spec.ref, spec.directory, command, deadline_s=BOOT_S)
    assert result.exit_code == 0, result
    return result.stdout.decode().strip()


def clone(host: QemuHost, template: Path, spec: BootSpec) -> ProcessIdentity:
    process = host.vmm.clone(template, spec, revision=REVISION)
    host.vmm.resume(spec.ref, process)
    return process


def configure(host: QemuHost, spec: BootSpec, name: str = "i-00000001", address: str = f"{GUEST_IP}/24") -> None:
    who = identity(name, address, mac=spec.nic.mac, data_disk=True, machine_id=sha256(name.encode()).hexdigest()[:32])
    host.guest.configure(spec.ref, spec.directory, who, deadline_s=BOOT_S)


def sleep(
    host: QemuHost, spec: BootSpec, process: ProcessIdentity, template: Path, how: Compression = Compression.ZSTD
) -> Path:
    into = spec.directory / "snapshot"
    host.vmm.save(spec, process, template=template, revision=REVISION, into=into, compression=how)
    return into


def wake(host: QemuHost, spec: BootSpec, snapshot: Path, template: Path) -> ProcessIdentity:
    process = host.vmm.restore(snapshot, template, spec, revision=REVISION)
    host.vmm.discard(snapshot)
    host.vmm.resume(spec.ref, process)
    host.guest.wake(
        spec.ref, spec.directory, now=datetime.now(UTC), entropy=os.urandom(64), secrets=spec.secrets is not None,
        deadline_s=ANSWER_S,
    )  # fmt: skip
    return process


# --- clones
def test_many_clones_have_nothing_in_common(host: QemuHost, template: Path) -> None:
    numbers = range(100, 100 + CLONES)
    specs = [with_data(host, host.spec(number)) for number in numbers]
    addresses = [f"{IPv4Address('10.240.1.0') + number}/24" for number in numbers]
    try:
        for spec, address in zip(specs, addresses, strict=True):
            clone(host, template, spec)
            configure(host, spec, str(spec.ref.instance), address)
        asked = (
            "head -c 32 /dev/urandom | xxd -p -c 32",
            "cat /etc/machine-id",
            "cat /sys/class/net/eth0/address",
            "hostname; cat /etc/hostname",
            "ip -o -4 addr show eth0 | awk '{print $4}'",
            "cat /proc/sys/kernel/random/uuid",
        )
        said = [execute(host, spec, "; echo --; ".join(asked)).split("\n--\n") for spec in specs]
        answers = list(zip(*said, strict=True))
        assert [len(set(told)) for told in answers] == [CLONES] * len(asked)
        assert answers[2] == tuple(spec.nic.mac for spec in specs)
        assert answers[4] == tuple(addresses)
    finally:
        for spec in specs:
            host.vmm.kill(spec.ref, None)


def test_nothing_a_clone_does_reaches_the_template(host: QemuHost, template: Path, own: BootSpec) -> None:
    before = {path.name: sha256(path.read_bytes()).digest() for path in template.iterdir()}
    process = clone(host, template, own)
    configure(host, own)
    name = host.vmm.manifest(template).id[:32]
    fd = memory.sealed_in(process.pid, name)
    assert fd is not None
    shared = sha256(os.pread(fd, own.mem_mib * MIB, 0)).digest()
    execute(host, own, "head -c 16m /dev/urandom >/dev/shm/x; cp /dev/shm/x /root/x; sync; rm /dev/shm/x")
    assert sha256(os.pread(fd, own.mem_mib * MIB, 0)).digest() == shared
    writable = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    for attempt in (lambda: os.pwrite(writable, b"x", 0), lambda: os.truncate(writable, 0)):
        with pytest.raises(PermissionError):
            attempt()
    os.close(writable)
    os.close(fd)
    assert {path.name: sha256(path.read_bytes()).digest() for path in template.iterdir()} == before
    assert {path.stat().st_mode & 0o777 for path in template.iterdir()} == {0o400}
    words = " ".join(processes.arguments(process.pid))
    assert not [word for word in ("balloon", "free-page-reporting") if word in words]


def test_clones_share_one_memory(host: QemuHost, template: Path) -> None:
    specs = [with_data(host, host.spec(number)) for number in (2, 3)]
    try:
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(lambda spec: host.vmm.clone(template, spec, revision=REVISION), specs))
        name = host.vmm.manifest(template).id[:32]
        files = [memory.sealed_in(process.pid, name) for process in found]
        assert len({os.fstat(fd).st_ino for fd in files if fd is not None}) == 1
        for fd in files:
            assert fd is not None
            os.close(fd)
    finally:
        for spec in specs:
            host.vmm.kill(spec.ref, None)


def test_a_clones_data_disk_is_its_own_from_the_first_block(host: QemuHost, template: Path, own: BootSpec) -> None:
    clone(host, template, own)
    configure(host, own)
    assert execute(host, own, "echo kept >/data/file; sync; df -m /data | awk 'NR==2 {print ($2 > 8)}'") == "1"
    host.vmm.kill(own.ref, None)
    again = replace(host.spec(1), data_disk=own.data_disk)
    clone(host, template, again)
    configure(host, again)
    assert execute(host, again, "cat /data/file") == "kept"


def test_the_guest_tells_what_its_worker_says(host: QemuHost, template: Path, own: BootSpec) -> None:
    clone(host, template, own)
    configure(host, own)
    first = host.guest.status(own.ref, own.directory, deadline_s=ANSWER_S)
    assert first.worker is Worker.UNKNOWN
    execute(host, own, "touch /run/mvm/worker-ready; usleep 20000; touch /run/mvm/worker-busy")
    second = host.guest.status(own.ref, own.directory, deadline_s=ANSWER_S)
    assert second.worker is Worker.BUSY
    assert (second.uptime_s, second.cpu_s) >= (first.uptime_s, first.cpu_s)


def test_a_workload_that_will_not_sleep_is_heard(host: QemuHost, template: Path, own: BootSpec) -> None:
    clone(host, template, own)
    execute(host, own, "mkdir -p /etc/mvm; printf '#!/bin/sh\\necho not now; exit 1\\n' >/etc/mvm/sleep")
    host.guest.prepare_sleep(own.ref, own.directory, deadline_s=ANSWER_S)  # it cannot be run, so it is not
    execute(host, own, "chmod +x /etc/mvm/sleep")
    with pytest.raises(Failed, match="not now"):
        host.guest.prepare_sleep(own.ref, own.directory, deadline_s=ANSWER_S)


# --- sleep and wake
COUNTER = """
exec 5>/root/open; echo first >&5
n=0; while :; do n=$((n + 1)); echo $n >/dev/shm/n.new; mv /dev/shm/n.new /dev/shm/n; usleep 20000
[ -e /dev/shm/ask ] && { rm /dev/shm/ask; echo asked $n >&5; }
done
"""


def test_memory_open_files_and_the_clock_go_on(host: QemuHost, template: Path, own: BootSpec) -> None:
    process = clone(host, template, own)
    configure(host, own)
    execute(host, own, f"cat >/root/counter <<'EOF'{COUNTER}EOF\nsetsid sh /root/counter </dev/null >/dev/null 2>&1 &")
    until(lambda: execute(host, own, "cat /dev/shm/n 2>/dev/null || echo 0") != "0", BOOT_S, "it counts")
    count = 0
    for generation, how in enumerate((Compression.NONE, Compression.LZ4, Compression.ZSTD), start=1):
        execute(host, own, f"head -c 3m /dev/urandom >/dev/shm/g{generation}; cat /dev/shm/g* | sha256sum >/root/sum")
        host.guest.prepare_sleep(own.ref, own.directory, deadline_s=ANSWER_S)
        last = int(execute(host, own, "cat /dev/shm/n"))
        assert last > count
        process = wake(host, own, sleep(host, own, process, template, how), template)
        before = time.time()
        told = float(execute(host, own, "echo $EPOCHREALTIME"))
        assert before - 0.05 < told < time.time() + 0.05
        until(lambda last=last: int(execute(host, own, "cat /dev/shm/n")) > last, BOOT_S, "it counts on")  # type: ignore[misc]
        count = int(execute(host, own, "cat /dev/shm/n"))
        assert count < last + 1000
        assert execute(host, own, "cat /dev/shm/g* | sha256sum | cmp - /root/sum && echo same") == "same"
        execute(host, own, "touch /dev/shm/ask; until [ ! -e /dev/shm/ask ]; do usleep 20000; done")
        shown = execute(host, own, "cat /root/open").splitlines()
        assert (shown[0], len(shown)) == ("first", generation + 1)


@pytest.mark.parametrize("woken", [False, True], ids=["clone", "woken"])
def test_a_guest_that_was_restored_can_reset_its_devices_and_reboot(
    host: QemuHost, template: Path, own: BootSpec, woken: bool
) -> None:
    """Once its VMM did not survive that."""
    process = clone(host, template, own)
    configure(host, own)
    if woken:
        host.guest.prepare_sleep(own.ref, own.directory, deadline_s=ANSWER_S)
        process = wake(host, own, sleep(host, own, process, template), template)
    with suppress(GuestFault):  # it may be gone before it has answered
        execute(host, own, "reboot")
    assert host.vmm.wait_gone(process, deadline_s=BOOT_S)
    assert host.vmm.ending(own.directory) is Ending.REBOOTED


def test_a_guest_that_halts_and_leaves_its_machine_on_has_ended(host: QemuHost, template: Path, own: BootSpec) -> None:
    process = clone(host, template, own)
    configure(host, own)
    assert host.vmm.state(own.ref, process) is VmmState.RUNNING
    with suppress(GuestFault):
        execute(host, own, "halt")
    until(lambda: host.vmm.state(own.ref, process) is VmmState.ENDED, BOOT_S, "it has ended")
    assert host.vmm.observe(own.ref, process) is Presence.PRESENT


@pytest.mark.parametrize("hours", [-9, 9])
def test_a_host_clock_that_moved_is_the_guests_clock(host: QemuHost, template: Path, own: BootSpec, hours: int) -> None:
    process = clone(host, template, own)
    configure(host, own)
    host.vmm.pause(own.ref, process)
    host.vmm.resume(own.ref, process)
    moved = timedelta(hours=hours)
    host.guest.wake(
        own.ref, own.directory, now=datetime.now(UTC) + moved, entropy=bytes(64), secrets=False, deadline_s=ANSWER_S
    )
    before = time.time() + moved.total_seconds()
    told = float(execute(host, own, "echo $EPOCHREALTIME"))
    assert before - 0.05 < told < time.time() + moved.total_seconds() + 0.05


def test_a_slept_delta_is_small(host: QemuHost, template: Path, own: BootSpec) -> None:
    process = clone(host, template, own)
    configure(host, own)
    host.guest.prepare_sleep(own.ref, own.directory, deadline_s=ANSWER_S)
    snapshot = sleep(host, own, process, template)
    assert host.vmm.manifest(snapshot).size <= own.mem_mib * MIB * 0.02


# --- what is refused
def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    _replace(path, bytes(data))


def _truncate(path: Path) -> None:
    _replace(path, path.read_bytes()[:-1])


def _swap(path: Path) -> None:
    other = path.with_name("devices" if path.name != "devices" else "index")
    _replace(path, other.read_bytes())


def _replace(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


@pytest.mark.parametrize("how", [_flip, _truncate, _swap, Path.unlink])
@pytest.mark.parametrize("name", ["manifest.json", "devices", "index", "memory"])
def test_a_snapshot_that_is_not_what_was_written_is_refused(
    host: QemuHost, template: Path, asleep: tuple[BootSpec, Path], name: str, how: Callable[[Path], None]
) -> None:
    spec, snapshot = asleep
    kept = (snapshot / name).read_bytes()
    how(snapshot / name)
    try:
        with pytest.raises(Failed) as caught:
            host.vmm.restore(snapshot, template, spec, revision=REVISION)
        assert (caught.value.code, caught.value.fields["file"]) == ("snapshot.damaged", name)
        assert spec.ref not in host.vmm.processes()
    finally:
        (snapshot / name).unlink(missing_ok=True)
        (snapshot / name).write_bytes(kept)


@pytest.mark.parametrize("how", [_flip, _truncate, _swap, Path.unlink])
@pytest.mark.parametrize("name", ["manifest.json", "devices", "index", "memory", "disk.qcow2"])
def test_a_template_that_is_not_what_was_written_is_refused(
    host: QemuHost, template: Path, own: BootSpec, name: str, how: Callable[[Path], None]
) -> None:
    copy = template.with_name("copied-template")
    host.shell.run(["cp", "-r", "--preserve=mode", str(template), str(copy)])
    try:
        how(copy / name)
        with pytest.raises(Failed) as caught:
            host.vmm.clone(copy, own, revision=REVISION)
        assert (caught.value.code, caught.value.fields["file"]) == ("snapshot.damaged", name)
        assert own.ref not in host.vmm.processes()
    finally:
        host.vmm.discard(copy)


@pytest.fixture(scope="module")
def asleep(host: QemuHost, template: Path) -> tuple[BootSpec, Path]:
    spec = with_data(host, host.spec(4))
    process = clone(host, template, spec)
    configure(host, spec)
    return spec, sleep(host, spec, process, template)


def test_another_template_is_refused(host: QemuHost, template: Path, asleep: tuple[BootSpec, Path]) -> None:
    spec, snapshot = asleep
    other = host.template(host.template_spec(91, data_disk_mib=DATA_MIB))
    with pytest.raises(Failed) as caught:
        host.vmm.restore(snapshot, other, spec, revision=REVISION)
    assert caught.value.code == "snapshot.other_base"


def test_another_qemu_is_refused(
    host: QemuHost, template: Path, asleep: tuple[BootSpec, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, snapshot = asleep
    monkeypatch.setattr(Qmp, "hello", lambda _: "9.0.0")
    with pytest.raises(Failed, match=r"9\.0\.0") as caught:
        host.vmm.restore(snapshot, template, spec, revision=REVISION)
    assert caught.value.code == "snapshot.other_vmm"
    assert spec.ref not in host.vmm.processes()


# --- bad luck
def test_a_full_disk_leaves_the_guest_running_and_nothing_else(
    host: QemuHost, template: Path, own: BootSpec, tmp_path: Path
) -> None:
    process = clone(host, template, own)
    configure(host, own)
    execute(host, own, "head -c 12m /dev/urandom >/dev/shm/x")
    host.shell.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(tmp_path)])
    try:
        with pytest.raises(Failed) as caught:
            host.vmm.save(
                own, process, template=template, revision=REVISION, into=tmp_path / "snapshot",
                compression=Compression.LZ4,
            )  # fmt: skip
        assert caught.value.code == "disk.full"
        assert list(tmp_path.iterdir()) == []
    finally:
        host.shell.run(["umount", str(tmp_path)])
    assert not host.vmm.paused(own.ref, process)
    assert execute(host, own, "echo here") == "here"
    host.vmm.pause(own.ref, process)
    own.directory.joinpath("snapshot.new").write_text("in the way")
    with pytest.raises(Failed):
        sleep(host, own, process, template)
    own.directory.joinpath("snapshot.new").unlink()
    assert host.vmm.paused(own.ref, process)  # as it was


def test_a_save_that_fails_after_its_deadline_leaves_the_guest_running(
    host: QemuHost, template: Path, own: BootSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = clone(host, template, own)

    def fail(disk: Path) -> None:
        assert processes.wait_gone(process, 1.2) is False, "the deadline passes"
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(driver, "_SAVE_S", 1.0)
    monkeypatch.setattr(snapshot_files, "sync", fail)
    with pytest.raises(Failed) as caught:
        sleep(host, own, process, template)
    assert caught.value.code == "disk.full"
    assert not host.vmm.paused(own.ref, process)


def test_a_clone_of_a_replaced_template_does_not_sleep_on_the_new_one(
    host: QemuHost, template: Path, own: BootSpec
) -> None:
    process = clone(host, template, own)
    other = host.template(host.template_spec(92, data_disk_mib=DATA_MIB))
    with pytest.raises(Failed) as caught:
        sleep(host, own, process, other)
    assert caught.value.code == "snapshot.other_base"
    assert not host.vmm.paused(own.ref, process)
    sleep(host, own, process, template)


def test_a_data_disk_written_since_is_refused(host: QemuHost, template: Path, own: BootSpec) -> None:
    process = clone(host, template, own)
    configure(host, own)
    snapshot = sleep(host, own, process, template)
    assert own.data_disk is not None
    os.utime(own.data_disk)
    with pytest.raises(Failed) as caught:
        host.vmm.restore(snapshot, template, own, revision=REVISION)
    assert caught.value.code == "snapshot.other_disk"


@pytest.mark.parametrize("step", ["run:stop", "run:add-fd", "run:xen-save-devices-state", "pack", "sync"])
def test_a_vmm_killed_while_it_is_saved_leaves_nothing_half_done(
    host: QemuHost, template: Path, own: BootSpec, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    process = clone(host, template, own)
    configure(host, own)

    def killing(call: Callable[..., object], when: Callable[..., bool]) -> Callable[..., object]:
        def wrapped(*args: object, **kwargs: object) -> object:
            if when(*args) and processes.runs(process):
                os.kill(process.pid, signal.SIGKILL)
                assert processes.wait_gone(process, ANSWER_S)
            return call(*args, **kwargs)

        return wrapped

    kind, _, command = step.partition(":")
    if kind == "run":
        monkeypatch.setattr(Qmp, "run", killing(Qmp.run, lambda _, name: name == command))
    elif kind == "pack":
        monkeypatch.setattr(memory, "pack", killing(memory.pack, lambda *_: True))
    else:
        monkeypatch.setattr(snapshot_files, "sync", killing(snapshot_files.sync, lambda *_: True))
    into = own.directory / "snapshot"
    if kind == "sync":  # all that was needed of it is in files: the snapshot becomes complete
        sleep(host, own, process, template)
        monkeypatch.undo()
        wake(host, own, into, template)
        assert execute(host, own, "hostname") == "i-00000001"
        return
    with pytest.raises(Unreachable):
        sleep(host, own, process, template)
    assert [path.name for path in own.directory.iterdir() if path.name.startswith("snapshot")] == []


def test_a_guest_left_half_restored_is_restored_anew(
    host: QemuHost, template: Path, own: BootSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the worker had been killed before it told QEMU to load."""

    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        raise Killed

    first = clone(host, template, own)
    snapshot = sleep(host, own, first, template)
    with monkeypatch.context() as patch:
        patch.setattr(memory, "unpack_into", killed)
        patch.setattr(host.vmm, "_end", lambda ref, process: None)
        with pytest.raises(Killed):
            host.vmm.restore(snapshot, template, own, revision=REVISION)
    (half,) = host.vmm.processes()[own.ref]
    process = host.vmm.restore(snapshot, template, own, revision=REVISION)
    assert process != half
    assert host.vmm.processes() == {**host.vmm.processes(), own.ref: (process,)}
    host.vmm.resume(own.ref, process)
    assert execute(host, own, "echo here") == "here"


def test_no_space_is_told_apart_from_other_trouble(tmp_path: Path) -> None:
    for number, code in ((errno.ENOSPC, "disk.full"), (errno.EACCES, "storage.failed")):
        with pytest.raises(Failed) as caught, snapshot_files.appearing(tmp_path / "x"):
            raise OSError(number, "why")
        assert caught.value.code == code
    assert list(tmp_path.iterdir()) == []
