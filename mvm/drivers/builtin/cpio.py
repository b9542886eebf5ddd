"""Archives in the "newc" format, which the kernel takes as an initramfs."""

from __future__ import annotations

import stat

from mvm.drivers.builtin.tree import EPOCH, Entry, Tree


def archive(tree: Tree) -> bytes:
    """`tree` as an archive; the same tree gives the same bytes."""
    out = bytearray()
    for number, (path, entry) in enumerate(tree.items(), start=1):
        _append(out, number, path, entry)
    _append(out, 0, "TRAILER!!!", Entry(0))
    out += bytes(-len(out) % 512)
    return bytes(out)


def _append(out: bytearray, number: int, path: str, entry: Entry) -> None:
    name = path.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    # inode, mode, uid, gid, links, mtime, size, device (2), special device (2), name's size, checksum
    fields = (number, entry.mode, 0, 0, links, EPOCH, len(entry.data), 0, 0, 0, 0, len(name), 0)
    out += b"070701" + b"".join(b"%08X" % field for field in fields) + name
    out += bytes(-len(out) % 4)
    out += entry.data
    out += bytes(-len(out) % 4)
