"""Real guests: what only they can show."""

from __future__ import annotations

import fcntl
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from mvm import guest
from mvm.domain.commands import ExecEnd, ExecOutput
from mvm.domain.vmm import VmmState
from mvm.drivers.builtin import cpio
from mvm.drivers.builtin.tree import Tree
from mvm.errors import Failed, GuestFault, GuestRefused, GuestSilent, InvalidInput, MvmError, TimedOut, Unreachable
from mvm.ports.guest import ExecResult
from mvm.ports.vmm import BootSpec, Presence
from tests import support
from tests.support.microvm import (
    ANSWER_S,
    BOOT_S,
    GUEST_IP,
    HOST_KEY,
    QemuHost,
    SshKey,
    identity,
    minimal_image,
    qemu_host,
)
from tests.support.replaced import agent_replaced_by
from tests.support.waiting import until

pytestmark = [pytest.mark.root, pytest.mark.guest]

MIB = 1 << 20


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QemuHost]:
    with qemu_host(tmp_path_factory.mktemp("host")) as host:
        yield host


@pytest.fixture(scope="module")
def shared(host: QemuHost) -> BootSpec:
    """A guest for all tests that leave it running."""
    spec = host.spec(1)
    host.running(spec)
    return spec


@pytest.fixture
def own(host: QemuHost) -> Iterator[BootSpec]:
    """What a guest of the test's own needs; it is gone afterwards."""
    spec = host.spec(2)
    yield spec
    host.vmm.kill(spec.ref, None)


def execute(host: QemuHost, spec: BootSpec, command: str, deadline_s: float = ANSWER_S) -> ExecResult:
    return host.guest.execute(spec.ref, spec.directory, command, deadline_s=deadline_s)


# --- commands
def test_a_mebibyte_of_each_stream_is_kept(host: QemuHost, shared: BootSpec) -> None:
    result = execute(host, shared, f"head -c {MIB} /dev/zero; head -c {MIB + 1} /dev/zero >&2")
    assert (result.exit_code, len(result.stdout), len(result.stderr), result.truncated) == (0, MIB, MIB, True)
    whole = execute(host, shared, f"head -c {MIB} /dev/urandom | tee /tmp/sent; sha256sum /tmp/sent >&2")
    assert (len(whole.stdout), whole.truncated) == (MIB, False)


@pytest.mark.parametrize("command", ["echo before; sleep 600", "echo before; sleep 600 & wait"])
def test_past_its_deadline_a_command_is_ended(host: QemuHost, shared: BootSpec, command: str) -> None:
    expected = ExecResult(guest.DEADLINE_EXIT, b"before\n", b"", timed_out=True)
    assert execute(host, shared, command, 2) == expected
    until(lambda: running(host, shared, "sleep 600") == 0, ANSWER_S, "it has ended")


def test_a_command_has_ended_when_its_first_process_has(host: QemuHost, shared: BootSpec) -> None:
    began = time.monotonic()
    assert execute(host, shared, "echo out; sleep 601 & exit 7", 600) == ExecResult(7, b"out\n", b"")
    assert execute(host, shared, "sleep 601 >/dev/null 2>&1 & echo started", 600).stdout == b"started\n"
    assert time.monotonic() - began < 300
    assert running(host, shared, "sleep 601") == 2, "what it leaves behind is let be"
    execute(host, shared, "killall sleep")
    until(lambda: execute(host, shared, "true") and groups(host, shared) == 1, ANSWER_S, "their groups have gone")


def test_all_that_was_written_before_the_end_arrives(host: QemuHost, shared: BootSpec) -> None:
    for _ in range(20):
        result = execute(host, shared, "sleep 603 & head -c 60000 /dev/zero; head -c 60000 /dev/zero >&2; kill $!")
        assert (len(result.stdout), len(result.stderr), result.exit_code) == (60_000, 60_000, 0)


def test_output_has_no_limit_and_waits_for_its_reader(host: QemuHost, shared: BootSpec) -> None:
    size = 5 * MIB + 1
    with closing(host.guest.run(shared.ref, shared.directory, b"head -c %d /dev/zero" % size, deadline_s=600)) as parts:
        taken = 0
        for part in parts:
            if isinstance(part, ExecEnd):
                assert part == ExecEnd(0)
                break
            taken += len(part.stdout)
    assert taken == size


def test_a_full_file_system_keeps_no_command_from_running(host: QemuHost, shared: BootSpec) -> None:
    full = "dd if=/dev/zero of=/run/fill bs=64k 2>/dev/null; echo full"
    assert execute(host, shared, full, BOOT_S).stdout == b"full\n"
    try:
        assert execute(host, shared, "echo x >/run/more; echo well; exit 3").stdout == b"well\n"
        assert host.guest.ping(shared.ref, shared.directory, deadline_s=ANSWER_S) > 0
        host.guest.configure(shared.ref, shared.directory, identity("i-0000f111"), deadline_s=BOOT_S)
    finally:
        execute(host, shared, "rm -f /run/fill /run/more")
    assert execute(host, shared, "hostname").stdout == b"i-0000f111\n"


HIDING = {
    "a child": b"sleep 604 & wait",
    "a session of its own": b"setsid sleep 604 & wait",
    "a daemon": b"(setsid sh -c 'sleep 604 & wait' >/dev/null 2>&1 </dev/null &) ; sleep 100",
    "one that ignores signals": b"trap '' HUP INT TERM; sleep 604 & wait; true",
    "one that writes": b"sleep 604 & yes",
}


@pytest.mark.parametrize("name", HIDING)
def test_a_command_ends_with_whoever_asked_for_it(host: QemuHost, shared: BootSpec, name: str) -> None:
    before = groups(host, shared)
    with closing(host.guest.run(shared.ref, shared.directory, HIDING[name], deadline_s=600)) as parts:
        until(lambda: next(parts) and running(host, shared, "sleep 604") == 1, BOOT_S, "it runs")
    until(lambda: running(host, shared, "sleep 604") == 0, ANSWER_S, "it has ended")
    assert groups(host, shared) == before


def groups(host: QemuHost, spec: BootSpec) -> int:
    """How many control groups of commands there are; one is that of this command."""
    return int(execute(host, spec, "ls -d /sys/fs/cgroup/mvm-* | wc -l").stdout)


def running(host: QemuHost, spec: BootSpec, words: str) -> int:
    """How many processes in the guest have these words."""
    return int(execute(host, spec, f"ps | grep -c '[{words[0]}]{words[1:]}$'").stdout)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("cat; echo $?", ExecResult(0, b"0\n", b"")),  # stdin is at its end
        ("kill -9 $$", ExecResult(137, b"", b"")),
        ("pwd; id -u; echo $HOME", ExecResult(0, b"/root\n0\n/root\n", b"")),
        ("printf '\\0\\377\\n\\n'", ExecResult(0, b"\0\xff\n\n", b"")),
        ("echo 'ä \"$x\" *' \\\\", ExecResult(0, 'ä "$x" * \\\n'.encode(), b"")),
        (": " + "x" * 90_000 + "; echo long", ExecResult(0, b"long\n", b"")),
    ],
)  # fmt: skip
def test_commands_arrive_as_they_are(host: QemuHost, shared: BootSpec, command: str, expected: ExecResult) -> None:
    assert execute(host, shared, command) == expected


@pytest.mark.parametrize("command", ["", "echo \0", "x" * 100_000])
def test_commands_no_shell_can_be_given_are_refused(host: QemuHost, shared: BootSpec, command: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        execute(host, shared, command)
    assert caught.value.code == "guest.invalid_command"


def test_commands_run_beside_each_other_and_beside_control(host: QemuHost, shared: BootSpec) -> None:
    waiting = "touch /tmp/here.$$; until [ -e /tmp/go ]; do usleep 20000; done; echo went"
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(execute, host, shared, waiting) for _ in range(2)]
        until(lambda: execute(host, shared, "ls /tmp/here.* | wc -l").stdout == b"2\n", BOOT_S, "both run")
        assert host.guest.ping(shared.ref, shared.directory, deadline_s=ANSWER_S) > 0
        execute(host, shared, "touch /tmp/go")
        assert [call.result().stdout for call in calls] == [b"went\n"] * 2


def test_more_commands_than_ports_take_turns(host: QemuHost, shared: BootSpec) -> None:
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda n: execute(host, shared, f"echo {n}", BOOT_S).stdout, range(8)))
    assert results == [f"{n}\n".encode() for n in range(8)]


def test_whoever_waits_too_long_for_a_turn_is_told(host: QemuHost, shared: BootSpec) -> None:
    with ThreadPoolExecutor(len(guest.EXEC)) as pool:
        busy = "touch /tmp/busy.$$; until [ -e /tmp/free ]; do usleep 20000; done"
        calls = [pool.submit(execute, host, shared, busy, BOOT_S) for _ in guest.EXEC]
        locks = [shared.directory / f"{port}.lock" for port in guest.EXEC]
        until(lambda: all(_is_locked(lock) for lock in locks), BOOT_S, "all ports taken")
        with pytest.raises(TimedOut) as caught:
            execute(host, shared, "true", 0.1)
        assert caught.value.code == "guest.busy"
        with _client(shared, guest.CONTROL) as control:  # the control port knows no exec
            control.sendall(b"\nx exec 1 eA== .\n")
            with control.makefile("rb") as replies:
                assert next(line for line in replies if line.strip()) == b"x 127 unknown request\n"
        host.guest.configure(shared.ref, shared.directory, identity(), deadline_s=BOOT_S)
        _ssh(host, shared, "touch /tmp/free")
        assert [call.result().exit_code for call in calls] == [0] * len(guest.EXEC)


def test_a_client_that_goes_away_takes_its_command_along_and_frees_the_port(host: QemuHost, shared: BootSpec) -> None:
    for port in guest.EXEC:
        with _client(shared, port) as client:
            client.sendall(b"\nanother1 run " + letters(b"sleep 602") + b" .\n")
        with _client(shared, port) as client:
            client.sendall(b"\nanother2 run " + letters(b"sleep")[:-1])
        with _client(shared, port) as client:
            client.sendall(b"\nanother3 walk abab .\n\n .\n" + b"x" * 300_000)
    for _ in range(2 * len(guest.EXEC)):
        assert execute(host, shared, "echo free").stdout == b"free\n"
    until(lambda: execute(host, shared, "ps | grep -c '[s]leep 602'").stdout == b"0\n", ANSWER_S, "the commands ended")


@pytest.fixture
def older(host: QemuHost, own: BootSpec, tmp_path: Path) -> BootSpec:
    """A running guest whose scripts are those of protocol 4, as older images and snapshots have them."""
    rootfs = tmp_path / "rootfs.ext4"
    shutil.copyfile(own.rootfs, rootfs)
    for name in ("agent", "rc"):
        inside, script = f"/usr/lib/mvm/{name}", Path(support.__file__).with_name(f"guest_{name}_4.sh")
        for words in (f"rm {inside}", f"write {script} {inside}", f"sif {inside} mode 0100755"):
            host.shell.run(["debugfs", "-w", "-R", words, str(rootfs)])
    spec = replace(own, rootfs=rootfs)
    host.running(spec)
    return spec


def test_an_older_guest_is_served(host: QemuHost, older: BootSpec) -> None:
    assert host.guest.hello(older.ref, older.directory, deadline_s=BOOT_S).version == 4
    assert execute(host, older, "echo out; echo err >&2; exit 3", BOOT_S) == ExecResult(3, b"out\n", b"err\n")
    cut = list(host.guest.run(older.ref, older.directory, b"head -c 2000000 /dev/zero", deadline_s=BOOT_S))
    assert sum(len(part.stdout) for part in cut if isinstance(part, ExecOutput)) == MIB
    assert cut[-1] == ExecEnd(0, truncated=True)
    late = ExecResult(guest.DEADLINE_EXIT, b"before\n", b"", timed_out=True)
    assert execute(host, older, "echo before; sleep 605", 2) == late
    with closing(host.guest.run(older.ref, older.directory, b"sleep 606", deadline_s=600)) as parts:
        until(lambda: next(parts) and running(host, older, "sleep 606") == 1, BOOT_S, "it runs")
    until(lambda: running(host, older, "sleep 606") == 0, ANSWER_S, "it has ended")


def letters(command: bytes) -> bytes:
    return b"".join(bytes((97 + (byte >> 4), 97 + (byte & 15))) for byte in command)


# --- identity
def test_configure_sets_everything(host: QemuHost, shared: BootSpec) -> None:
    then = datetime.now(UTC) - timedelta(days=400)
    who = identity("i-0badcafe", now=then)
    host.guest.configure(shared.ref, shared.directory, who, deadline_s=BOOT_S)
    shown = execute(
        host, shared,
        "hostname; ip -o -4 addr show eth0 | sed 's/.*inet \\([^ ]*\\).*/\\1/'; ip route | grep default; date -u +%Y;"
        "stat -c '%a %n' /run/mvm/ssh/*; stat -f -c %T /root/.ssh/; cat /root/.ssh/authorized_keys",
    ).stdout.decode()  # fmt: skip
    assert shown.splitlines() == [
        "i-0badcafe", f"{GUEST_IP}/24", "default via 10.240.1.1 dev eth0 ", str(then.year),
        "600 /run/mvm/ssh/authorized_keys", "600 /run/mvm/ssh/host_key", "tmpfs", who.authorized_key,
    ]  # fmt: skip
    keys = [who.authorized_key.split()[1].encode(), who.ssh_host_key]
    told = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid, _ in host.vmm.processes()[shared.ref]]
    told += [execute(host, shared, "cat /proc/cmdline /proc/*/cmdline").stdout]
    assert not [text for text in told for key in keys if key in text]


@pytest.mark.parametrize(
    ("wrong", "step"),
    [
        ({"address": "10.240.1.300/24"}, "address"),
        ({"gateway": "192.0.2.1"}, "gateway"),
        ({"ssh_host_key": b""}, "keys"),
        ({"authorized_key": ""}, "keys"),
    ],
)
def test_a_guest_that_cannot_become_it_says_why(
    host: QemuHost, shared: BootSpec, wrong: dict[str, object], step: str
) -> None:
    with pytest.raises(Failed) as caught:
        host.guest.configure(shared.ref, shared.directory, identity(**wrong), deadline_s=BOOT_S)  # type: ignore[arg-type]
    assert caught.value.code == "guest.refused"
    assert f"{step}:" in caught.value.message


def test_no_identity_may_smuggle_in_another_word(host: QemuHost, shared: BootSpec) -> None:
    with pytest.raises(InvalidInput) as caught:
        host.guest.configure(shared.ref, shared.directory, identity("a hostname=b"), deadline_s=ANSWER_S)
    assert caught.value.fields["field"] == "hostname"


def test_ssh_with_a_pinned_host_key(host: QemuHost, shared: BootSpec) -> None:
    result = _ssh(host, shared, "echo out; echo err >&2; exit 7")
    assert (result.returncode, result.stdout, result.stderr) == (7, "out\n", "err\n")


# --- disks
def test_the_data_disk_outlives_a_run_and_the_root_disk_does_not(host: QemuHost, own: BootSpec, tmp_path: Path) -> None:
    disk = tmp_path / "data.img"
    host.shell.run(["mkfs.ext4", "-q", str(disk), "16M"])
    spec = replace(own, data_disk=disk)
    host.running(spec)
    for _ in range(2):
        host.guest.configure(spec.ref, spec.directory, identity(data_disk=True), deadline_s=BOOT_S)
    written = execute(host, spec, "echo kept >/data/file; echo lost >/root/file; df -m / | awk 'NR==2 {print $4}'")
    assert 50 <= int(written.stdout) <= 80
    (process,) = host.vmm.processes()[spec.ref]
    host.guest.shutdown(spec.ref, spec.directory, deadline_s=ANSWER_S)
    assert host.vmm.wait_gone(process, deadline_s=ANSWER_S)
    state = host.shell.run(["dumpe2fs", "-h", str(disk)])
    assert "needs_recovery" not in state.stdout  # let go cleanly

    again = replace(host.spec(2), data_disk=disk)
    host.running(again)
    host.guest.configure(again.ref, again.directory, identity(data_disk=True), deadline_s=BOOT_S)
    assert execute(host, again, "cat /data/file /root/file").stdout == b"kept\n"


def test_a_broken_data_disk_is_told(host: QemuHost, own: BootSpec, tmp_path: Path) -> None:
    disk = tmp_path / "data.img"
    os.truncate(os.open(disk, os.O_CREAT | os.O_WRONLY), 16 * MIB)
    spec = replace(own, data_disk=disk)
    host.running(spec)
    with pytest.raises(Failed, match="data: mount") as caught:
        host.guest.configure(spec.ref, spec.directory, identity(data_disk=True), deadline_s=BOOT_S)
    assert caught.value.fields["missing"] == ["data", "secrets", "keys", "ssh"]


def test_a_missing_data_disk_is_told(host: QemuHost, shared: BootSpec) -> None:
    with pytest.raises(Failed, match="data: there is none"):
        host.guest.configure(shared.ref, shared.directory, identity(data_disk=True), deadline_s=BOOT_S)


# --- bad luck
def test_a_panic_ends_the_vm_and_is_on_the_console(host: QemuHost, own: BootSpec) -> None:
    host.running(own)
    with pytest.raises(Unreachable) as caught:
        execute(host, own, "echo c >/proc/sysrq-trigger", BOOT_S)
    assert caught.value.code == "guest.gone"
    assert "Kernel panic - not syncing: sysrq triggered crash" in host.vmm.console_tail(own.directory, lines=12)
    text, offset = host.vmm.console(own.directory, offset=0)
    assert "Kernel panic" in text
    assert host.vmm.console(own.directory, offset=offset) == ("", offset)


def _initramfs(at: Path, init: str) -> Path:
    """A guest's own initramfs with another first process."""
    tree = Tree()
    tree.file("bin/busybox", _busybox(), 0o755)
    tree.file("init", init.encode(), 0o755)
    tree.directory("dev")
    at.write_bytes(cpio.archive(tree))
    return at


def _busybox() -> bytes:
    image = minimal_image() / "rootfs.ext4"
    return subprocess.run(["debugfs", "-R", "cat /usr/bin/busybox", str(image)], capture_output=True, check=True).stdout


def test_a_guest_that_hangs_is_silent_until_it_is_killed(host: QemuHost, own: BootSpec, tmp_path: Path) -> None:
    hanging = _initramfs(
        tmp_path / "i", "#!/bin/busybox sh\necho here I hang\nwhile :; do /bin/busybox sleep 1; done\n"
    )
    spec = replace(own, initramfs=hanging)
    process = host.vmm.boot(spec)
    until(lambda: "here I hang" in host.vmm.console_tail(spec.directory, lines=3), BOOT_S, "it hangs")
    with pytest.raises(TimedOut) as caught:
        host.guest.hello(spec.ref, spec.directory, deadline_s=0.2)
    assert caught.value.code == "guest.silent"
    host.vmm.kill(spec.ref, process)
    host.running(own)


@pytest.mark.parametrize("init", ["#!/bin/busybox sh\necho no way\n", "not a program"])
def test_a_guest_whose_init_ends_is_noticed_at_once(host: QemuHost, own: BootSpec, tmp_path: Path, init: str) -> None:
    spec = replace(own, initramfs=_initramfs(tmp_path / "initramfs", init))
    host.vmm.boot(spec)
    with pytest.raises(Unreachable) as caught:
        host.guest.hello(spec.ref, spec.directory, deadline_s=BOOT_S)
    assert caught.value.code == "guest.gone"
    assert "Kernel panic" in host.vmm.console_tail(spec.directory, lines=12)


def test_a_killed_vmm_is_noticed_by_who_waits_for_it(host: QemuHost, own: BootSpec) -> None:
    process = host.vmm.boot(own)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(host.guest.hello, own.ref, own.directory, deadline_s=BOOT_S)
        until(lambda: _is_locked(own.directory / f"{guest.CONTROL}.lock"), ANSWER_S, "hello waits")
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(Unreachable):
            waiting.result()
    assert host.vmm.wait_gone(process, deadline_s=ANSWER_S)
    assert not Path(f"/proc/{process.pid}").exists()  # reaped, not a zombie


def test_clients_killed_while_the_guest_boots_disturb_nobody(host: QemuHost, own: BootSpec) -> None:
    host.vmm.boot(own)
    for words in (b"", b"\nx hello", b"\nx hello .\n", b"\nx hello .\n\ny shutdown\n\nz shutdow"):
        with _client(own, guest.CONTROL) as client:
            client.sendall(words)
    assert host.guest.hello(own.ref, own.directory, deadline_s=BOOT_S).version == guest.PROTOCOL_VERSION


def test_clients_of_the_clock_that_were_killed_do_no_harm(host: QemuHost, own: BootSpec) -> None:
    process = host.running(own)
    long_ago = guest.MOMENT.pack(bytes(guest.ENTROPY_BYTES), 10**9, 0, b"longgone")
    for paused in (False, True):
        if paused:
            host.vmm.pause(own.ref, process)
        for left in (long_ago[:7], long_ago, long_ago * 2 + long_ago[:-1]):
            with _client(own, guest.CLOCK) as client:
                client.sendall(left)
        if paused:
            host.vmm.resume(own.ref, process)
        now = datetime.now(UTC)
        host.guest.wake(own.ref, own.directory, now=now, entropy=os.urandom(64), secrets=False, deadline_s=ANSWER_S)
        told = float(execute(host, own, "date +%s").stdout)
        assert 0 <= told + 1 - now.timestamp() < ANSWER_S, f"paused: {paused}"


def test_who_tells_the_guest_the_time_finds_its_program_again(host: QemuHost, shared: BootSpec) -> None:
    execute(host, shared, "kill -9 $(pidof moment)")
    host.guest.wake(
        shared.ref, shared.directory, now=datetime.now(UTC), entropy=os.urandom(64), secrets=False, deadline_s=ANSWER_S
    )


# --- the VMM's process
_STARTER = """
import os, pickle, signal, sys
from mvm.drivers.qemu.driver import QemuDriver
from mvm.drivers.shell import LocalShell
layout, spec = pickle.load(sys.stdin.buffer)
print(QemuDriver(layout, LocalShell()).boot(spec).pid, flush=True)
os.killpg(0, signal.SIGKILL)
"""


def test_a_vmm_outlives_its_starter_and_is_found_again(host: QemuHost, own: BootSpec) -> None:
    starter = subprocess.run(
        [sys.executable, "-c", _STARTER], input=pickle.dumps((host.layout, own)), capture_output=True,
        start_new_session=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, check=False,
    )  # fmt: skip
    assert starter.returncode == -signal.SIGKILL, starter.stderr
    (process,) = host.vmm.processes()[own.ref]
    assert process.pid == int(starter.stdout)
    assert host.vmm.boot(own) == process
    assert host.running(own) == own.ref
    host.vmm.kill(own.ref, process)
    assert host.vmm.observe(own.ref, process) is Presence.ABSENT


def test_a_vmm_that_cannot_start_says_so_in_its_own_words(host: QemuHost, own: BootSpec, tmp_path: Path) -> None:
    for wrong, words in (
        (replace(own, kernel=tmp_path / "none"), "could not open kernel|load kernel|none"),
        (replace(own, overlay=tmp_path / "none.qcow2"), "No such file"),
        (replace(own, nic=replace(own.nic, mac="nonsense")), "mac"),
    ):
        with pytest.raises(Failed, match=words) as caught:
            host.vmm.boot(wrong)
        assert caught.value.code == "vmm.start_failed"
        assert own.ref not in host.vmm.processes()


def test_a_missing_tap_is_told_and_not_made(host: QemuHost, own: BootSpec) -> None:
    with pytest.raises(Failed) as caught:
        host.vmm.boot(replace(own, nic=replace(own.nic, tap="tn1i77")))
    assert caught.value.code == "vmm.no_tap"
    assert "tn1i77" not in Path("/proc/self/net/dev").read_text()


def test_a_tap_in_use_is_told(host: QemuHost, shared: BootSpec, own: BootSpec) -> None:
    with pytest.raises(MvmError) as caught:
        host.vmm.boot(replace(own, nic=shared.nic))
    assert caught.value.code == "vmm.no_tap"


def test_boots_at_once_from_many_threads(host: QemuHost) -> None:
    specs = [host.spec(number) for number in (11, 12, 13)]
    with ThreadPoolExecutor(3) as pool:
        refs = list(pool.map(host.running, specs))
    assert set(refs) <= set(host.vmm.processes())
    for ref in refs:
        host.vmm.kill(ref, None)
    assert not set(refs) & set(host.vmm.processes())


# ---
def _client(spec: BootSpec, port: str) -> socket.socket:
    """A client of a guest's port that keeps to no rule."""
    client = socket.socket(socket.AF_UNIX)
    fd = os.open(spec.directory, os.O_RDONLY)
    try:
        client.connect(f"/proc/self/fd/{fd}/{port}.sock")
    finally:
        os.close(fd)
    client.settimeout(ANSWER_S)
    return client


def _is_locked(path: Path) -> bool:
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _ssh(host: QemuHost, spec: BootSpec, command: str) -> subprocess.CompletedProcess[str]:
    """Run `command` over ssh, trusting nothing but the host key that the guest was given."""
    host.shell.run(["ip", "address", "replace", "10.240.1.1/24", "dev", spec.nic.tap])
    user, address = SshKey.make(), GUEST_IP
    host.guest.configure(spec.ref, spec.directory, identity(authorized_key=user.public), deadline_s=BOOT_S)
    with tempfile.TemporaryDirectory() as directory:
        key, known = Path(directory, "key"), Path(directory, "known_hosts")
        key.touch(0o600)
        key.write_bytes(user.private)
        known.write_text(f"{address} {HOST_KEY.public}\n")
        options = [f"UserKnownHostsFile={known}", "StrictHostKeyChecking=yes", "BatchMode=yes", "LogLevel=ERROR"]
        return subprocess.run(
            ["ssh", "-F", "none", "-i", str(key), *(word for option in options for word in ("-o", option)),
             f"root@{address}", command],
            capture_output=True, text=True, check=False,
        )  # fmt: skip


# --- what the VMM says of its guest
@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with little room."""
    mount = tmp_path / "small"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m,mode=755", "small", str(mount)], check=True)
    try:
        yield mount
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


def test_a_guest_without_room_stands_still_and_goes_on_when_there_is_room(host: QemuHost, small_disk: Path) -> None:
    data = small_disk / "data.img"
    with data.open("wb") as file:
        file.truncate(64 * MIB)
    spec = host.spec(4, data_disk=data)
    process = host.vmm.boot(spec)
    try:
        host.guest.hello(spec.ref, spec.directory, deadline_s=BOOT_S)
        write = 'for d in /sys/block/vd*; do [ "$(cat $d/serial)" = data ] && o=/dev/${d##*/}; done; '
        write += "dd if=/dev/urandom of=$o bs=1M count=24 conv=fsync 2>/dev/null && echo written"
        with ThreadPoolExecutor(1) as threads:
            written = threads.submit(host.guest.execute, spec.ref, spec.directory, write, deadline_s=BOOT_S + ANSWER_S)
            until(lambda: host.vmm.state(spec.ref, process) is VmmState.IO_ERROR, BOOT_S, "it stands still")
            with pytest.raises(GuestSilent):
                host.guest.ping(spec.ref, spec.directory, deadline_s=1)
            host.vmm.resume(spec.ref, process)  # while there is no room, it stands still again at once
            until(lambda: host.vmm.state(spec.ref, process) is VmmState.IO_ERROR, ANSWER_S, "it stands still")
            subprocess.run(["mount", "-o", "remount,size=96m", str(small_disk)], check=True)
            host.vmm.resume(spec.ref, process)
            assert written.result().stdout == b"written\n"
        assert host.vmm.state(spec.ref, process) is VmmState.RUNNING
        assert host.guest.ping(spec.ref, spec.directory, deadline_s=ANSWER_S) > 0
    finally:
        host.vmm.kill(spec.ref, process)


@pytest.mark.parametrize("how", ["yes ''", "cat /dev/urandom", "sleep 1000"])
def test_an_agent_that_a_guest_has_replaced_is_heard_for_a_bounded_time_only(host: QemuHost, how: str) -> None:
    """Its control port is held by another program, which writes without end; who asks is not kept busy by that."""
    spec = host.spec(5)
    process = host.vmm.boot(spec)
    try:
        host.guest.hello(spec.ref, spec.directory, deadline_s=BOOT_S)
        with suppress(MvmError):  # its own shell may be among them
            host.guest.execute(spec.ref, spec.directory, agent_replaced_by(how), deadline_s=ANSWER_S)
        until(lambda: _is_liar(host, spec), ANSWER_S, "its agent is replaced")
        for ask in (host.guest.ping, host.guest.status, host.guest.prepare_sleep, host.guest.shutdown):
            began, cpu = time.monotonic(), time.thread_time()
            with pytest.raises(GuestSilent if "sleep" in how else GuestRefused):
                ask(spec.ref, spec.directory, deadline_s=1 if "sleep" in how else 3)
            assert time.monotonic() - began < 3 + ANSWER_S
            assert time.thread_time() - cpu < 0.5
        host.vmm.kill(spec.ref, process)
        assert host.vmm.observe(spec.ref, process) is Presence.ABSENT
    finally:
        host.vmm.kill(spec.ref, process)


def _is_liar(host: QemuHost, spec: BootSpec) -> bool:
    try:
        host.guest.ping(spec.ref, spec.directory, deadline_s=1)
    except GuestFault:
        return True
    return False
