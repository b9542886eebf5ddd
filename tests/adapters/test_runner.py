"""The guest's program ``runner``, run here: a socket pair is its port."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mvm import guest
from mvm.drivers.builtin import runner
from tests.support.waiting import until

TOKEN = b"0123abcd"
PAST_LIMIT = 300_000  # bytes, more than a request may have


@dataclass
class Port:
    """The host's end."""

    sock: socket.socket
    said: bytearray = field(default_factory=bytearray)

    def ask(self, command: bytes, token: bytes = TOKEN) -> None:
        letters = b"".join(bytes((97 + (byte >> 4), 97 + (byte & 15))) for byte in command)
        self.sock.sendall(b"\n" + token + b" run " + letters + b" .\n")

    def frame(self, token: bytes = TOKEN) -> tuple[bytes, bytes]:
        """Kind and payload of the next one."""
        while True:
            at = self.said.find(token)
            if at >= 0 and len(self.said) >= at + guest.FRAME.size:
                _, kind, size = guest.FRAME.unpack_from(self.said, at)
                end = at + guest.FRAME.size + size
                if len(self.said) >= end:
                    payload = bytes(self.said[end - size : end])
                    del self.said[:end]
                    return kind, payload
            data = self.sock.recv(65536)
            assert data, "the runner has ended"
            self.said += data

    def result(self, command: bytes, token: bytes = TOKEN) -> tuple[int, bytes, bytes]:
        """The status as ``wait`` tells it, and both streams."""
        self.ask(command, token)
        assert self.frame(token) == (guest.BEGUN, b"")
        streams = {guest.STDOUT: b"", guest.STDERR: b""}
        while True:
            kind, payload = self.frame(token)
            if kind == guest.ENDED:
                return guest.STATUS.unpack(payload)[0], streams[guest.STDOUT], streams[guest.STDERR]
            assert payload
            streams[kind] += payload


@pytest.fixture
def port(tmp_path: Path) -> Iterator[Port]:
    program = tmp_path / "runner"
    program.write_bytes(runner.program(b"/nowhere/"))  # without control groups
    program.chmod(0o755)
    ours, theirs = socket.socketpair()
    with ours, theirs, subprocess.Popen([program], stdin=theirs, env={"PATH": os.environ["PATH"], "A": "b"}) as process:
        theirs.close()
        ours.settimeout(60)
        yield Port(ours)
        process.kill()


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (b"true", (0, b"", b"")),
        (b"echo out; echo err >&2; exit 7", (7 << 8, b"out\n", b"err\n")),
        (b"kill -9 $$", (9, b"", b"")),
        (b"sleep 50 & echo $A; exit 3", (3 << 8, b"b\n", b"")),
        (b"umask; cat", (0, b"0022\n", b"")),
        (b"printf '\xff\\0'", (0, b"\xff\0", b"")),
        (b"head -c 200000 /dev/zero", (0, bytes(200_000), b"")),
        (b": " + b"x" * 90_000 + b"; echo long", (0, b"long\n", b"")),
    ],
)
def test_what_comes_of_a_command(port: Port, command: bytes, expected: tuple[int, bytes, bytes]) -> None:
    assert port.result(command) == expected
    assert port.result(b"echo again", b"76543210") == (0, b"again\n", b"")


@pytest.mark.parametrize(
    "left", [b"x", b"\n", b" .\n" * 9, b"\n0123abcd run ab", b"\n0123abcd walk abab .\n", b"x" * PAST_LIMIT + b"\n"]
)
def test_what_others_left_does_no_harm(port: Port, left: bytes) -> None:
    port.sock.sendall(left)
    assert port.result(b"echo well") == (0, b"well\n", b"")


def test_another_request_takes_the_place_of_the_first(port: Port, tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    port.ask(f"echo $$ >{alive}; sleep 77 & wait".encode())
    assert port.frame() == (guest.BEGUN, b"")
    until(lambda: alive.exists() and alive.read_text().strip(), 60, "it runs")
    assert port.result(b"echo second", b"76543210") == (0, b"second\n", b"")
    assert not Path(f"/proc/{alive.read_text().strip()}").exists()


def test_output_waits_for_its_reader(port: Port) -> None:
    """All of it comes; the other stream may overtake what is still on its way."""
    assert port.result(b"head -c 3000000 /dev/zero; echo done >&2") == (0, bytes(3_000_000), b"done\n")
