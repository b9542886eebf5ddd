"""Small static programs for x86-64, assembled from lists of system calls: no compiler, no interpreter to start.

What they are called with, and texts and structures that they point to, are written down where they are made.
"""

from __future__ import annotations

import errno
import os
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

_BASE = 0x400000  # where the file is mapped, as a whole
_ELF = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_HEADERS = _ELF.size + _SEGMENT.size

_MOV = (b"\xbf", b"\xbe", b"\xba", b"\x41\xba", b"\x41\xb8", b"\x41\xb9")  # edi esi edx r10d r8d r9d, 32 bits follow
_MOV_64 = (b"\x48\xbf", b"\x48\xbe", b"\x48\xba", b"\x49\xba", b"\x49\xb8", b"\x49\xb9")
_LEA_ARGUMENTS = (b"\x48\x8d\x7c\x24\x08", b"\x48\x8d\x74\x24\x08", b"\x48\x8d\x54\x24\x08")  # rsp+8
_EAX, _SYSCALL = b"\xb8", b"\x0f\x05"
_FAILED = b"\x48\x85\xc0\x0f\x88"  # test rax, rax; js
_JMP = b"\xe9"
_WRITE, _EXIT = 1, 60
_MFD_EXEC = 0x10

_FAILURE = re.compile(r"^cage: (.+): errno (\d{3})$", re.MULTILINE)
FIRST = _BASE + _HEADERS
FAILED = 126  # what a program ends with whose call failed


class Special(Enum):
    """An argument that is known only to the program itself."""

    ARGUMENTS = "its own command line, as execve takes it"


ARGUMENTS = Special.ARGUMENTS


@dataclass(frozen=True, slots=True)
class Record:
    """A structure: bytes, or addresses of bytes."""

    parts: tuple[bytes, ...]
    pointers: tuple[bytes, ...] = ()


Argument = int | bytes | Record | Special


@dataclass(frozen=True, slots=True)
class Call:
    """A system call. When it fails the program says `what` and the error's number, and ends."""

    what: str
    function: int
    arguments: tuple[Argument, ...] = ()


def text(word: str) -> bytes:
    """A string as the kernel takes it."""
    return word.encode() + b"\0"


def _message(what: str) -> bytes:
    """What a program that fails says before the three digits of the error's number."""
    return f"cage: {what}: errno ".encode()


def failure(said: str) -> str | None:
    """What a program said of a call that failed, for people; None when it said nothing of the kind."""
    found = _FAILURE.search(said)
    return f"{found[1]}: {os.strerror(int(found[2]))}" if found else None


def program(calls: Sequence[Call], *, first: bytes = b"") -> bytes:
    """A program that makes `calls`, the last of which does not return; of what they point to `first` is at `FIRST`."""
    data = Data()
    data.put(first)
    body = [encoded(call, data) for call in calls]
    digits = data.put(b"000\n")
    texts = [data.put(_message(call.what)) for call in calls]
    stubs = b""
    common = _report(digits)
    for call, at in zip(calls, texts, strict=True):
        stub = b"\xbe" + _u32(at) + b"\xba" + _u32(len(_message(call.what)))
        rest = (len(calls) - 1 - len(stubs) // (len(stub) + 5)) * (len(stub) + 5)
        stubs += stub + _JMP + _u32(rest)
    stub_size = len(stubs) // len(calls)
    code, total = b"", sum(len(part) + len(_FAILED) + 4 for part in body)
    for number, part in enumerate(body):
        code += part + _FAILED
        code += _u32(total - len(code) - 4 + number * stub_size)
    return executable(bytes(data.bytes), code + stubs + common)


def in_memory(made: bytes) -> int:
    """A descriptor by which it can be run, of a file that is on no disk."""
    try:
        fd = os.memfd_create("mvm-launcher", os.MFD_CLOEXEC | _MFD_EXEC)
    except OSError as error:  # before Linux 6.3 it needs not be asked for
        if error.errno != errno.EINVAL:
            raise
        fd = os.memfd_create("mvm-launcher", os.MFD_CLOEXEC)
    os.write(fd, made)
    return fd


class Data:
    """What a program's code points to; it comes before the code, so addresses are known at once."""

    def __init__(self) -> None:
        self.bytes = bytearray()
        self._known: dict[bytes, int] = {}

    def put(self, data: bytes) -> int:
        """The address at which a program has `data`."""
        if data not in self._known:
            self.bytes += bytes(-len(self.bytes) % 8)
            self._known[data] = _BASE + _HEADERS + len(self.bytes)
            self.bytes += data
        return self._known[data]


def encoded(call: Call, data: Data) -> bytes:
    """The code that makes `call`; what it returns is in rax."""
    code = b""
    for place, argument in enumerate(call.arguments):
        if isinstance(argument, Special):
            code += _LEA_ARGUMENTS[place]
            continue
        if isinstance(argument, Record):
            pointers = b"".join(struct.pack("<Q", data.put(each)) for each in argument.pointers)
            argument = b"".join(argument.parts) + pointers
        value = argument if isinstance(argument, int) else data.put(argument)
        fits = 0 <= value < 1 << 32
        code += _MOV[place] + _u32(value) if fits else _MOV_64[place] + struct.pack("<Q", value & (1 << 64) - 1)
    return code + _EAX + _u32(call.function) + _SYSCALL


def _report(digits: int) -> bytes:
    """Write esi (edx bytes of it) and the number in -eax to descriptor 2, and exit."""
    code = b"\x89\xc3"  # mov ebx, eax
    code += b"\xbf" + _u32(2) + _EAX + _u32(_WRITE) + _SYSCALL
    code += b"\x89\xd8\xf7\xd8\xb9" + _u32(10)  # mov eax, ebx; neg eax; mov ecx, 10
    for place in (2, 1, 0):
        code += b"\x31\xd2\xf7\xf1\x80\xc2\x30\x88\x14\x25" + _u32(digits + place)  # edx=0; div ecx; dl+='0'; store dl
    code += b"\xbf" + _u32(2) + b"\xbe" + _u32(digits) + b"\xba" + _u32(4) + _EAX + _u32(_WRITE) + _SYSCALL
    return code + b"\xbf" + _u32(FAILED) + _EAX + _u32(_EXIT) + _SYSCALL


def executable(data: bytes, code: bytes) -> bytes:
    """A static program of `code`, with the bytes of a `Data`."""
    size = _HEADERS + len(data) + len(code)
    header = _ELF.pack(
        b"\x7fELF\x02\x01\x01", 2, 62, 1,  # 64 bits, little-endian; an executable for x86-64
        _BASE + _HEADERS + len(data), _ELF.size, 0, 0,  # where it begins, where the segments are told; no sections
        _ELF.size, _SEGMENT.size, 1, 0, 0, 0,
    )  # fmt: skip
    # One segment; all may be done with it: the program lives for two milliseconds and reads nothing.
    return header + _SEGMENT.pack(1, 7, 0, _BASE, _BASE, size, size, 0x1000) + data + code


def _u32(value: int) -> bytes:
    return struct.pack("<I", value)
