"""What the built-in profiles consist of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from mvm import guest
from mvm.domain.pool import Profile
from mvm.drivers.builtin import moment, mounter, runner
from mvm.drivers.builtin.tree import Tree

KERNEL = "linux-image-cloud-amd64"
KERNEL_NAME = re.compile(r"linux-image-[0-9].*-cloud-amd64")
BUSYBOX = "busybox-static"
FREE_MIB = 64
BUSYBOX_PATH = "usr/bin/busybox"

_MINIMAL = ("dropbear-bin", "libc6", "libcrypt1", "libtomcrypt1", "libtommath1", "libgmp10", "zlib1g")
_PYTHON = (
    *_MINIMAL, "python3-minimal", "python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib", "libbz2-1.0",
    "libexpat1", "libffi8", "liblzma5", "libssl3", "media-types",
)  # fmt: skip
PACKAGES: Mapping[Profile, Sequence[str]] = {
    Profile.MINIMAL: _MINIMAL,
    Profile.BASELINE: _MINIMAL,
    Profile.PYTHON: _PYTHON,
}

_DRIVERS = ("virtio_mmio", "virtio_blk", "virtio_console", "virtio_net", "virtio_rng")
_DROPPED = re.compile(
    r"usr/share/(doc|man|locale|lintian|bug|bash-completion|zsh|info|gcc|perl5|pixmaps|applications|binfmts|python3)(/|$)"
    r"|usr/lib/x86_64-linux-gnu/(gconv|audit)(/|$)"
)
_LIBC_PROGRAMS = re.compile(r"usr/s?bin/|etc/")


def canonical(profile: str) -> Profile:
    """The profile itself; ``baseline`` is ``minimal``, and so the same image."""
    found = Profile(profile)
    return Profile.MINIMAL if found is Profile.BASELINE else found


def drivers() -> Sequence[str]:
    """The kernel's drivers that a guest needs."""
    return _DRIVERS


def initramfs(busybox: bytes, modules: Mapping[str, bytes]) -> Tree:
    """What runs until the root file system is there."""
    tree = Tree()
    for name in ("dev", "proc", "sys", "sysroot"):
        tree.directory(name)
    tree.file("bin/busybox", busybox, 0o755)
    tree.file("init", guest.script("init"), 0o755)
    for name, data in modules.items():
        tree.file(f"modules/{name}.ko", data)
    tree.file("modules/order", " ".join(modules).encode() + b"\n")
    return tree


def rootfs(packages: Mapping[str, Tree], busybox: bytes, applets: Iterable[str]) -> Tree:
    """The guest's root file system."""
    tree = Tree()
    for name in ("bin", "sbin", "lib", "lib64"):
        tree.directory(f"usr/{name}")
        tree.link(name, f"usr/{name}")
    for name in ("data", "dev", "mnt", "proc", "run", "sys", "var/log", "var/tmp"):
        tree.directory(name)
    tree.directory("tmp", 0o1777)
    tree.directory("var/tmp", 0o1777)
    tree.directory("root", 0o700)
    tree.link("root/.ssh", "/run/mvm/ssh")  # in memory: keys are never written to a disk
    tree.file(BUSYBOX_PATH, busybox, 0o755)
    for applet in applets:
        tree.link(f"usr/bin/{applet}", "busybox")
    for name, package in packages.items():
        tree.merge(package, lambda path, name=name: _kept(name, path))  # type: ignore[misc]
    tree.link("usr/sbin/init", "../bin/busybox")
    for name in ("rc", "agent", "halt", "ssh"):
        tree.file(f"usr/lib/mvm/{name}", guest.script(name), 0o755)
    tree.file("usr/lib/mvm/moment", moment.program(), 0o755)
    tree.file("usr/lib/mvm/mounter", mounter.program(), 0o755)
    tree.file("usr/lib/mvm/runner", runner.program(), 0o755)
    tree.file("etc/inittab", guest.script("inittab"))
    tree.file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n")
    tree.file("etc/shadow", b"root:*:19000::::::\n", 0o600)
    tree.file("etc/group", b"root:x:0:\ntty:x:5:\n")
    tree.file("etc/shells", b"/bin/sh\n")
    tree.file("etc/hosts", b"127.0.0.1 localhost\n")
    tree.file("etc/machine-id", b"")
    return tree


def _kept(package: str, path: str) -> bool:
    if package == "libc6" and _LIBC_PROGRAMS.match(path):
        return False
    return not _DROPPED.match(path)
