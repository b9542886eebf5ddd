"""What somebody tries who has taken over a VMM: as its user, inside its cage, with what it has open.

A program in QEMU's place makes the system calls. QEMU's own filter, which it puts on top, is left out: the cage holds
without it. The table of what was tried and what came of it is in ``build/escapes.txt``.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from struct import pack

import pytest

from mvm.domain.pool import SeccompPolicy
from mvm.drivers import processes
from mvm.drivers.files import closing_fd
from mvm.drivers.qemu import cage
from mvm.drivers.shell import LocalShell
from mvm.drivers.syscalls import Argument, Call, Record, in_memory, text
from tests.support import probe

pytestmark = pytest.mark.root

TABLE = Path(__file__).parents[2] / "build" / "escapes.txt"
UID, OTHER_UID = 0x6001_0003, 0x6002_0003
REFUSALS = {errno.EPERM, errno.EACCES, errno.ENOENT, errno.ESRCH, errno.EROFS, errno.EBADF}
PAGE = 4096


@dataclass(frozen=True)
class Try:
    """One escape. `works_outside` is for root without a cage: so the call itself is right."""

    what: str
    function: int
    arguments: tuple[Argument, ...]
    works_outside: bool = False


@dataclass(frozen=True)
class World:
    """What there is to reach. The victim has the VMM's own uid, so that no difference of users protects it."""

    root: Path
    elsewhere: Path
    victim: int
    rootfs: int
    template: int
    overlay: int


@pytest.fixture
def world(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for directory in (elsewhere, tmp_path, *tmp_path.parents[:2]):
        directory.chmod(0o755)  # nothing but the cage is in the way
    for name in ("secret", "node.db", "rootfs", "overlay"):
        (tmp_path / name).write_bytes(b"\0" * PAGE)
        (tmp_path / name).chmod(0o666 if name != "rootfs" else 0o444)
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(tmp_path / "redis.sock"))
        (tmp_path / "redis.sock").chmod(0o777)
        listener.listen()
        victim = stack.enter_context(subprocess.Popen(["sleep", "600"], user=UID, group=UID, extra_groups=[]))
        stack.callback(victim.kill)
        template = stack.enter_context(closing_fd(os.memfd_create("template", os.MFD_ALLOW_SEALING)))
        os.write(template, b"\0" * PAGE)
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        fcntl.fcntl(template, fcntl.F_ADD_SEALS, seals)
        rootfs = stack.enter_context(closing_fd(os.open(tmp_path / "rootfs", os.O_RDONLY)))
        overlay = stack.enter_context(closing_fd(os.open(tmp_path / "overlay", os.O_RDWR)))
        yield World(tmp_path, elsewhere, victim.pid, rootfs, template, overlay)


def escapes(world: World) -> list[Try]:
    root, victim = world.root, world.victim

    def path(name: str) -> bytes:
        return text(str(root / name))

    def own(fd: int) -> bytes:
        return text(f"/proc/self/fd/{fd}")

    address = pack("<H", socket.AF_UNIX) + path("redis.sock")
    word = Record((), (bytes(8),)), 1
    return [
        # other tenants' files, the store, the host's
        Try("read another tenant's file", 2, (path("secret"), os.O_RDONLY), True),
        Try("write another tenant's file", 2, (path("secret"), os.O_WRONLY), True),
        Try("read the store", 2, (path("node.db"), os.O_RDONLY), True),
        Try("list the state directory", 2, (text(str(root)), os.O_RDONLY | os.O_DIRECTORY), True),
        Try("leave its root by ..", 2, (text("../../../.." + str(root / "secret")), os.O_RDONLY), True),
        Try("reach a file through the first process's root", 2, (text(f"/proc/1/root{root}/secret"), os.O_RDONLY)),
        Try("reach a file through another's root", 2, (text(f"/proc/{victim}/root{root}/secret"), os.O_RDONLY), True),
        Try("read /etc/shadow", 2, (text("/etc/shadow"), os.O_RDONLY), True),
        Try("create a file in its root", 2, (text("/x"), os.O_WRONLY | os.O_CREAT, 0o600)),
        Try("write QEMU's program", 2, (text(str(cage.qemu())), os.O_WRONLY)),
        Try("open a file by its handle", 304, (-100, pack("<IiQQ", 8, 1, 2, 0), os.O_RDONLY)),
        # what it has open
        Try("write the image it may read", 18, (world.rootfs, b"evil", 4, 0)),
        Try("open the image anew for writing", 2, (own(world.rootfs), os.O_WRONLY), True),
        Try("change the image's mode", 91, (world.rootfs, 0o666), True),
        Try("own the image", 93, (world.rootfs, UID, UID), True),
        Try("truncate the image", 76, (own(world.rootfs), 0)),
        Try("give the image a name", 265, (-100, own(world.rootfs), -100, text("/x"), 0x400)),
        Try("write the template's memory", 18, (world.template, b"evil", 4, 0)),
        Try("map the template's memory for writing", 9, (0, PAGE, 3, 1, world.template, 0)),
        Try("shrink the template's memory", 77, (world.template, 0)),
        Try("unseal the template's memory", 72, (world.template, fcntl.F_ADD_SEALS, 0)),
        Try("give its disk to another user", 93, (world.overlay, OTHER_UID, OTHER_UID), True),
        # sockets
        Try("make a Unix socket", 41, (socket.AF_UNIX, socket.SOCK_STREAM, 0), True),
        Try("connect to the registry", 42, (0, address, len(address))),
        Try("make a raw socket", 41, (socket.AF_INET, socket.SOCK_RAW, 1), True),
        Try("make a packet socket", 41, (socket.AF_PACKET, socket.SOCK_RAW, 0x300), True),
        Try("make a netlink socket", 41, (socket.AF_NETLINK, socket.SOCK_RAW, 0), True),
        Try("make a vsock socket", 41, (socket.AF_VSOCK, socket.SOCK_STREAM, 0)),
        Try("open another TAP", 2, (text("/dev/net/tun"), os.O_RDWR), True),
        # other processes
        Try("see another process", 2, (text(f"/proc/{victim}/status"), os.O_RDONLY), True),
        Try("read another process's memory file", 2, (text(f"/proc/{victim}/mem"), os.O_RDWR), True),
        Try("see the host's mounts", 2, (text(f"/proc/{os.getpid()}/mounts"), os.O_RDONLY), True),
        Try("signal another process", 62, (victim, 0), True),
        Try("signal its thread", 234, (victim, victim, 0), True),
        Try("hold another process", 434, (victim, 0), True),
        Try("copy another process's memory", 310, (victim, *word, *word, 0)),
        Try("trace another process", 101, (0x4206, victim, 0, 0), True),
        Try("start a program", 59, (text("/usr/bin/env"), 0, 0)),
        Try("start QEMU again", 59, (text(str(cage.qemu())), 0, 0)),
        Try("start a child", 57, ()),
        # privileges, namespaces, mounts
        Try("become root", 105, (0,), True),
        Try("become another tenant's VMM", 117, (OTHER_UID, OTHER_UID, OTHER_UID)),
        Try("take capabilities", 126, (pack("<II", 0x20080522, 0), pack("<6I", *[0xFFFFFFFF, 0xFFFFFFFF, 0] * 2))),
        Try("make a user namespace", 272, (0x10000000,)),
        Try("make a mount namespace", 272, (0x00020000,)),
        Try("make a child with namespaces", 56, (0x10000000 | 17, 0, 0, 0, 0)),
        Try("enter a namespace", 308, (world.rootfs, 0)),
        Try("mount a file system", 165, (text("none"), text("/proc"), text("tmpfs"), 0, 0)),
        Try("make its root writable", 165, (0, text("/"), 0, 32, 0)),
        Try("uncover what is under its /proc", 166, (text("/proc"), 2)),
        Try("change its root", 161, (text("/proc"),)),
        Try("make a device", 133, (text("/proc/x"), 0o060600, 0xFE00)),
        Try("open the host's disk", 2, (text("/dev/vda"), os.O_RDONLY)),
        Try("open the host's memory", 2, (text("/dev/mem"), os.O_RDONLY)),
        # the kernel
        Try("read the kernel's settings", 2, (text("/proc/sys/kernel/core_pattern"), os.O_RDONLY), True),
        Try("find its control group", 2, (text("/sys/fs/cgroup"), os.O_RDONLY), True),
        Try("lift its limit of files", 302, (0, 7, pack("<QQ", 1 << 20, 1 << 20), 0)),
        Try("overtake the host", 141, (0, 0, -20), True),
        Try("use keys", 250, (0, -3, 0), True),
        Try("load a BPF program", 321, (0, pack("<IIII", 2, 4, 4, 1) + bytes(112), 128), True),
        Try("catch page faults", 323, (1,), True),
        Try("set up io_uring", 425, (8, bytes(120)), True),
        Try("watch events of the CPU", 298, (pack("<II", 1, 128) + bytes(120), 0, -1, -1, 0)),
        Try("read the kernel's log", 103, (10, 0, 0), True),
        Try("change the host's name", 170, (b"evil", -1)),
        Try("set the clock", 227, (0, pack("<qq", 0, -1))),
        Try("load a module", 313, (world.rootfs, text(""), 0)),
        Try("boot another kernel", 246, (0, 17, 0, 0)),
        Try("reboot", 169, (0, 0, 0, 0)),
    ]  # fmt: skip


def inside(world: World, tries: list[Try], policy: SeccompPolicy) -> list[int]:
    """What they return for a process in a VMM's cage."""
    binary = world.elsewhere / "probe"
    binary.unlink(missing_ok=True)
    binary.write_bytes(probe.program([Call(each.what, each.function, each.arguments) for each in tries]))
    binary.chmod(0o555)
    return _run(world, cage.Cage(uid=UID, policy=policy, vcpus=1, files={}), binary)


def _run(world: World, around: cage.Cage, binary: Path) -> list[int]:
    output = world.root / "output"
    output.unlink(missing_ok=True)
    made = cage.launcher(around, capabilities=cage.capabilities(), binary=binary)
    with closing_fd(in_memory(made)) as program, cage.alone():
        process = LocalShell().spawn(
            [str(binary)], log=output, pass_fds=[world.rootfs, world.template, world.overlay],
            program=f"/proc/self/fd/{program}",
        )  # fmt: skip
    assert processes.wait_gone(process, 10)
    assert b"cage:" not in output.read_bytes(), output.read_bytes()
    return probe.returned(output.read_bytes())


def outside(world: World, tries: list[Try]) -> list[int]:
    """What they return for root."""
    binary = world.root / "probe-outside"
    binary.write_bytes(probe.program([Call(each.what, each.function, each.arguments) for each in tries]))
    binary.chmod(0o500)
    done = subprocess.run(
        [binary], capture_output=True, check=True, timeout=10, pass_fds=[world.rootfs, world.template, world.overlay]
    )
    return probe.returned(done.stdout)


@pytest.mark.parametrize("policy", SeccompPolicy)
def test_no_escape_succeeds(world: World, policy: SeccompPolicy) -> None:
    tries = escapes(world)
    results = inside(world, tries, policy)
    assert len(results) == len(tries) >= 25
    told = [errno.errorcode.get(-value, str(value)) for value in results]
    lines = [f"{each.what:50} {how}" for each, how in zip(tries, told, strict=True)]
    TABLE.parent.mkdir(exist_ok=True)
    kept = TABLE.read_text().split("\n\n") if TABLE.exists() else []
    tables = [each for each in kept if each.strip() and not each.startswith(f"{policy}:")]
    tables.append("\n".join([f"{policy}: {len(tries)} escapes tried", *lines]))
    TABLE.write_text("\n\n".join(sorted(table.strip() for table in tables)) + "\n")
    got_out = [line for line, value in zip(lines, results, strict=True) if -value not in REFUSALS]
    assert got_out == []
    assert (world.root / "rootfs").read_bytes() == b"\0" * PAGE
    assert os.pread(world.template, PAGE, 0) == b"\0" * PAGE
    assert processes.identify(world.victim) is not None


def test_the_same_calls_work_without_a_cage(world: World) -> None:
    """Those that do this host no harm: what refuses them inside is the cage."""
    tries = [each for each in escapes(world) if each.works_outside]
    results = outside(world, tries)
    failed = {each.what: errno.errorcode.get(-value) for each, value in zip(tries, results, strict=True) if value < 0}
    assert failed == {}
