"""Guests reached over their network by somebody who stays: pings, and logins, without a process in their namespace.

Run as a program with a namespace, an address and a port, it carries its streams there: ssh's ``ProxyCommand``.
"""

from __future__ import annotations

import os
import selectors
import shlex
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

from mvm.domain.layout import StateLayout
from mvm.drivers.netns import entered, path_of, socket_in

_ANSWER_S = 20.0  # on a machine that has much else to do
_PAUSE_S = 0.2
_LOGIN_PAUSE_S = 1.0  # on an emulated CPU each takes a good part of a second
_ROOT = Path(__file__).parents[2]
_HEAD = 20  # bytes of an IP packet before its content


@dataclass
class Reached:
    """What went well, how often, and what did not."""

    pings: int = 0
    logins: int = 0
    failures: list[str] = field(default_factory=list)


@contextmanager
def reaching(namespace: str, layout: StateLayout, guests: Sequence[tuple[str, str]]) -> Iterator[Reached]:
    """Within the block each of `guests`, a ref and an address, is pinged and logged in to, again and again."""
    seen, over = Reached(), threading.Event()

    def again(what: str, act: Callable[[], None], pause_s: float) -> None:
        while not over.wait(pause_s):
            try:
                act()
            except (OSError, AssertionError, subprocess.SubprocessError) as error:
                seen.failures.append(f"{what}: {error}")
            else:
                setattr(seen, what, getattr(seen, what) + 1)

    with ExitStack() as stack:
        threads = []
        for ref, address in guests:
            with entered(path_of(namespace)):
                card = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP))
            threads.append(threading.Thread(target=again, args=("pings", _Pinger(card, address), _PAUSE_S)))
            login = _Login(namespace, layout, ref, address)
            threads.append(threading.Thread(target=again, args=("logins", login, _LOGIN_PAUSE_S)))
        for thread in threads:
            thread.start()
        try:
            yield seen
        finally:
            over.set()
            for thread in threads:
                thread.join()


class _Pinger:
    def __init__(self, card: socket.socket, address: str) -> None:
        self._card = card
        self._address = address
        card.settimeout(_ANSWER_S)

    def __call__(self) -> None:
        sign = os.urandom(16)
        head = struct.pack("!BBHHH", 8, 0, 0, 1, 1)
        request = head[:2] + struct.pack("!H", _checksum(head + sign)) + head[4:] + sign
        self._card.sendto(request, (self._address, 0))
        end = monotonic() + _ANSWER_S
        while sign not in self._card.recv(2048)[_HEAD:]:
            assert monotonic() < end, "no answer among others'"


def _checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~(total + (total >> 16)) & 0xFFFF


class _Login:
    def __init__(self, namespace: str, layout: StateLayout, ref: str, address: str) -> None:
        instance = ref.split("/")[2]
        through = shlex.join([sys.executable, "-m", "tests.support.reach", namespace, address, "22"])
        options = {
            "ProxyCommand": through, "IdentitiesOnly": "yes", "StrictHostKeyChecking": "yes", "LogLevel": "ERROR",
            "UserKnownHostsFile": str(layout.instances / ref / "known_hosts"), "HostKeyAlias": instance,
        }  # fmt: skip
        flags = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        self._argv = ["ssh", "-i", str(layout.ssh_key), *flags, f"root@{address}", "hostname"]
        self._expected = f"{instance}\n"

    def __call__(self) -> None:
        done = subprocess.run(
            self._argv, capture_output=True, text=True, timeout=_ANSWER_S, check=False, cwd=_ROOT,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.stdout == self._expected, (done.returncode, done.stdout, done.stderr)


def carry(namespace: str, address: str, port: int) -> None:
    """Our streams, to and from there."""
    with socket_in(path_of(namespace), socket.AF_INET, socket.SOCK_STREAM) as there:
        there.connect((address, port))
        waiting = selectors.DefaultSelector()
        waiting.register(0, selectors.EVENT_READ, (lambda: os.read(0, 65536), there.sendall))
        waiting.register(there, selectors.EVENT_READ, (lambda: there.recv(65536), lambda data: os.write(1, data)))
        while True:
            for key, _ in waiting.select():
                read, write = key.data
                data = read()
                if not data:
                    return
                write(data)


if __name__ == "__main__":
    carry(sys.argv[1], sys.argv[2], int(sys.argv[3]))
