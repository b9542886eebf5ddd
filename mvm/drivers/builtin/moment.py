"""The guest's program ``moment``: no tool of a small image can set the clock to the microsecond or reseed the kernel.

It reads a `struct timespec` and a `struct rand_pool_info` from its input and hands them to the kernel, through
/dev/urandom open as descriptor 3; it ends with 0, or with the number of the call that failed. Being four system calls,
it is assembled here from a table rather than built with a compiler.
"""

from __future__ import annotations

import struct

from mvm import guest

_BASE = 0x400000  # where the file is mapped, as a whole
_INPUT = _BASE + 0x1000  # behind it: memory that the file does not fill
_POOL = 16 + 8  # a timespec (seconds, nanoseconds), then a pool's bits and bytes
_SIZE = _POOL + guest.ENTROPY_BYTES

_READ, _IOCTL, _EXIT, _CLOCK_SETTIME = 0, 16, 60, 227
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
_CMP_EAX, _JE = b"\x3d", b"\x74"

_ELF = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT = struct.Struct("<IIQQQQQQ")


def program() -> bytes:
    """It, as a static x86-64 executable."""
    code = b"".join(_call(number, call) for number, call in enumerate(_CALLS, start=1)) + _exit(0)
    start = _ELF.size + _SEGMENT.size
    header = _ELF.pack(
        b"\x7fELF\x02\x01\x01", 2, 62, 1,  # 64 bits, little-endian; an executable for x86-64
        _BASE + start, _ELF.size, 0, 0,  # where it begins, where the segments are told; no sections
        _ELF.size, _SEGMENT.size, 1, 0, 0, 0,
    )  # fmt: skip
    everything = start + len(code)
    segment = _SEGMENT.pack(1, 7, 0, _BASE, _BASE, everything, _INPUT + _SIZE - _BASE, 0x1000)
    return header + segment + code


def _call(number: int, call: tuple[int, int, int, int, int]) -> bytes:
    """One system call; unless it returns what it must, the program exits with `number`."""
    function, first, second, third, result = call
    failed = _exit(number)
    return (
        _mov(_EAX, function) + _mov(_EDI, first) + _mov(_ESI, second) + _mov(_EDX, third) + _SYSCALL
        + _CMP_EAX + struct.pack("<I", result) + _JE + bytes([len(failed)]) + failed
    )  # fmt: skip


def _exit(code: int) -> bytes:
    return _mov(_EAX, _EXIT) + _mov(_EDI, code) + _SYSCALL


def _mov(register: bytes, value: int) -> bytes:
    return register + struct.pack("<I", value)
