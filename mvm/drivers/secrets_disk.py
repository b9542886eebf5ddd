"""A disk of a tenant's secrets, in memory: a small ext4 file system, written here, since a program would take longer.

One block group, blocks of 4 KiB, no journal; every file is one extent. What is not used is a hole. A guest's kernel
reads ahead of what it looks for, and no value may come into its memory but as a file's page, which can be wiped: so the
directory comes last, and a block stays free behind the inodes.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress

from mvm.domain.instance import ProcessIdentity
from mvm.domain.secrets import Secrets
from mvm.drivers.files import punch

SIZE = 2 << 20
NAME = "mvm-secrets"

_BLOCK = 4096
_BLOCKS = SIZE // _BLOCK
_INODE, _INODES = 128, 288
_ROOT, _FIRST = 2, 11
_GROUP, _BLOCK_BITMAP, _INODE_BITMAP, _TABLE = 1, 2, 3, 4
_DATA = _TABLE + _INODES * _INODE // _BLOCK + 1
_DIR_MODE, _FILE_MODE = 0o040500, 0o100400
_IS_FILE, _IS_DIR = 1, 2
_FILETYPE, _EXTENTS = 0x2, 0x40
_EXTENTS_FLAG = 0x80000
_UUID = bytes.fromhex("6d766d00000040008000000000000003")


def create(secrets: Secrets | None) -> int:
    """A descriptor of a new disk with `secrets`; it lives as long as somebody has it open."""
    fd = os.memfd_create(NAME, os.MFD_CLOEXEC)
    try:
        os.truncate(fd, SIZE)
        _fill(fd, secrets)
    except BaseException:
        os.close(fd)
        raise
    return fd


def replace(process: ProcessIdentity, secrets: Secrets | None) -> None:
    """Other secrets on the disk that `process` has. Raises `FileNotFoundError` when it has none, or has ended."""
    fd = os.open(_find(process.pid), os.O_RDWR | os.O_CLOEXEC)
    try:
        _must_be_ours(fd)
        punch(fd, SIZE)
        _fill(fd, secrets)
    finally:
        os.close(fd)


def _find(pid: int) -> str:
    for number in os.listdir(f"/proc/{pid}/fd"):  # noqa: PTH208 - names are wanted, not paths
        path = f"/proc/{pid}/fd/{number}"
        with suppress(FileNotFoundError):  # closed meanwhile
            if os.readlink(path).startswith(f"/memfd:{NAME} "):  # noqa: PTH115
                return path
    raise FileNotFoundError(f"/proc/{pid}/fd")


def _must_be_ours(fd: int) -> None:
    """A VMM can put something else under a number between a look and the opening, such as the image of others."""
    name = os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115
    if not name.startswith(f"/memfd:{NAME} ") or os.fstat(fd).st_uid != os.geteuid():
        raise FileNotFoundError(NAME)


def _fill(fd: int, secrets: Secrets | None) -> None:
    if secrets and secrets.values:
        made = {name: value.encode() for name, value in secrets.values.items()}
        for block, data in _file_system(made, int(secrets.set_at.timestamp())):
            os.pwrite(fd, data, block * _BLOCK)


def _file_system(files: Mapping[str, bytes], when: int) -> Iterator[tuple[int, bytes]]:
    """Its blocks that are not empty: a number, and data from there on."""
    entries = _entries(files)
    directory = _BLOCKS - len(entries) // _BLOCK
    inodes = {_ROOT: _inode(_DIR_MODE, 2, len(entries), directory, when)}
    at = _DATA
    for number, data in enumerate(files.values(), start=_FIRST):
        inodes[number] = _inode(_FILE_MODE, 1, len(data), at, when)
        yield at, data
        at += _blocks(len(data))
    table = bytearray(_inode_offset(_FIRST + len(files)))
    for number, inode in inodes.items():
        table[_inode_offset(number) : _inode_offset(number + 1)] = inode
    used = _FIRST - 1 + len(files)
    free_blocks, free_inodes = directory - at + 1, _INODES - used
    yield 0, bytes(1024) + _superblock(free_blocks, free_inodes, when)
    yield _GROUP, struct.pack("<3I4H", _BLOCK_BITMAP, _INODE_BITMAP, _TABLE, free_blocks, free_inodes, 1, 0)
    yield _BLOCK_BITMAP, _bitmap(at, directory, free=_DATA - 1)
    yield _INODE_BITMAP, _bitmap(used, _INODES)
    yield _TABLE, bytes(table)
    yield directory, entries


def _superblock(free_blocks: int, free_inodes: int, when: int) -> bytes:
    words = struct.pack(
        "<13I6H4I2H", _INODES, _BLOCKS, 0, free_blocks, free_inodes, 0,
        2, 2, 32768, 32768, _INODES,  # 4096 << 0; per group: blocks, clusters, inodes
        0, when, 0, 0xFFFF, 0xEF53, 1, 1, 0,  # never mounted, never to be checked; clean; errors: go on
        when, 0, 0, 1, 0, 0,  # checked, by Linux, with features
    )  # fmt: skip
    rest = (
        struct.pack("<I2H3I", _FIRST, _INODE, 0, 0, _FILETYPE | _EXTENTS, 0) + _UUID + b"mvm-secrets".ljust(16, b"\0")
    )
    return (words + rest).ljust(1024, b"\0")


def _inode(mode: int, links: int, size: int, block: int, when: int) -> bytes:
    count = _blocks(size)
    extent = struct.pack("<4HI", 0xF30A, 1, 4, 0, 0) + struct.pack("<I2HI", 0, count, 0, block)
    head = struct.pack(
        "<2H5I2H3I", mode, 0, size, when, when, when, 0, 0, links, count * (_BLOCK // 512), _EXTENTS_FLAG, 0
    )
    return (head + extent.ljust(60, b"\0")).ljust(_INODE, b"\0")


def _entries(files: Mapping[str, bytes]) -> bytes:
    """The root directory: in each block the last entry reaches to its end."""
    names = [(".", _ROOT, _IS_DIR), ("..", _ROOT, _IS_DIR)]
    names += [(name, number, _IS_FILE) for number, name in enumerate(files, start=_FIRST)]
    blocks: list[list[tuple[str, int, int]]] = [[]]
    room = _BLOCK
    for entry in names:
        size = _entry_size(entry[0])
        if size > room:
            blocks.append([])
            room = _BLOCK
        blocks[-1].append(entry)
        room -= size
    return b"".join(map(_directory_block, blocks))


def _directory_block(entries: list[tuple[str, int, int]]) -> bytes:
    block = b""
    for name, inode, kind in entries:
        size = _BLOCK - len(block) if (name, inode, kind) == entries[-1] else _entry_size(name)
        block += (struct.pack("<IH2B", inode, size, len(name), kind) + name.encode()).ljust(_entry_size(name), b"\0")
    return block.ljust(_BLOCK, b"\0")


def _entry_size(name: str) -> int:
    return 8 + -(-len(name) // 4) * 4


def _inode_offset(number: int) -> int:
    return (number - 1) * _INODE


def _blocks(size: int) -> int:
    return -(-size // _BLOCK)


def _bitmap(used: int, end: int, free: int | None = None) -> bytes:
    """`used` are taken from the start, but for one that is `free`, and so is everything from `end` on."""
    bits = (1 << used) - 1 | (1 << _BLOCK * 8) - (1 << end)
    if free is not None:
        bits &= ~(1 << free)
    return bits.to_bytes(_BLOCK, "little")
