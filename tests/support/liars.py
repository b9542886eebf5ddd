"""A guest's agent in Python, which can lie: real sockets in instances' directories, over a host in memory."""

from __future__ import annotations

import os
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from itertools import count, repeat
from pathlib import Path

from mvm import guest
from mvm.domain.ids import InstanceRef
from mvm.domain.layout import StateLayout
from mvm.domain.vmm import Ending
from mvm.drivers.clock import SystemClock
from mvm.drivers.fake import FakeHost
from mvm.drivers.fake.machines import FakeVmm
from mvm.drivers.fake.state import Machine
from mvm.drivers.instance_sockets import listen
from mvm.ports.vmm import BootSpec

_SHOTS = b"\n" * 65536


class Lie(StrEnum):
    """Ways in which an agent may answer. `PRETENDS` says yes to everything and does nothing."""

    REFUSES = "refuses"
    GARBAGE = "garbage"
    ENDLESS = "a reply without end"
    NEWLINES = "newlines without end"
    LINES = "lines without end"
    OTHER_TOKEN = "another's token"
    HUGE = "huge numbers"
    NAN = "not numbers"
    HALF = "half a line"
    NULS = "zero bytes"
    CLOSES = "hangs up"
    DRIPS = "a byte at a time"
    STALE = "stale answers"
    BINARY = "binary"
    SILENT = "nothing"
    PRETENDS = "yes, and does nothing"
    BEGINS = "begins without end"
    OLDER = "an older one's newlines"
    CRUMBS = "a byte a frame"


_PAUSE_S = {Lie.DRIPS: 0.02, Lie.OLDER: 0.0005}  # after each piece


def said(lie: Lie, token: str) -> Iterator[bytes]:
    """What a liar sends for the request `token`; the connection is closed after it only when it `CLOSES`."""
    mine = token.encode()
    match lie:
        case Lie.REFUSES:
            yield b"\n" + mine + b" 1 no, I will not\n"
        case Lie.GARBAGE:
            yield b"\n" + mine + b" % $(reboot) ;; \x1b[2J\n"
        case Lie.ENDLESS:
            yield b"\n" + mine + b" 0 "
            yield from repeat(b"x" * 65536)
        case Lie.NEWLINES:
            yield from repeat(_SHOTS)
        case Lie.LINES:
            yield from repeat(b"0 0 0\n" * 8192)
        case Lie.OTHER_TOKEN:
            yield b"\ndeadbeef 0 4 1.0 6.1\n"
        case Lie.HUGE:
            yield b"\n" + mine + b" 0" + (b" 1" + b"0" * 400) * 8 + b"\n"
        case Lie.NAN:
            yield b"\n" + mine + b" 0" + b" nan" * 8 + b"\n"
        case Lie.HALF:
            yield b"\n" + mine + b" 0 4 1"
        case Lie.NULS:
            yield from repeat(bytes(65536))
        case Lie.CLOSES | Lie.SILENT:
            return
        case Lie.DRIPS:
            for byte in b"\n" + mine + b" 0 " + b"x" * 100_000:
                yield bytes([byte])
        case Lie.STALE:
            for number in count():
                yield f"\n{number:08x} 0 4 1.0 6.1\n".encode() * 64
        case Lie.BINARY:
            while True:
                yield os.urandom(65536)
        case Lie.PRETENDS:
            yield b"\n" + mine + b" 0 " + " ".join(guest.CONFIGURE_STEPS).encode() + b"\n"
        case Lie.BEGINS:
            yield from repeat(guest.FRAME.pack(mine, guest.BEGUN, 0) * 4096)
        case Lie.OLDER:
            yield b"\n" + mine + b" 127 unknown request\n"
            yield from repeat(b"\n")
        case Lie.CRUMBS:
            yield guest.FRAME.pack(mine, guest.BEGUN, 0)
            yield from repeat((guest.FRAME.pack(mine, guest.STDOUT, 1) + b"x") * 4096)


class Agent:
    """The agent of one guest, honest until it is told to `lie`. `heard` counts what it has got rid of as it lied."""

    def __init__(self, directory: Path, end: Callable[[], None], heard: Callable[[int], None]) -> None:
        self.lie: Lie | None = None
        self._heard = heard
        self._end = end
        self._over = threading.Event()
        self._listeners = [listen(directory, name) for name in guest.PORTS]
        for name, listener in zip(guest.PORTS, self._listeners, strict=True):
            threading.Thread(target=self._serve, args=(name, listener), daemon=True).start()

    def close(self) -> None:
        self._over.set()
        for listener in self._listeners:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()

    def _serve(self, port: str, listener: socket.socket) -> None:
        with suppress(OSError):
            while not self._over.is_set():
                with listener.accept()[0] as client, suppress(OSError, ValueError):
                    self._hear(port, client)

    def _hear(self, port: str, client: socket.socket) -> None:
        while data := client.recv(65536):
            clock = port == guest.CLOCK
            token = "" if clock else data.split()[0].decode()
            mine = data[-guest.MOMENT_ID_BYTES :] if clock else token.encode()
            if self.lie is None:
                self._answer(clock, client, mine, data.decode(errors="replace").split()[1:2])
                continue
            if clock and self.lie is Lie.PRETENDS:
                client.sendall(mine + b"0\n")
                continue
            for piece in said(self.lie, token or "moment"):
                self._heard(client.send(piece.replace(b"moment", mine) if clock else piece))
                if self.lie in _PAUSE_S and self._over.wait(_PAUSE_S[self.lie]):
                    return
            if self.lie is Lie.CLOSES:
                return

    def _answer(self, clock: bool, client: socket.socket, mine: bytes, verb: list[str]) -> None:
        words = {
            "hello": f" 0 {guest.PROTOCOL_VERSION} 1.0 6.1",
            "ping": " 0 1.0",
            "status": " 0 1.0 unknown 0 0.0 0 0",
            "configure": " 0 " + " ".join(guest.CONFIGURE_STEPS),
        }
        client.sendall(mine + b"0\n" if clock else b"\n" + mine + words.get(verb[0], " 0").encode() + b"\n")
        if verb == ["shutdown"] and not clock:
            self._end()


class _Vmm(FakeVmm):
    _host: SocketHost

    def _start(self, spec: BootSpec, *, paused: bool = False) -> Machine:
        machine = super()._start(spec, paused=paused)
        self._host.open_agent(spec.ref, spec.directory)
        return machine


class SocketHost(FakeHost):
    """A host in memory whose guests' agents listen on real sockets below `root`."""

    def __init__(self, root: Path) -> None:
        super().__init__(SystemClock())
        self.layout = StateLayout(root)
        self.agents: dict[InstanceRef, Agent] = {}
        self.liars: dict[InstanceRef, Lie] = {}
        self.heard: Counter[InstanceRef] = Counter()
        self.vmm = _Vmm(self)

    def open_agent(self, ref: InstanceRef, directory: Path) -> None:
        """Its VMM starts."""
        directory.mkdir(parents=True, exist_ok=True)
        agent = self.agents[ref] = Agent(
            directory, lambda: self.kill_process(ref), lambda count: self.heard.update({ref: count})
        )
        agent.lie = self.liars.get(ref)

    def lie(self, ref: InstanceRef, how: Lie | None) -> None:
        """Its agent lies from now on, or no more."""
        if how is None:
            self.liars.pop(ref, None)
        else:
            self.liars[ref] = how
        if ref in self.agents:
            self.agents[ref].lie = how

    def end_process(self, ref: InstanceRef, how: Ending) -> None:
        """As on any fake host; whoever spoke to its agent is cut off."""
        super().end_process(ref, how)
        agent = self.agents.pop(ref, None)
        if agent is not None:
            agent.close()


@contextmanager
def socket_host(root: Path) -> Iterator[SocketHost]:
    """Its agents end with the block."""
    host = SocketHost(root)
    try:
        yield host
    finally:
        for ref in list(host.agents):
            host.kill_process(ref)
