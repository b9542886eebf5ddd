"""Small programs that stand by in a guest, since starting one costs it milliseconds while somebody waits.

Such a program makes a few system calls with what it reads from its input, writes a line with 0, or with the number of
the call that failed, and begins again. It is assembled here from a table rather than built with a compiler.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

BASE = 0x400000  # where the file is mapped, as a whole
DATA = BASE + 0x200
READ, _WRITE, _EXIT = 0, 1, 60

_SYSCALL = b"\x0f\x05"
_EAX = b"\xb8"  # mov REGISTER, the 32 bits that follow
_ARGUMENTS = (b"\xbf", b"\xbe", b"\xba", b"\x41\xba", b"\x41\xb8")  # the same for rdi, rsi, rdx, r10, r8
_CMP_EAX, _JG, _JL, _JMP = b"\x3d", b"\x7f", b"\x0f\x8c", b"\xe9"  # the last two are followed by 32 bits
_MOV_BYTE = b"\xc6\x04\x25"  # to the address that follows, the byte after it

_ELF = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT = struct.Struct("<IIQQQQQQ")


class Call(NamedTuple):
    """A system call: its number, its arguments, and what it must at least return."""

    number: int
    arguments: Sequence[int]
    least: int = 0


def assemble(calls: Sequence[Call], data: bytes, size: int, *, echoed: int = 0, port: bool = False) -> bytes:
    """A static x86-64 executable that makes `calls`, the first of which reads; it has `size` bytes from `DATA` on.

    The first of them are `data`, the others zero. The last `echoed` of them precede the digit in each reply. At the end
    of its input it ends; if that is a virtio `port` it writes an empty line instead, which waits for the next client.
    """
    code = _code(calls, DATA + size, echoed, port)
    start = _ELF.size + _SEGMENT.size
    header = _ELF.pack(
        b"\x7fELF\x02\x01\x01", 2, 62, 1,  # 64 bits, little-endian; an executable for x86-64
        BASE + start, _ELF.size, 0, 0,  # where it begins, where the segments are told; no sections
        _ELF.size, _SEGMENT.size, 1, 0, 0, 0,
    )  # fmt: skip
    in_file, in_memory = DATA - BASE + len(data), DATA - BASE + size + 2
    segment = _SEGMENT.pack(1, 7, 0, BASE, BASE, in_file, in_memory, 0x1000)  # to be loaded; all may be done with it
    head = header + segment + code
    assert len(head) <= DATA - BASE, "the code has room before the data"
    return head.ljust(DATA - BASE, b"\0") + data


def _code(calls: Sequence[Call], reply: int, echoed: int, port: bool) -> bytes:
    """A loop over the calls: one that does not return enough ends the round, which is reported.

    At `reply` are a digit and the end of its line.
    """
    end = _call(Call(_WRITE, (1, reply + 1, 1)) if port else Call(_EXIT, (0,)))
    pieces = []
    for number, call in enumerate(calls, start=1):
        piece = _store(reply, b"%d" % number) + _call(call)
        if number == 1:  # at the end of its input
            again = _jump_back(piece + _compare(0) + _JG + b"-" + end) if port else b""
            piece += _compare(0) + _JG + bytes([len(end + again)]) + end + again
        pieces.append(piece + _compare(call.least) + _JL)
    done = _store(reply, b"0")
    code = b""
    for at, piece in enumerate(pieces):
        rest = sum(len(later) + 4 for later in pieces[at + 1 :]) + len(done)
        code += piece + struct.pack("<i", rest)  # to the report
    code += done + _call(Call(_WRITE, (1, reply - echoed, echoed + 2)))
    return _store(reply + 1, b"\n") + code + _jump_back(code)


def _jump_back(over: bytes) -> bytes:
    return _JMP + struct.pack("<i", -len(over) - len(_JMP) - 4)


def _call(call: Call) -> bytes:
    given = zip(_ARGUMENTS, call.arguments, strict=False)
    return _mov(_EAX, call.number) + b"".join(_mov(register, value) for register, value in given) + _SYSCALL


def _compare(value: int) -> bytes:
    return _CMP_EAX + struct.pack("<I", value)


def _store(address: int, byte: bytes) -> bytes:
    return _MOV_BYTE + struct.pack("<I", address) + byte


def _mov(register: bytes, value: int) -> bytes:
    return register + struct.pack("<I", value)
