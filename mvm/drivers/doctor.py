"""Whether this machine has what a node needs."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from mvm.domain.firewall import Plan
from mvm.drivers import state_dir
from mvm.drivers.shell import LocalShell
from mvm.errors import MvmError
from mvm.ports.shell import Shell
from mvm.settings import Settings

_QEMU = "qemu-system-x86_64"
_PROGRAMS = {
    "redis-server": "redis-server",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "mkfs.ext4": "e2fsprogs",
    "nft": "nftables",
    "lz4": "lz4",
    "ssh": "openssh-client",
}
_LITTLE_GIB = 5
_TAKEN = {"memory": "memory", "cpu": "CPU time", "pids": "process ids"}


@dataclass(frozen=True, slots=True)
class Check:
    """One finding; `hint` says what to do about it. ``fail`` keeps mvm from working, ``warn`` does not."""

    name: str
    result: Literal["ok", "warn", "fail"]
    detail: str
    hint: str = ""

    def to_dict(self) -> dict[str, str]:
        """JSON form."""
        return asdict(self)


def examine(settings: Settings, shell: Shell | None = None) -> list[Check]:
    """Look at everything; changes nothing and raises nothing that a finding can say."""
    shell = shell or LocalShell()
    return [
        _root(),
        _tun(),
        _qemu(shell),
        _accelerator(settings, shell),
        *(_program(name, package) for name, package in _PROGRAMS.items()),
        _packet_filter(shell),
        _apt_lists(),
        _disk(settings),
        *_isolation(settings, shell),
        _state(settings),
    ]


def _root() -> Check:
    if os.geteuid() == 0:
        return Check("root", "ok", "running as root")
    return Check("root", "fail", f"running as uid {os.geteuid()}", "as root: mvm up")


def _tun(path: Path = Path("/dev/net/tun")) -> Check:
    if path.is_char_device():
        return Check("tun", "ok", str(path))
    return Check("tun", "fail", f"{path} is missing", "modprobe tun")


def _qemu(shell: Shell) -> Check:
    try:
        version = shell.run([_QEMU, "--version"], timeout_s=10).stdout.splitlines()
    except MvmError as error:
        return Check("qemu", "fail", error.message, "apt-get install qemu-system-x86")
    return Check("qemu", "ok", version[0] if version else _QEMU)


def _accelerator(settings: Settings, shell: Shell) -> Check:
    from mvm.drivers.qemu.driver import QemuDriver

    found = QemuDriver(settings.layout, shell).accelerator()
    if found.name == "kvm":
        return Check("accelerator", "ok", f"kvm: {found.reason}")
    return Check("accelerator", "warn", f"{found.name}: {found.reason}", "guests run, but slower than with KVM")


def _program(name: str, package: str) -> Check:
    where = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    return Check(name, "ok", where) if where else Check(name, "fail", "is missing", f"apt-get install {package}")


def _packet_filter(shell: Shell) -> Check:
    """Whether the kernel takes rules such as ours, tried where nobody is."""
    rules = "\n".join(Plan("uplink").commands())
    try:
        shell.run(["unshare", "--net", "nft", "-f", "-"], stdin=rules, timeout_s=10)
    except MvmError as error:
        return Check("packet filter", "fail", error.message, "modprobe nf_tables; are you root, and is nftables there?")
    return Check("packet filter", "ok", "nftables takes our rules")


def _apt_lists(directory: Path = Path("/var/lib/apt/lists")) -> Check:
    if any(directory.glob("*_Packages*")):
        return Check("apt lists", "ok", str(directory))
    return Check("apt lists", "warn", "there are none: images cannot be built", "apt-get update")


def _disk(settings: Settings) -> Check:
    at = next(p for p in (settings.state_dir, *settings.state_dir.parents) if p.exists())
    free = shutil.disk_usage(at).free / (1 << 30)
    detail = f"{free:.1f} GiB free at {at}"
    if free < 1:
        return Check("disk", "fail", detail, "free some space, or set MVM_STATE_DIR")
    if free < _LITTLE_GIB:
        return Check("disk", "warn", detail, f"{_LITTLE_GIB} GiB leave room for a few images and instances")
    return Check("disk", "ok", detail)


def _isolation(settings: Settings, shell: Shell) -> list[Check]:
    from mvm.drivers.cgroups import CONTROLLERS, LinuxCgroups
    from mvm.drivers.identity import mark
    from mvm.drivers.isolation import trial

    if os.geteuid() != 0:
        return [Check("cage", "warn", "not tried: that needs root", "as root: mvm doctor")]
    why = trial(shell)
    hint = "guests cannot be started without it; is this a container?"
    found = [
        Check("cage", "fail", why, hint) if why else
        Check("cage", "ok", "QEMU ran as a user of its own, in namespaces and a root of its own, with filtered calls")
    ]  # fmt: skip
    cgroups = LinuxCgroups(mark(settings.layout))
    kinds, missing = cgroups.kinds(), cgroups.missing()
    cgroups.close()
    for name in CONTROLLERS:
        if name in kinds:
            found.append(Check(f"{name} limit", "ok", f"cgroups {kinds[name]}"))
        else:
            result: Literal["fail", "warn"] = "fail" if settings.require_isolation else "warn"
            hint = f"a guest can take all of the host's {_TAKEN[name]}; mount the {name} cgroup controller"
            found.append(Check(f"{name} limit", result, f"NO LIMIT: {missing[name]}", hint))
    return found


def _state(settings: Settings) -> Check:
    try:
        version = state_dir.check_version(settings.layout)
    except MvmError as error:
        return Check("state directory", "fail", error.message, error.hint)
    return Check(
        "state directory", "ok", f"{settings.state_dir}: {f'version {version}' if version else 'not there yet'}"
    )
