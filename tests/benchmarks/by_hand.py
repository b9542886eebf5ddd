"""The same microVMs without mvm: QEMU's command line, QMP and pages, as one would write them down.

The command lines come from mvm's own argv builder, for the same image, memory and CPUs, so that only what is around
QEMU differs. Guests are asked by the same code.
"""

from __future__ import annotations

import array
import json
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import zstandard

from mvm import guest
from mvm.domain.addressing import TenantNetwork
from mvm.domain.ids import InstanceRef, Revision
from mvm.domain.instance import ProcessIdentity
from mvm.drivers import netns, processes, secrets_disk, tap
from mvm.drivers import snapshot_files as files
from mvm.drivers.guest_channel import UnixGuestChannel
from mvm.drivers.instance_sockets import listen
from mvm.drivers.qcow2 import write_empty
from mvm.drivers.qemu import argv, memory
from mvm.drivers.qemu.driver import DEVICES, DISK, INDEX, MEMORY
from mvm.drivers.qemu.packing import Unpacker
from mvm.drivers.qemu.tsc import host_tsc_khz
from mvm.drivers.revisions import INITRAMFS, KERNEL, ROOTFS
from mvm.drivers.shell import LocalShell
from mvm.ports.guest import GuestIdentity
from mvm.ports.vmm import BootSpec, Nic
from tests.support.microvm import identity
from tests.support.stack import Stack

ANSWER_S = 60.0
_TAP = "mvmbench0"
_MARK = "by-hand"  # no state directory's, so no sweep takes it for an orphan
_PAGE = 4096
_PRESENT, _FILE = 1 << 63, 1 << 61  # of a pagemap's entry
_RAM = "bench-ram"


@dataclass(frozen=True)
class Place:
    """Where guests are started by hand: everything but QEMU itself is there."""

    spec: BootSpec
    accelerator: argv.AccelName
    identity: GuestIdentity


@contextmanager
def place(stack: Stack, ref: InstanceRef) -> Iterator[Place]:
    """For a guest like `ref`, which has run: the thread is in the stack's namespace until the end of the block."""
    tenant, pool = stack.json("tenant", "info", str(ref.tenant)), stack.json("pool", "info", str(ref.pool_ref))
    network = TenantNetwork(tenant["net_id"], IPv4Network(tenant["subnet"]))
    image = stack.layout.revision(Revision(pool["revision"])).resolve()
    accelerator = json.loads((stack.layout.run / "accelerator.json").read_text())["name"]
    shell = LocalShell()
    connection = json.loads(stack.layout.connection.read_text())
    host_tsc_khz()  # measured once in a process
    with tempfile.TemporaryDirectory(dir=stack.layout.root) as name, netns.entered(netns.path_of(connection["netns"])):
        shell.run(["ip", "tuntap", "add", _TAP, "mode", "tap"])
        try:
            shell.run(["ip", "link", "set", _TAP, "master", network.bridge, "addrgenmode", "none", "up"])
            directory, last = Path(name), network.offsets[-1]
            spec = BootSpec(
                ref=ref, directory=directory, kernel=image / KERNEL, initramfs=image / INITRAMFS,
                rootfs=image / ROOTFS, overlay=directory / "overlay.qcow2", data_disk=None,
                vcpus=pool["resources"]["vcpus"], mem_mib=pool["resources"]["mem_mib"],
                nic=Nic(_TAP, network.mac(last)), uid=0,
            )  # fmt: skip
            address = f"{network.ip(last)}/{network.subnet.prefixlen}"
            who = identity("by-hand", address, mac=network.mac(last), gateway=str(network.gateway))
            yield Place(spec, accelerator, who)
        finally:
            shell.run(["ip", "link", "del", _TAP])


class Guest:
    """One guest; `seconds` is from QEMU's spawn to the reply that was waited for."""

    def __init__(self, where: Place, command: Callable[[argv.Descriptors], list[str]], pass_fds: Sequence[int],
                 then: Callable[[Guest], None]) -> None:  # fmt: skip
        self.spec = where.spec
        self.channel = UnixGuestChannel()
        with ExitStack() as closing:
            card = tap.attach(self.spec.nic.tap)
            closing.callback(os.close, card)
            names = ("monitor", *guest.PORTS)
            sockets = {name: closing.enter_context(listen(self.spec.directory, name)) for name in names}
            disk = secrets_disk.create(None)
            closing.callback(os.close, disk)
            ports = {n: sockets[n].fileno() for n in guest.PORTS}
            fds = argv.Descriptors(card, sockets["monitor"].fileno(), ports, disk)
            words = command(fds)
            inherited = (card, *(each.fileno() for each in sockets.values()), disk, *pass_fds)
            began = time.perf_counter()
            self.process = LocalShell().spawn(words, log=self.spec.directory / "vmm.log", pass_fds=inherited)
        try:
            then(self)
        except BaseException:
            self.end()
            raise
        self.seconds = time.perf_counter() - began

    def end(self) -> None:
        """Kill it and wait."""
        processes.kill(self.process)
        processes.wait_gone(self.process, ANSWER_S)

    def hello(self) -> None:
        self.channel.hello(self.spec.ref, self.spec.directory, deadline_s=ANSWER_S)

    def configure(self, who: GuestIdentity) -> None:
        self.channel.configure(self.spec.ref, self.spec.directory, who, deadline_s=ANSWER_S)

    def tell_time(self) -> None:
        from datetime import UTC, datetime

        now = datetime.now(UTC)
        self.channel.wake(
            self.spec.ref, self.spec.directory, now=now, entropy=os.urandom(64), secrets=False, deadline_s=ANSWER_S
        )

    def rest(self) -> None:
        self.channel.prepare_sleep(self.spec.ref, self.spec.directory, deadline_s=ANSWER_S)


def boot(where: Place) -> float:
    """A cold boot: seconds to the agent's first answer."""
    _fresh_overlay(where.spec)
    booted = Guest(
        where, lambda fds: argv.command(where.spec, fds, where.accelerator, host_tsc_khz(), _MARK), (), Guest.hello
    )
    booted.end()
    return booted.seconds


class Hand:
    """Clones of a pool's template, their sleep and their waking. The template's memory is there before it begins."""

    def __init__(self, where: Place, template: Path) -> None:
        self.where = where
        self._template = template
        said = files.manifest(template)
        index, packed = (template / INDEX).read_bytes(), (template / MEMORY).read_bytes()
        self._ram = os.memfd_create(_RAM, os.MFD_CLOEXEC)
        os.truncate(self._ram, said.mem_mib << 20)
        pages = Unpacker(index, packed, said.compression, said.mem_mib * 256)
        memory.unpack(pages.runs(), lambda offset, data: _write_all(self._ram, offset, data))

    def close(self) -> None:
        os.close(self._ram)

    def clone(self) -> Guest:
        """A new guest out of the template that has acknowledged an identity."""
        _fresh_overlay(self.where.spec)
        devices = (self._template / DEVICES).read_bytes()
        return self._restored(devices, lambda _: None, lambda it: it.configure(self.where.identity))

    def sleep(self, it: Guest) -> tuple[float, Path]:
        """Save it as what differs from the template; the seconds that took, and where it is."""
        spec, began = self.where.spec, time.perf_counter()
        half, into = spec.directory / "saved.new", spec.directory / "saved"
        it.rest()
        with Monitor(spec.directory) as monitor:
            monitor.run("stop")
            half.mkdir()
            with (half / "devices").open("wb") as file:
                number = monitor.run("add-fd", fds=(file.fileno(),))["fdset-id"]
                monitor.run("xen-save-devices-state", filename=f"/dev/fdset/{number}", live=False)
                os.fsync(file.fileno())
            numbers, packed = self._delta(it.process)
            for name, data in (("numbers", numbers.tobytes()), ("pages", packed)):
                with (half / name).open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
        for each in (spec.overlay, half):
            _sync(each)
        if into.exists():
            for old in into.iterdir():
                old.unlink()
            into.rmdir()
        half.rename(into)
        _sync(spec.directory)
        it.end()
        return time.perf_counter() - began, into

    def wake(self, saved: Path) -> Guest:
        """It goes on, with the time told."""

        def load(process: ProcessIdentity) -> None:
            numbers = array.array("I", (saved / "numbers").read_bytes())
            pages = zstandard.decompress((saved / "pages").read_bytes())
            start, _ = _ram_of(process)
            fd = os.open(f"/proc/{process.pid}/mem", os.O_WRONLY)
            for at, (first, count) in _runs(numbers):
                _write_all(fd, start + first * _PAGE, pages[at * _PAGE : (at + count) * _PAGE])
            os.close(fd)

        return self._restored((saved / "devices").read_bytes(), load, Guest.tell_time)

    def _restored(self, devices: bytes, load: Callable[[ProcessIdentity], None], ask: Callable[[Guest], None]) -> Guest:
        state = os.memfd_create("devices", os.MFD_CLOEXEC)
        os.write(state, devices)
        os.lseek(state, 0, os.SEEK_SET)

        def then(it: Guest) -> None:
            with Monitor(self.where.spec.directory) as monitor:
                load(it.process)
                monitor.run("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
                monitor.run("migrate-incoming", uri=f"fd:{state}")
                while monitor.event("MIGRATION")["status"] != "completed":
                    pass
                monitor.run("cont")
            ask(it)

        spec = self.where.spec
        try:
            return Guest(
                self.where,
                lambda fds: argv.restored(spec, self._template / DISK, fds, self._ram, self.where.accelerator, _MARK),
                (state, self._ram), then,
            )  # fmt: skip
        finally:
            os.close(state)

    def _delta(self, process: ProcessIdentity) -> tuple[array.array[int], bytes]:
        start, size = _ram_of(process)
        with Path(f"/proc/{process.pid}/pagemap").open("rb", buffering=0) as pagemap:
            pagemap.seek(start // _PAGE * 8)
            entries = array.array("Q", pagemap.read(size // _PAGE * 8))
        private = array.array("I", (n for n, e in enumerate(entries) if e & _PRESENT and not e & _FILE))
        numbers, pages = array.array("I"), bytearray()
        fd = os.open(f"/proc/{process.pid}/mem", os.O_RDONLY)
        for _, (first, count) in _runs(private):
            ours = os.pread(fd, count * _PAGE, start + first * _PAGE)
            base = os.pread(self._ram, count * _PAGE, first * _PAGE)
            for at in range(count):
                page = ours[at * _PAGE : (at + 1) * _PAGE]
                if page != base[at * _PAGE : (at + 1) * _PAGE]:
                    numbers.append(first + at)
                    pages += page
        os.close(fd)
        return numbers, zstandard.compress(bytes(pages), 1)


class Monitor:
    """QMP on a bare socket."""

    def __init__(self, directory: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(ANSWER_S)
        self._socket.connect(str(directory / "monitor.sock"))
        self._lines = self._socket.makefile("r")
        self._events: list[dict[str, Any]] = []
        self._lines.readline()
        self.run("qmp_capabilities")

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._socket.close()

    def run(self, command: str, fds: Sequence[int] = (), **arguments: Any) -> Any:
        data = json.dumps({"execute": command, "arguments": arguments}).encode()
        socket.send_fds(self._socket, [data], list(fds))
        while "return" not in (message := json.loads(self._lines.readline())):
            assert "event" in message, message
            self._events.append(message)
        return message["return"]

    def event(self, name: str) -> dict[str, Any]:
        while True:
            message = self._events.pop(0) if self._events else json.loads(self._lines.readline())
            if message.get("event") == name:
                data: dict[str, Any] = message["data"]
                return data


def _ram_of(process: ProcessIdentity) -> tuple[int, int]:
    """Address and size of the guest's memory; its mapping may be in pieces."""
    ranges = [
        [int(word, 16) for word in line.split()[0].split("-")]
        for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines()
        if f"/memfd:{_RAM}" in line
    ]
    return ranges[0][0], ranges[-1][1] - ranges[0][0]


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, tuple[int, int]]]:
    """Where each run of consecutive numbers begins, its first number, and how many there are."""
    at = 0
    while at < len(numbers):
        end = at + 1
        while end < len(numbers) and numbers[end] == numbers[at] + end - at:
            end += 1
        yield at, (numbers[at], end - at)
        at = end


def _fresh_overlay(spec: BootSpec) -> None:
    spec.overlay.unlink(missing_ok=True)
    with spec.overlay.open("w+b") as file:
        write_empty(file, spec.rootfs.stat().st_size)


def _write_all(fd: int, offset: int, data: bytes) -> None:
    written = os.pwrite(fd, data, offset)
    assert written == len(data)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
