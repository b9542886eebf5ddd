"""A guest's memory: which of it a VMM has to itself, packed into files and put back.

A template's memory is a sealed memfd, which VMMs map privately: whatever they do, even with its descriptor, cannot
change it. It lives as long as some VMM maps it, and is found there by those that start later.
"""

from __future__ import annotations

import fcntl
import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mvm.domain.instance import ProcessIdentity
from mvm.drivers.qemu.packing import Buffer, Packer, Run, Unpacker
from mvm.errors import Failed
from mvm.ports.vmm import MemoryUse

PAGE = 4096
_NOTHING = bytes(PAGE)
_AT_ONCE = 256  # pages
_PRESENT, _FILE = 3 << 62, 1 << 61  # of /proc/PID/pagemap: in memory or swapped; the file's page, not a copy
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
_NAME = "mvm-ram-"
_USE = re.compile(r"^(Rss|Pss|Private_Clean|Private_Dirty): +(\d+) kB$", re.MULTILINE)

Put = Callable[[int, Buffer], None]
"""Writes bytes at an offset of the guest's memory."""


@dataclass(frozen=True, slots=True)
class Region:
    """Where a VMM has its guest's memory, and the descriptor in it of the template's memory, if it has one."""

    pid: int
    start: int
    pages: int
    base: int | None


def region(process: ProcessIdentity, mem_mib: int) -> Region:
    """Find it. Raises `Failed` (``vmm.failed``) when it is not to be found, and `OSError` when the VMM has ended."""
    size = mem_mib << 20
    shared: list[tuple[int, int]] = []
    private: list[tuple[int, int]] = []
    lines = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
    if not lines:  # it has not been reaped
        raise ProcessLookupError
    for line in lines:
        addresses, mode, *_, inode, name = (line + " -").split()[:6]
        start, end = (int(word, 16) for word in addresses.split("-"))
        if mode == "rw-p" and name.startswith(f"/memfd:{_NAME}"):
            if shared and shared[-1][1] == start:
                start = shared.pop()[0]
            shared.append((start, end))
        elif mode == "rw-p" and inode == "0" and name == "-":
            private.append((start, end))
    found = [each for each in shared or private if each[1] - each[0] == size]
    if len(found) != 1:
        raise Failed("vmm.failed", f"the memory of process {process.pid} was not found", hint="stop and start it")
    base = _descriptor(process.pid, _NAME) if shared else None
    return Region(process.pid, found[0][0], size // PAGE, base)


def pack(place: Region, into: Packer) -> None:
    """Pack the pages that differ from the template's, or from nothing. The VMM stands still."""
    base = None if place.base is None else os.open(f"/proc/{place.pid}/fd/{place.base}", os.O_RDONLY | os.O_CLOEXEC)
    memory = os.open(f"/proc/{place.pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for first, count in _copied(place):
            size = count * PAGE
            data = _read(memory, place.start + first * PAGE, size)
            was = bytes(size) if base is None else _read(base, first * PAGE, size)
            if data == was:
                continue
            for number in range(count):
                page = data[number * PAGE : (number + 1) * PAGE]
                if page == was[number * PAGE : (number + 1) * PAGE]:
                    continue
                into.add(first + number, None if page == _NOTHING else page)
    finally:
        os.close(memory)
        if base is not None:
            os.close(base)


def unpack(pages: Iterable[Run], put: Put) -> None:
    """Write what `pack` packed."""
    for first, count, data in pages:
        put(first * PAGE, bytes(count * PAGE) if data is None else data)


def unpack_into(place: Region, pages: Iterable[Run]) -> None:
    """Write it into a VMM that has not begun to run."""
    memory = os.open(f"/proc/{place.pid}/mem", os.O_WRONLY | os.O_CLOEXEC)
    try:
        unpack(pages, lambda offset, data: _write(memory, place.start + offset, data))
    finally:
        os.close(memory)


def sealed(name: str, mem_mib: int, pages: Unpacker) -> int:
    """A descriptor of a new memfd with `pages` that nobody can write to ever after."""
    fd = os.memfd_create(_NAME + name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.truncate(fd, mem_mib << 20)
        unpack(pages.runs(), lambda offset, data: _write(fd, offset, data))
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def sealed_in(pid: int, name: str) -> int | None:
    """A descriptor of the memfd `sealed` made as `name`, if the VMM `pid` has it.

    One that a VMM has made itself, with that name and the seals, is the VMM's own and never another's memory.
    """
    number = _descriptor(pid, _NAME + name)
    if number is None:
        return None
    try:
        fd = os.open(f"/proc/{pid}/fd/{number}", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    if _is_ours(fd, _NAME + name):
        return fd
    os.close(fd)
    return None


def _is_ours(fd: int, name: str) -> bool:
    """Looked at once it is open: what a VMM has under a number it can change."""
    if not Path(f"/proc/self/fd/{fd}").readlink().name.startswith(f"memfd:{name}"):
        return False
    return os.fstat(fd).st_uid == os.geteuid() and fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS == _SEALS


def has(process: ProcessIdentity, name: str) -> bool:
    """Whether the VMM maps the memory that `sealed` made as `name`."""
    return _descriptor(process.pid, _NAME + name) is not None


def use(process: ProcessIdentity) -> MemoryUse:
    """What it uses. Raises `OSError` when it has ended."""
    text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
    found = {name: int(value) << 10 for name, value in _USE.findall(text)}
    return MemoryUse(found["Rss"], found["Pss"], found["Private_Clean"] + found["Private_Dirty"])


def _descriptor(pid: int, prefix: str) -> int | None:
    """The number that `pid` has a memfd under whose name begins so."""
    with suppress(FileNotFoundError):  # it ended
        for number in os.listdir(f"/proc/{pid}/fd"):  # noqa: PTH208
            with suppress(FileNotFoundError):  # it closed this one meanwhile
                if Path(f"/proc/{pid}/fd/{number}").readlink().name.startswith(f"memfd:{prefix}"):
                    return int(number)
    return None


def _copied(place: Region) -> Iterator[tuple[int, int]]:
    """Runs of pages that the VMM has copies of: first and count, at most `_AT_ONCE`."""
    pagemap = os.open(f"/proc/{place.pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for at in range(0, place.pages, 1 << 15):
            entries = array("Q", os.pread(pagemap, min(1 << 15, place.pages - at) * 8, (place.start // PAGE + at) * 8))
            first = count = 0
            for number, entry in enumerate(entries, start=at):
                if not entry & _PRESENT or entry & _FILE:
                    continue
                if number != first + count or count == _AT_ONCE:
                    if count:
                        yield first, count
                    first, count = number, 0
                count += 1
            if count:
                yield first, count
    finally:
        os.close(pagemap)


def _read(fd: int, offset: int, size: int) -> bytes:
    data = os.pread(fd, size, offset)
    while len(data) < size:
        more = os.pread(fd, size - len(data), offset + len(data))
        if not more:
            raise EOFError
        data += more
    return data


def _write(fd: int, offset: int, data: Buffer) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        if not written:  # the VMM whose memory it is has ended
            raise EOFError
        offset, view = offset + written, view[written:]
