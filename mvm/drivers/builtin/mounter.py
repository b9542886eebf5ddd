"""The guest's program ``mounter``: mounts the disk of secrets, without a start of ``mount`` that somebody waits for.

It stands by (see `mvm.drivers.builtin.standby`) and reads the disk's name, filled up with zeros.
"""

from __future__ import annotations

from mvm import guest
from mvm.drivers.builtin.standby import DATA, READ, Call, assemble

_TARGET, _TYPE = b"/run/secrets\0", b"ext4\0"
_DISK = DATA + len(_TARGET) + len(_TYPE)
_MOUNT = 165
_RDONLY, _NOSUID, _NODEV, _NOEXEC = 1, 2, 4, 8

_CALLS = (
    Call(READ, (0, _DISK, guest.DISK_NAME_BYTES), guest.DISK_NAME_BYTES),
    Call(_MOUNT, (_DISK, DATA, DATA + len(_TARGET), _RDONLY | _NOSUID | _NODEV | _NOEXEC, 0)),
)


def program() -> bytes:
    """It, as a static x86-64 executable."""
    data = _TARGET + _TYPE
    return assemble(_CALLS, data, len(data) + guest.DISK_NAME_BYTES + 1)
