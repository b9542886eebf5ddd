"""QEMU's command line for one microVM: a pure function."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from mvm import guest
from mvm.domain.ids import InstanceRef
from mvm.drivers.qemu import diary
from mvm.errors import InvalidInput
from mvm.ports.vmm import BootSpec, Nic, TemplateSpec

BINARY = "qemu-system-x86_64"
CONSOLE_LOG = "console.log"
TEMPLATE_MAC = "02:6d:00:00:00:00"  # no guest's: their offsets begin at 3
AccelName = Literal["kvm", "tcg"]

# ACPI stays on: without it Debian's kernel finds no device of the machine.
MACHINE = "microvm,acpi=on,rtc=on,pit=off,pic=off,pcie=off,usb=off,graphics=off,x-option-roms=off"
_ANNOUNCED = {"announce-rounds": 1, "announce-initial": 100_000}  # milliseconds: the most that QEMU takes
_ACCEL: Mapping[AccelName, Sequence[str]] = {
    "kvm": ("-accel", "kvm", "-cpu", "host"),
    "tcg": ("-accel", "tcg,thread=multi,tb-size=64", "-cpu", "max"),
}


@dataclass(frozen=True, slots=True)
class Descriptors:
    """What QEMU inherits open: the TAP, listening sockets for its monitor and per guest port, its disk of secrets.

    `console` is where the console's log is when that is not in the instance's directory.
    """

    tap: int
    monitor: int
    ports: Mapping[str, int]
    secrets: int
    console: Path | None = None


def started_for(words: Sequence[str], mark: str) -> InstanceRef | None:
    """The instance that a command line from `command` with `mark` was made for."""
    kind, _, ref = _named(words)
    if not kind or kind != mark:
        return None
    try:
        return InstanceRef.parse(ref)
    except InvalidInput:
        return None


def mark_in(words: Sequence[str]) -> str | None:
    """The mark that a command line from `command` bears; None when it is none."""
    return _named(words)[0] or None


def _named(words: Sequence[str]) -> tuple[str, str, str]:
    if not words or Path(words[0]).name != BINARY or "-name" not in words[:-1]:
        return "", "", ""
    return words[words.index("-name") + 1].removeprefix("guest=").partition(":")


def kernel_line(tsc_khz: int, *extra: str) -> str:
    """The kernel's command line. It says nothing of the instance.

    A panic ends the VM. The host's TSC rate is told, since guests under TCG may hang measuring it themselves.
    """
    return " ".join(
        ("console=ttyS0", "quiet", "loglevel=3", "panic=-1", "reboot=t", f"tsc_early_khz={tsc_khz}", "tsc=reliable",
         "cryptomgr.notests", "rcupdate.rcu_expedited=1", *extra)
    )  # fmt: skip


def base(accel: AccelName) -> list[str]:
    """What every microVM's command line begins with."""
    return [
        BINARY, "-M", MACHINE, *_ACCEL[accel],
        "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
    ]  # fmt: skip


def command(spec: BootSpec, fds: Descriptors, accel: AccelName, tsc_khz: int, mark: str) -> list[str]:
    """The command line that boots `spec`."""
    data = _data_file(spec.data_disk) if spec.data_disk else None
    hardware = _hardware(spec, fds, accel, [spec.rootfs, spec.overlay], data, spec.nic.mac)
    return [*hardware, *_software(spec, tsc_khz), *diary.WORDS, *_name(mark, spec.ref)]


def template(spec: TemplateSpec, fds: Descriptors, accel: AccelName, tsc_khz: int, mark: str) -> list[str]:
    """The command line that boots a template; its disks of data and secrets are holes of the right size."""
    hole = {"driver": "null-co", "node-name": "data", "size": spec.data_disk_mib << 20, "read-zeroes": True}
    data = hole if spec.data_disk_mib else None
    hardware = _hardware(spec, fds, accel, [spec.rootfs, spec.overlay], data, TEMPLATE_MAC)
    return [*hardware, *_software(spec, tsc_khz), *diary.WORDS, *_name(mark, spec.ref)]


def restored(
    spec: BootSpec, template_disk: Path | None, fds: Descriptors, memory: int | None, accel: AccelName, mark: str
) -> list[str]:
    """The command line of a VMM that waits for what was saved; `memory` is a template's.

    Devices that were saved without a configuration section are not expected to have one. A guest is to announce itself
    as late as QEMU allows, since a clone does not yet have its own MAC: without any round (``announce-rounds=0``) QEMU
    frees the network card's timer, and crashes as soon as its guest resets the card, which a reboot does.
    """
    layers = [spec.rootfs, *([template_disk] if template_disk else []), spec.overlay]
    data = _data_file(spec.data_disk) if spec.data_disk else None
    words = _hardware(spec, fds, accel, layers, data, spec.nic.mac)
    if memory is not None:
        at = words.index(MACHINE)
        words[at] += ",memory-backend=ram"
        words += [
            "-object",
            f"memory-backend-file,id=ram,size={spec.mem_mib}M,mem-path=/proc/self/fd/{memory},share=off",
        ]
    settings = {"send-configuration": "off", **_ANNOUNCED}
    words += [word for name, value in settings.items() for word in ("-global", f"migration.{name}={value}")]
    return [*words, "-S", "-incoming", "defer", *diary.WORDS, *_name(mark, spec.ref)]


def machine(spec: BootSpec | TemplateSpec, accel: AccelName, *, data_bytes: int, host_cpu: str) -> str:
    """Stands for the virtual hardware that a saved guest must find again; paths, descriptors and MAC do not matter."""
    same = BootSpec(
        ref=spec.ref, directory=Path(), kernel=Path(), initramfs=Path(), rootfs=Path(), overlay=Path(),
        data_disk=Path() if data_bytes else None, vcpus=spec.vcpus, mem_mib=spec.mem_mib, nic=Nic("", TEMPLATE_MAC),
        uid=0, seccomp=spec.seccomp,
    )  # fmt: skip
    fds = Descriptors(0, 0, dict.fromkeys(guest.PORTS, 0), 0)
    data = _data_file(Path()) if data_bytes else None
    words = _hardware(same, fds, accel, [Path()], data, TEMPLATE_MAC)
    return sha256(json.dumps([words, spec.rootfs.stat().st_size, data_bytes, host_cpu]).encode()).hexdigest()


def _hardware(
    spec: BootSpec | TemplateSpec, fds: Descriptors, accel: AccelName, layers: Sequence[Path],
    data: dict[str, Any] | None, mac: str,
) -> list[str]:  # fmt: skip
    words = [
        *base(accel), "-smp", str(spec.vcpus), "-m", f"{spec.mem_mib}M",
        "-chardev", f"file,id=console,path={_value(fds.console or spec.directory / CONSOLE_LOG)},append=on",
        "-serial", "chardev:console",
        "-chardev", f"socket,id=monitor,fd={fds.monitor},server=on,wait=off", "-mon", "chardev=monitor,mode=control",
        "-object", "rng-builtin,id=rng", "-device", "virtio-rng-device,rng=rng",
        *_root_disk(layers), *_data_disk(data), *_secrets_disk(fds.secrets),
        "-netdev", f"tap,id=net,fd={fds.tap},vhost=off", "-device", f"virtio-net-device,netdev=net,mac={mac}",
        "-device", f"virtio-serial-device,max_ports={len(guest.PORTS) + 1}",
    ]  # fmt: skip
    for number, name in enumerate(guest.PORTS, start=1):
        words += [
            "-chardev", f"socket,id=port{number},fd={fds.ports[name]},server=on,wait=off",
            "-device", f"virtserialport,chardev=port{number},name={name},nr={number}",
        ]  # fmt: skip
    return words


def _software(spec: BootSpec | TemplateSpec, tsc_khz: int) -> list[str]:
    return ["-kernel", str(spec.kernel), "-initrd", str(spec.initramfs), "-append", kernel_line(tsc_khz)]


def _name(mark: str, ref: InstanceRef) -> list[str]:
    return ["-name", f"guest={mark}:{ref}"]


def _root_disk(layers: Sequence[Path]) -> list[str]:
    """The image, perhaps a template's layer over it, and the instance's own on top: the one that is written to."""
    words: list[str] = []
    below = None
    for number, path in enumerate(layers):
        node: dict[str, Any] = {"driver": "qcow2" if number else "raw", "node-name": f"layer{number}"}
        if number == len(layers) - 1:
            # It lasts for one run, or until it is synced with a snapshot: nobody waits for it to reach the disk.
            node |= {"node-name": "root", "discard": "unmap", "cache": {"no-flush": True}}
            node |= {"file": _file(path)}
        else:
            # Others run from it, too: one lock, held by a VMM that has been taken over, would keep them from starting.
            node |= {"read-only": True, "file": _file(path) | {"locking": "off"}}
        node |= {"backing": below} if below else {}
        words += ["-blockdev", json.dumps(node)]
        below = str(node["node-name"])
    return [*words, "-device", "virtio-blk-device,drive=root,serial=root"]


def _data_disk(node: dict[str, Any] | None) -> list[str]:
    if node is None:
        return []
    return ["-blockdev", json.dumps(node), "-device", "virtio-blk-device,drive=data,serial=data"]


def _data_file(path: Path) -> dict[str, Any]:
    return {"driver": "raw", "node-name": "data", "discard": "unmap", "file": _file(path)}


def _secrets_disk(fd: int) -> list[str]:
    """It is written to by a guest that wipes what it has read of it."""
    node = {"driver": "raw", "node-name": "secrets", "file": _file(Path(f"/proc/self/fd/{fd}"))}
    return ["-blockdev", json.dumps(node), "-device", "virtio-blk-device,drive=secrets,serial=secrets"]


def _file(path: Path) -> dict[str, Any]:
    return {"driver": "file", "filename": str(path)}


def _value(path: Path) -> str:
    """`path` within an option whose parts are separated by commas."""
    return re.sub(",", ",,", str(path))
