"""Debian's kernel package: the uncompressed kernel, and drivers in the order they load in."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from mvm.drivers.builtin.tree import Tree
from mvm.errors import Failed
from mvm.ports.shell import Shell

_LZ4_LEGACY = b"\x02\x21\x4c\x18"
_ELF = b"\x7fELF"
_SETUP_SECTS, _MAGIC, _PAYLOAD = 0x1F1, 0x202, 0x248  # Linux/x86 boot protocol


def release(package: Tree) -> str:
    """The kernel's release, such as ``6.1.0-44-cloud-amd64``."""
    prefix = "boot/vmlinuz-"
    for path, _ in package.items():
        if path.startswith(prefix):
            return path.removeprefix(prefix)
    raise Failed("image.build_failed", "the kernel package holds no kernel")


def extract(bz_image: bytes, into: Path, shell: Shell) -> None:
    """Write the uncompressed kernel in `bz_image` to `into`: it boots faster, and some VMMs take no other form."""
    if bz_image[_MAGIC : _MAGIC + 4] != b"HdrS":
        raise Failed("image.build_failed", "the kernel is not a Linux bzImage")
    offset = int.from_bytes(bz_image[_PAYLOAD : _PAYLOAD + 4], "little")
    length = int.from_bytes(bz_image[_PAYLOAD + 4 : _PAYLOAD + 8], "little")
    start = (bz_image[_SETUP_SECTS] + 1) * 512 + offset
    payload, size = bz_image[start : start + length - 4], bz_image[start + length - 4 : start + length]
    if not payload.startswith(_LZ4_LEGACY):
        raise Failed("image.build_failed", "the kernel's compression is not LZ4", magic=payload[:4].hex())
    packed = into.with_name("payload.lz4")
    packed.write_bytes(payload)
    with into.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, int.from_bytes(size, "little"))  # lz4 cannot say that space ran out
    shell.run(["lz4", "-d", "-q", "-f", str(packed), str(into)])
    packed.unlink()
    with into.open("rb") as file:
        if file.read(4) != _ELF:
            raise Failed("image.build_failed", "what was unpacked is not a kernel")


def modules(package: Tree, wanted: Iterable[str]) -> dict[str, bytes]:
    """The drivers `wanted` and those they need, in the order they load in, by name."""
    files = {
        path.rpartition("/")[2].removesuffix(".ko").replace("-", "_"): entry.data
        for path, entry in package.items()
        if path.endswith(".ko")
    }
    ordered: dict[str, bytes] = {}

    def add(name: str) -> None:
        try:
            data = files[name.replace("-", "_")]
        except KeyError:
            raise Failed("image.build_failed", f"the kernel package lacks the driver {name}") from None
        depends = re.search(rb"\0depends=([^\0]*)\0", data)
        for need in depends[1].decode().split(",") if depends else ():
            if need:
                add(need)
        ordered.setdefault(name.replace("-", "_"), data)

    for name in wanted:
        add(name)
    return ordered
