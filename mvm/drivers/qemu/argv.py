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
from mvm.errors import InvalidInput
from mvm.ports.vmm import BootSpec

BINARY = "qemu-system-x86_64"
CONSOLE_LOG = "console.log"
AccelName = Literal["kvm", "tcg"]

# ACPI stays on: without it Debian's kernel finds no device of the machine.
MACHINE = "microvm,acpi=on,rtc=on,pit=off,pic=off,pcie=off,usb=off,graphics=off,x-option-roms=off"
_ACCEL: Mapping[AccelName, Sequence[str]] = {
    "kvm": ("-accel", "kvm", "-cpu", "host"),
    "tcg": ("-accel", "tcg,thread=multi,tb-size=64", "-cpu", "max"),
}


@dataclass(frozen=True, slots=True)
class Descriptors:
    """What QEMU inherits open: the TAP, our end of its monitor, and a listening socket per guest port."""

    tap: int
    monitor: int
    ports: Mapping[str, int]


def marker(state_dir: Path) -> str:
    """Tells the VMMs of one state directory from those of others on the same host."""
    return "mvm-" + sha256(str(state_dir).encode()).hexdigest()[:12]


def started_for(words: Sequence[str], mark: str) -> InstanceRef | None:
    """The instance that a command line from `command` with `mark` was made for."""
    if not words or Path(words[0]).name != BINARY or "-name" not in words[:-1]:
        return None
    kind, _, ref = words[words.index("-name") + 1].removeprefix("guest=").partition(":")
    if kind != mark:
        return None
    try:
        return InstanceRef.parse(ref)
    except InvalidInput:
        return None


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
    words = [
        *base(accel), "-name", f"guest={mark}:{spec.ref}", "-smp", str(spec.vcpus), "-m", f"{spec.mem_mib}M",
        "-kernel", str(spec.kernel), "-initrd", str(spec.initramfs), "-append", kernel_line(tsc_khz),
        "-chardev", f"file,id=console,path={_value(spec.directory / CONSOLE_LOG)},append=on",
        "-serial", "chardev:console",
        "-chardev", f"socket,id=monitor,fd={fds.monitor}", "-mon", "chardev=monitor,mode=control",
        "-object", "rng-builtin,id=rng", "-device", "virtio-rng-device,rng=rng",
        *_root_disk(spec), *_data_disk(spec.data_disk),
        "-netdev", f"tap,id=net,fd={fds.tap},vhost=off", "-device", f"virtio-net-device,netdev=net,mac={spec.nic.mac}",
        "-device", f"virtio-serial-device,max_ports={len(guest.PORTS) + 1}",
    ]  # fmt: skip
    for number, name in enumerate(guest.PORTS, start=1):
        words += [
            "-chardev", f"socket,id=port{number},fd={fds.ports[name]},server=on,wait=off",
            "-device", f"virtserialport,chardev=port{number},name={name},nr={number}",
        ]  # fmt: skip
    return words


def _root_disk(spec: BootSpec) -> list[str]:
    image = {"driver": "raw", "node-name": "image", "read-only": True, "file": _file(spec.rootfs)}
    # The overlay lasts for one run, so nobody waits for it to reach the disk.
    overlay = {
        "driver": "qcow2", "node-name": "root", "discard": "unmap", "cache": {"no-flush": True},
        "file": _file(spec.overlay), "backing": "image",
    }  # fmt: skip
    return ["-blockdev", json.dumps(image), "-blockdev", json.dumps(overlay),
            "-device", "virtio-blk-device,drive=root,serial=root"]  # fmt: skip


def _data_disk(path: Path | None) -> list[str]:
    if path is None:
        return []
    disk = {"driver": "raw", "node-name": "data", "discard": "unmap", "file": _file(path)}
    return ["-blockdev", json.dumps(disk), "-device", "virtio-blk-device,drive=data,serial=data"]


def _file(path: Path) -> dict[str, Any]:
    return {"driver": "file", "filename": str(path)}


def _value(path: Path) -> str:
    """`path` within an option whose parts are separated by commas."""
    return re.sub(",", ",,", str(path))
