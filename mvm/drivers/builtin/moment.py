"""The guest's program ``moment``: no tool of a small image can set the clock to microseconds or reseed the kernel.

It serves a virtio-serial port (see `mvm.drivers.builtin.standby` and `mvm.guest`): it reads a `struct timespec`,
entropy and the request's id, sets the clock, and hands the entropy to the kernel as a `struct rand_pool_info` through
/dev/urandom, open as descriptor 3.
"""

from __future__ import annotations

import struct

from mvm import guest
from mvm.drivers.builtin.standby import DATA, READ, Call, assemble

_POOL_HEADER = struct.pack("<ii", guest.ENTROPY_BITS, guest.ENTROPY_BYTES)
_POOL = DATA
_ENTROPY = _POOL + len(_POOL_HEADER)  # where the request is read to; it begins with entropy
_TIME = _ENTROPY + guest.ENTROPY_BYTES

_IOCTL, _CLOCK_SETTIME = 16, 227
_CLOCK_REALTIME = 0
_RNDADDENTROPY, _RNDRESEEDCRNG = 0x40085203, 0x5207
_URANDOM = 3

_CALLS = (
    Call(READ, (0, _ENTROPY, guest.MOMENT.size), guest.MOMENT.size),
    Call(_CLOCK_SETTIME, (_CLOCK_REALTIME, _TIME)),
    Call(_IOCTL, (_URANDOM, _RNDADDENTROPY, _POOL)),
    Call(_IOCTL, (_URANDOM, _RNDRESEEDCRNG)),
)


def program() -> bytes:
    """It, as a static x86-64 executable."""
    size = len(_POOL_HEADER) + guest.MOMENT.size
    return assemble(_CALLS, _POOL_HEADER, size, echoed=guest.MOMENT_ID_BYTES, port=True)
