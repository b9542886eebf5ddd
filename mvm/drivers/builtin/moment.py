"""The guest's program ``moment``: no tool of a small image can set the clock to the microsecond or reseed the kernel.

It stands by, since starting a program costs a guest milliseconds while somebody waits: it reads a `struct timespec` and
a `struct rand_pool_info` from its input, hands them to the kernel, through /dev/urandom open as descriptor 3, and
writes a line with 0, or with the number of the call that failed; and so on, until its input ends. Being a handful of
system calls, it is assembled here from a table rather than built with a compiler.
"""

from __future__ import annotations

import struct

from mvm import guest

_BASE = 0x400000  # where the file is mapped, as a whole
_INPUT = _BASE + 0x1000  # behind it: memory that the file does not fill
_POOL = 16 + 8  # a timespec (seconds, nanoseconds), then a pool's bits and bytes
_SIZE = _POOL + guest.ENTROPY_BYTES
_REPLY = _INPUT + 0x100  # a digit and the end of its line

_READ, _WRITE, _IOCTL, _EXIT, _CLOCK_SETTIME = 0, 1, 16, 60, 227
_REALTIME = 0
_RNDADDENTROPY, _RNDRESEEDCRNG = 0x40085203, 0x5207
_URANDOM = 3

# Number, its three arguments, and what it must return.
_CALLS = (
    (_READ, 0, _INPUT, _SIZE, _SIZE),
    (_CLOCK_SETTIME, _REALTIME, _INPUT, 0, 0),
    (_IOCTL, _URANDOM, _RNDADDENTROPY, _INPUT + 16, 0),
    (_IOCTL, _URANDOM, _RNDRESEEDCRNG, 0, 0),
)

_SYSCALL = b"\x0f\x05"
_EAX, _EDX, _ESI, _EDI = b"\xb8", b"\xba", b"\xbe", b"\xbf"  # mov REGISTER, the 32 bits that follow
_CMP_EAX, _JG, _JNE, _JMP = b"\x3d", b"\x7f", b"\x0f\x85", b"\xe9"
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
    everything = start + len(code)
    segment = _SEGMENT.pack(1, 7, 0, _BASE, _BASE, everything, _REPLY + 2 - _BASE, 0x1000)
    return header + segment + code


def _code() -> bytes:
    """A loop over the calls: one that does not return what it must ends the round, which is reported."""
    ended = _call(_EXIT, 0, 0, 0)
    begin = _store(_REPLY + 1, b"\n")
    rounds = b""
    fixups = []
    for number, (function, first, second, third, result) in enumerate(_CALLS, start=1):
        rounds += _store(_REPLY, b"%d" % number) + _call(function, first, second, third)
        if function == _READ:
            rounds += _CMP_EAX + struct.pack("<I", 0) + _JG + bytes([len(ended)]) + ended
        rounds += _CMP_EAX + struct.pack("<I", result) + _JNE + bytes(4)
        fixups.append(len(rounds))
    rounds += _store(_REPLY, b"0")
    report = len(rounds)
    for end in fixups:  # where each jump's 4 bytes end, from which it is counted
        rounds = rounds[: end - 4] + struct.pack("<i", report - end) + rounds[end:]
    rounds += _call(_WRITE, 1, _REPLY, 2)
    return begin + rounds + _JMP + struct.pack("<i", -(len(rounds) + 5))


def _call(function: int, first: int, second: int, third: int) -> bytes:
    return _mov(_EAX, function) + _mov(_EDI, first) + _mov(_ESI, second) + _mov(_EDX, third) + _SYSCALL


def _store(address: int, byte: bytes) -> bytes:
    return _MOV_BYTE + struct.pack("<I", address) + byte


def _mov(register: bytes, value: int) -> bytes:
    return register + struct.pack("<I", value)
