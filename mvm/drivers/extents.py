"""Blocks that files share without being one file: copies that a file system made by reference (reflinks)."""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator

from mvm.drivers.files import closing_fd

_FIEMAP = 0xC020660B
_LAST, _UNKNOWN, _SHARED = 0x1, 0x2, 0x2000
_HEAD, _EXTENT = struct.Struct("=QQLLLL"), struct.Struct("=QQQ16xL12x")
_AT_ONCE = 256

Extent = tuple[int, int, int]  # logical, physical and length in bytes


class SharedExtents:
    """Remembers which shared extents were met, so that each is counted once.

    The kernel says of an extent whether it is shared, not with whom. File systems that cannot say so (FIEMAP) have
    none, or they are not visible.
    """

    def __init__(self) -> None:
        self._met: set[tuple[int, int]] = set()

    def again(self, path: str, stat: os.stat_result) -> int:
        """How many bytes of the file were met in another one before."""
        try:
            with closing_fd(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)) as fd:
                extents = list(shared_extents(fd))
        except OSError:  # no file, or not told: then all of it is its own
            return 0
        known = sum(length for _, at, length in extents if (stat.st_dev, at) in self._met)
        self._met.update((stat.st_dev, at) for _, at, _ in extents)
        return known


def shared_extents(fd: int) -> Iterator[Extent]:
    """Of an open file. Raises `OSError` where the file system does not tell."""
    start = 0
    while True:
        buffer = bytearray(_HEAD.pack(start, (1 << 64) - 1, 0, 0, _AT_ONCE, 0) + bytes(_AT_ONCE * _EXTENT.size))
        fcntl.ioctl(fd, _FIEMAP, buffer)
        found = _HEAD.unpack_from(buffer)[3]
        for number in range(found):
            logical, physical, length, flags = _EXTENT.unpack_from(buffer, _HEAD.size + number * _EXTENT.size)
            if flags & _SHARED and not flags & _UNKNOWN:
                yield logical, physical, length
            if flags & _LAST:
                return
            start = logical + length
        if not found:
            return
