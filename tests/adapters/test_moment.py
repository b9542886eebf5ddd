"""The guest's programs that stand by, as far as they can be run without changing this host."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from mvm import guest
from mvm.drivers.builtin import moment, mounter

_NO_TIME = 10**9  # nanoseconds; too many, so that nobody's clock is set


@pytest.fixture
def port(tmp_path: Path) -> Iterator[socket.socket]:
    """The host's end of a port that ``moment`` serves."""
    path = tmp_path / "moment"
    path.write_bytes(moment.program())
    path.chmod(0o700)
    ours, theirs = socket.socketpair()
    ours.settimeout(10)
    with ours, theirs, subprocess.Popen([path], stdin=theirs, stdout=theirs) as program:
        yield ours
        program.kill()


def said(port: socket.socket, given: bytes, size: int) -> bytes:
    if given:
        port.sendall(given)
    return port.recv(size, socket.MSG_WAITALL)


@pytest.mark.parametrize("length", [1, guest.ENTROPY_BYTES, guest.MOMENT.size - 1])
def test_half_a_request_is_a_call_that_fails(port: socket.socket, length: int) -> None:
    assert said(port, bytes(length), 10) == bytes(8) + b"1\n"


def test_an_impossible_time_is_the_second_and_it_goes_on(port: socket.socket) -> None:
    for name in (b"request1", b"request2"):
        assert said(port, guest.MOMENT.pack(bytes(32), 0, _NO_TIME, name), 10) == name + b"2\n"


def test_without_a_client_it_waits_for_the_next(port: socket.socket) -> None:
    port.shutdown(socket.SHUT_WR)
    assert said(port, b"", 3) == b"\n\n\n"


def test_it_is_the_same_each_time_and_small() -> None:
    assert moment.program() == moment.program()
    assert len(moment.program()) <= 1024


def test_a_disk_that_is_not_there_is_not_mounted(tmp_path: Path) -> None:
    path = tmp_path / "mounter"
    path.write_bytes(mounter.program())
    path.chmod(0o700)
    name = b"/dev/vd-none".ljust(guest.DISK_NAME_BYTES, b"\0")
    for given, reply in ((name * 2, b"2\n2\n"), (name[:9], b"1\n")):
        assert subprocess.run([path], input=given, capture_output=True, timeout=10, check=True).stdout == reply
    assert len(mounter.program()) <= 1024
