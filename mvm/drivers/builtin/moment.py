"""The guest's program ``moment``: no tool of a small image can move the clock by microseconds or reseed the kernel.

It stands by, since starting a program costs a guest milliseconds while somebody waits. It reads a `struct timeval` and
entropy from its input and hands them to the kernel: the first is added to the clock, the second goes as a `struct
rand_pool_info` through /dev/urandom, open as descriptor 3. It writes a line with 0, or with the number of the call that
failed, and begins again, until its input ends. Being six system calls, it is assembled here from a table rather than
built with a compiler.
"""

from __future__ import annotations

import struct

from mvm import guest

_BASE = 0x400000  # where the file is mapped, as a whole
_TIMEX = _BASE + 0x200  # a struct timex
_TIMEX_TIME, _TIMEX_SIZE = 72, 208
_POOL = _TIMEX + _TIMEX_SIZE
_POOL_HEADER = struct.pack("<ii", guest.ENTROPY_BITS, guest.ENTROPY_BYTES)
_POOL_SIZE = len(_POOL_HEADER) + guest.ENTROPY_BYTES
_REPLY = _POOL + _POOL_SIZE  # a digit and the end of its line

_READ, _WRITE, _IOCTL, _EXIT, _ADJTIMEX = 0, 1, 16, 60, 159
_ADJ_SETOFFSET = 0x0100
_RNDADDENTROPY, _RNDRESEEDCRNG = 0x40085203, 0x5207
_URANDOM = 3

# Number, its three arguments, and what it must at least return.
_CALLS = (
    (_READ, 0, _TIMEX + _TIMEX_TIME, 16, 16),
    (_READ, 0, _POOL + len(_POOL_HEADER), guest.ENTROPY_BYTES, guest.ENTROPY_BYTES),
    (_ADJTIMEX, _TIMEX, 0, 0, 0),
    (_IOCTL, _URANDOM, _RNDADDENTROPY, _POOL, 0),
    (_IOCTL, _URANDOM, _RNDRESEEDCRNG, 0, 0),
)

_SYSCALL = b"\x0f\x05"
_EAX, _EDX, _ESI, _EDI = b"\xb8", b"\xba", b"\xbe", b"\xbf"  # mov REGISTER, the 32 bits that follow
_CMP_EAX, _JG, _JL, _JMP = b"\x3d", b"\x7f", b"\x0f\x8c", b"\xe9"
_MOV_BYTE = b"\xc6\x04\x25"  # to the address that follows, the byte after it

_ELF = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT = struct.Struct("<IIQQQQQQ")


def program() -> bytes:
    """It, as a static x86-64 executable."""
    code = _code()
    start = _ELF.size + _SEGMENT.size
    header = _ELF.pack(
        b"\x7fELF\x02\x01\x01", 2, 62, 1,  # 64 bits, little-endian; an executable for x86-64
        _BASE + start, _ELF.size, 0, 0,  # where it begins, where the segments are told; no sections
        _ELF.size, _SEGMENT.size, 1, 0, 0, 0,
    )  # fmt: skip
    data = struct.pack("<I", _ADJ_SETOFFSET).ljust(_TIMEX_SIZE, b"\0") + _POOL_HEADER
    in_file, in_memory = _TIMEX - _BASE + len(data), _REPLY - _BASE + 2
    segment = _SEGMENT.pack(1, 7, 0, _BASE, _BASE, in_file, in_memory, 0x1000)  # to be loaded; all may be done with it
    return (header + segment + code).ljust(_TIMEX - _BASE, b"\0") + data


def _code() -> bytes:
    """A loop over the calls: one that does not return enough ends the round, which is reported."""
    end = _call(_EXIT, 0, 0, 0)
    calls = []
    for number, (function, first, second, third, least) in enumerate(_CALLS, start=1):
        code = _store(_REPLY, b"%d" % number) + _call(function, first, second, third)
        if number == 1:  # at the end of its input
            code += _compare(0) + _JG + bytes([len(end)]) + end
        calls.append(code + _compare(least) + _JL)
    done = _store(_REPLY, b"0")
    code = b""
    for at, call in enumerate(calls):
        rest = sum(len(later) + 4 for later in calls[at + 1 :]) + len(done)
        code += call + struct.pack("<i", rest)  # to the report
    code += done + _call(_WRITE, 1, _REPLY, 2)
    return _store(_REPLY + 1, b"\n") + code + _JMP + struct.pack("<i", -len(code) - 5)


def _call(function: int, first: int, second: int, third: int) -> bytes:
    return _mov(_EAX, function) + _mov(_EDI, first) + _mov(_ESI, second) + _mov(_EDX, third) + _SYSCALL


def _compare(value: int) -> bytes:
    return _CMP_EAX + struct.pack("<I", value)


def _store(address: int, byte: bytes) -> bytes:
    return _MOV_BYTE + struct.pack("<I", address) + byte


def _mov(register: bytes, value: int) -> bytes:
    return register + struct.pack("<I", value)
