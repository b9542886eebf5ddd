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

_SSH = ("dropbear-bin", "libc6", "libcrypt1", "libtomcrypt1", "libtommath1", "libgmp10", "zlib1g")
_HTTP = (
    "ca-certificates",
    "wget",  # busybox's has no PUT, checks no certificates, and with -T it segfaults
    "libffi8",
    "libgnutls30",
    "libhogweed6",
    "libidn2-0",
    "libnettle8",
    "libp11-kit0",
    "libpcre2-8-0",
    "libpsl5",
    "libtasn1-6",
    "libunistring2",
    "libuuid1",
)
_SHELL = "busybox"
_MINIMAL = (_SHELL, *_SSH, *_HTTP)
_STDLIB = (
    "python3-minimal",
    "python3.11-minimal",
    "libpython3.11-minimal",
    "libpython3.11-stdlib",
    "python3-distutils",
    "python3-lib2to3",
    "python3-gdbm",
    "media-types",
    "ncurses-base",
    "libbz2-1.0",
    "libcom-err2",
    "libdb5.3",
    "libexpat1",
    "libgdbm6",
    "libgssapi-krb5-2",
    "libk5crypto3",
    "libkeyutils1",
    "libkrb5-3",
    "libkrb5support0",
    "liblzma5",
    "libncursesw6",
    "libnsl2",
    "libreadline8",
    "libsqlite3-0",
    "libssl3",
    "libtinfo6",
    "libtirpc3",
)
_PIP = (
    "python3-pip",
    "python3-setuptools",
    "python3-pkg-resources",
    "python3-wheel",
    "python3.11-venv",
    "python3-pip-whl",
    "python3-setuptools-whl",
)
_PYTHON = (*_MINIMAL, *_STDLIB, *_PIP)
PACKAGES: Mapping[Profile, Sequence[str]] = {
    Profile.MINIMAL: _MINIMAL,
    Profile.BASELINE: _MINIMAL,
    Profile.PYTHON: _PYTHON,
}

LEFT_OUT: Mapping[str, str] = {
    "debconf": "nothing is asked in an image",
    "dpkg": "nothing is installed in an image",
    "libc-bin": "its programs are busybox's",
    "libgcc-s1": "nothing here unwinds through C++, but pthread_cancel",
    "libtirpc-common": "its one file is for programs that listen",
    "openssl": "the bundle of certificates is made here",
    "python3": "a name for the packages that are listed",
    "python3.11": "the same",
    "libpython3-stdlib": "the same",
    "readline-common": "its one setting is readline's own default",
}
"""What packages say they need and an image goes without, with the reason."""

_DRIVERS = ("virtio_mmio", "virtio_blk", "virtio_console", "virtio_net", "virtio_rng")
_DROPPED = re.compile(
    r"usr/share/(doc|man|locale|lintian|bug|bash-completion|zsh|info|gcc|perl5|pixmaps|applications|binfmts|python3)(/|$)"
    r"|usr/lib/x86_64-linux-gnu/(gconv|audit)(/|$)"
)
_CERTIFICATES = "usr/share/ca-certificates/"
_BUNDLE = "etc/ssl/certs/ca-certificates.crt"
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
    _certificates(tree, packages["ca-certificates"])
    if "usr/bin/python3" in tree:
        tree.link("usr/bin/python", "python3")
    _shells(tree, packages[_SHELL])
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


def _shells(tree: Tree, package: Tree) -> None:
    """People's shell finds programs by PATH. That of ours runs busybox's applets within itself, whatever PATH says."""
    tree.file("usr/bin/sh", package[BUSYBOX_PATH].data, 0o755)
    tree.link("usr/bin/ash", "sh")
    tree.link("usr/lib/mvm/sh", f"/{BUSYBOX_PATH}")


def _certificates(tree: Tree, package: Tree) -> None:
    """What `update-ca-certificates` makes when the package is installed: one file, where both TLS libraries look."""
    texts = [entry.data.strip() for path, entry in package.items() if path.startswith(_CERTIFICATES) and entry.data]
    tree.file(_BUNDLE, b"\n".join(texts) + b"\n")
    tree.link("usr/lib/ssl/cert.pem", f"/{_BUNDLE}")
    tree.link("usr/lib/ssl/certs", "/etc/ssl/certs")


def _kept(package: str, path: str) -> bool:
    if package in (_SHELL, "ca-certificates"):  # only parts of them are wanted
        return False
    if package == "libc6" and _LIBC_PROGRAMS.match(path):
        return False
    return not _DROPPED.match(path)
