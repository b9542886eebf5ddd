"""Making and opening TAP interfaces."""

from __future__ import annotations

import fcntl
import os
import socket
import struct

from mvm.errors import Failed

_TUNSETIFF, _PERSIST, _OWNER, _GROUP = 0x400454CA, 0x400454CB, 0x400454CC, 0x400454CE
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR, _IFF_EXCLUSIVE = 0x0002, 0x1000, 0x4000, 0x8000


def create(name: str, uid: int) -> None:
    """A new TAP `name` that belongs to user and group `uid`. Raises `OSError`, such as EBUSY where there is one."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI | _IFF_EXCLUSIVE))
        fcntl.ioctl(fd, _OWNER, uid)
        fcntl.ioctl(fd, _GROUP, uid)
        fcntl.ioctl(fd, _PERSIST, 1)
    finally:
        os.close(fd)


def attach(name: str) -> int:
    """A descriptor of the existing TAP `name` in the caller's network namespace, for a VMM to inherit.

    Raises `Failed` (``vmm.no_tap``) when there is none or another process has it.
    """
    try:
        socket.if_nametoindex(name)  # asked for an unknown name, the kernel would make one
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise _failed(name, error) from None
    try:
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR))
    except OSError as error:
        os.close(fd)
        raise _failed(name, error) from None
    return fd


def nowhere() -> int:
    """A descriptor of a new TAP that is down, on no bridge, and gone when it is closed. Raises as `attach`."""
    try:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise _failed("for a template", error) from None
    try:
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", b"mvmtmpl%d", _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR))
    except OSError as error:
        os.close(fd)
        raise _failed("for a template", error) from None
    return fd


def _failed(name: str, error: OSError) -> Failed:
    return Failed(
        "vmm.no_tap", f"TAP {name} cannot be used: {error.strerror}", hint="start the instance again", tap=name
    )
