"""The guest's program ``moment``: no tool of a small image can move the clock by microseconds or reseed the kernel.

It stands by (see `mvm.drivers.builtin.standby`), reads a `struct timeval` and entropy and hands them to the kernel: the
first is added to the clock, the second goes as a `struct rand_pool_info` through /dev/urandom, open as descriptor 3.
"""

from __future__ import annotations

import struct

from mvm import guest
from mvm.drivers.builtin.standby import DATA, READ, Call, assemble

_TIMEX = DATA  # a struct timex
_TIMEX_TIME, _TIMEX_SIZE = 72, 208
_POOL = _TIMEX + _TIMEX_SIZE
_POOL_HEADER = struct.pack("<ii", guest.ENTROPY_BITS, guest.ENTROPY_BYTES)
_POOL_SIZE = len(_POOL_HEADER) + guest.ENTROPY_BYTES

_IOCTL, _ADJTIMEX = 16, 159
_ADJ_SETOFFSET = 0x0100
_RNDADDENTROPY, _RNDRESEEDCRNG = 0x40085203, 0x5207
_URANDOM = 3

_CALLS = (
    Call(READ, (0, _TIMEX + _TIMEX_TIME, 16), 16),
    Call(READ, (0, _POOL + len(_POOL_HEADER), guest.ENTROPY_BYTES), guest.ENTROPY_BYTES),
    Call(_ADJTIMEX, (_TIMEX,)),
    Call(_IOCTL, (_URANDOM, _RNDADDENTROPY, _POOL)),
    Call(_IOCTL, (_URANDOM, _RNDRESEEDCRNG)),
)


def program() -> bytes:
    """It, as a static x86-64 executable."""
    data = struct.pack("<I", _ADJ_SETOFFSET).ljust(_TIMEX_SIZE, b"\0") + _POOL_HEADER
    return assemble(_CALLS, data, _TIMEX_SIZE + _POOL_SIZE)
