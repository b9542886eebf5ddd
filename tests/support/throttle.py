"""One tenant at full throttle, a resource at a time: ``python -m tests.support.throttle WHAT`` (see `main`).

A process of its own, so that it and whoever measures do not take turns in one interpreter. What it does ends after so
many seconds, or when its input is closed.
"""

from __future__ import annotations

import json
import select
import socket
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from ipaddress import IPv4Network
from pathlib import Path

from mvm.domain import frames
from mvm.domain.addressing import METADATA, TenantNetwork
from mvm.domain.ids import InstanceRef, NodeId
from mvm.domain.isolation import OUTSIDE
from mvm.domain.job import JobVerb
from mvm.domain.layout import StateLayout
from mvm.domain.probes import PORT, Stand
from mvm.drivers import netns
from mvm.drivers.packed import packed
from mvm.drivers.quic.client import open_connection
from mvm.drivers.quic.identity import Credentials, load_certificates
from mvm.drivers.veth_probes import PacketWire
from mvm.errors import MvmError
from mvm.wiring import Client, open_client
from tests.support.replaced import agent_replaced_by

BATCH = 64
STRANGER = "127.0.0.2"
INSIDE = {  # in the guest itself
    "processors": "while :; do :; done",
    "disk": "while :; do dd if=/dev/zero of=/root/filled bs=64k count=64 2>/dev/null; done",
    "console": "while :; do echo a line of nothing in particular; done >/dev/console",
}


class Throttle:
    """What one tenant does; each method of `ALL` yields after every piece of it."""

    def __init__(self, state_dir: Path, ref: InstanceRef, home: str, network: TenantNetwork, offset: int) -> None:
        self._layout = StateLayout(state_dir)
        self._ref = ref
        self._home = home
        self._network = network
        self._stand = Stand(network, offset)
        self.refused = 0

    def client(self) -> Client:
        return open_client(json.loads(self._layout.connection.read_text()), self._layout)

    def guest(self, command: str, seconds: float) -> Iterator[None]:
        """A loop in the guest, by way of one exec."""
        client = self.client()
        words = b64encode(f"timeout {seconds:.0f} sh -c '{command}'".encode()).decode()
        params = {"ref": str(self._ref), "command_b64": words, "deadline_s": seconds + 5}

        def ask() -> None:
            with suppress(MvmError):
                client.agents.call(_address(client), "instance.exec", params, deadline_s=seconds + 10)

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(0.1)
            yield

    def channel(self) -> Iterator[None]:
        """A guest that fills its control channel, and its tenant that asks for commands in it all the time."""
        client = self.client()

        def ask(command: str) -> bool:
            words = b64encode(command.encode()).decode()
            params = {"ref": str(self._ref), "command_b64": words, "deadline_s": 2.0}
            try:
                client.agents.call(_address(client), "instance.exec", params, deadline_s=5)
            except MvmError:
                return False
            return True

        ask(agent_replaced_by("yes ''"))
        while True:
            self.refused += not ask("true")
            yield

    def connections(self) -> Iterator[None]:
        """Flows with changing ports, within the tenant and to the outside."""
        a, b = self._stand, Stand(self._network, 3)
        with closing(PacketWire(netns.path_of(self._home), "eth0")) as wire:
            for number in range(1 << 30):
                port, sport = 1024 + number // 60_000 % 60_000, 1024 + number % 60_000
                mirrored = frames.udp(a.ip, b.ip, b"mirrored", port=port, sport=sport)
                _send(wire, frames.ethernet(b.mac, a.mac, frames.IP, mirrored))
                _send(wire, a.by_gateway(frames.udp(a.ip, OUTSIDE, b"outward", port=port, sport=sport)))
                if number % BATCH == 0:
                    yield

    def neighbours(self) -> Iterator[None]:
        """Everybody's address by way of the gateway, and its own gateway's pings."""
        a = self._stand
        with closing(PacketWire(netns.path_of(self._home), "eth0")) as wire:
            for number in range(1 << 30):
                other = a.network.ip(10 + number % 200)
                _send(wire, a.by_gateway(frames.udp(a.ip, other, b"anybody", port=PORT, sport=2000)))
                ping = frames.echo(a.ip, a.network.gateway, b"ping", ident=number % 65536)
                _send(wire, a.by_gateway(ping))
                if number % BATCH == 0:
                    yield

    def metadata(self) -> Iterator[None]:
        """Connections to the metadata service."""
        held: list[socket.socket] = []
        with ExitStack() as stack:
            while True:
                sock = netns.socket_in(netns.path_of(self._home), socket.AF_INET, socket.SOCK_STREAM)
                stack.callback(sock.close)
                sock.setblocking(False)
                with suppress(OSError):
                    sock.connect((str(METADATA), 80))
                held.append(sock)
                if len(held) > 4 * BATCH:
                    held.pop(0).close()
                time.sleep(0.002)  # the pace of a guest's kernel, not of this loop
                yield

    def handshakes(self) -> Iterator[None]:
        """A stranger in the stack's namespace that begins handshakes and ends none."""
        client = self.client()
        credentials = Credentials(load_certificates(self._layout.certs / "ca.pem"))
        inside = netns.path_of(client.connection["netns"])

        def make() -> socket.socket:
            sock = netns.socket_in(inside, socket.AF_INET, socket.SOCK_DGRAM)
            sock.bind((STRANGER, 0))
            return sock

        with ExitStack() as stack:
            while True:
                connection = stack.enter_context(closing(open_connection(_address(client), credentials, make)))
                with suppress(MvmError):
                    connection._exchange()
                    connection._exchange()
                yield

    def streams(self) -> Iterator[None]:
        """As many logs followed and commands run as it is let."""
        client, params = self.client(), {"ref": str(self._ref), "follow": True}
        words = {"ref": str(self._ref), "command_b64": b64encode(b"sleep 600").decode(), "deadline_s": 600.0}
        for _ in range(32):
            for method, given in (("instance.logs", params), ("instance.exec", words)):
                stream = client.agents.stream(_address(client), method, given, deadline_s=None)
                threading.Thread(target=_follow, args=(stream,), daemon=True).start()  # they end with the process
        while True:
            time.sleep(0.1)
            yield

    def jobs(self) -> Iterator[None]:
        """Jobs that fail at once: each is in the store, in Redis, in the audit trail and in the logs."""
        client = self.client()
        while True:
            client.jobs.submit(
                JobVerb.INSTANCE_WAKE, str(self._ref), NodeId(client.node_id), params={}, actor="throttle"
            )
            time.sleep(0.02)
            yield

    def documents(self) -> Iterator[None]:
        """Documents as large as they may be, of which nothing is right."""
        client = self.client()
        text = '{"schema_version": 1, "node_id": "n1", "tenants": [' + ",".join(["{}"] * 240_000) + "]}"
        params = {"document": packed(text.encode()), "prune": False}
        while True:
            with suppress(MvmError):
                client.agents.call(_address(client), "desired.plan", params, deadline_s=60)
            yield


def _address(client: Client) -> str:
    return str(client.connection["agent_address"])


def _follow(stream: Iterator[object]) -> None:
    with suppress(MvmError):  # refused
        for _ in stream:
            pass


def _send(wire: PacketWire, frame: bytes) -> None:
    with suppress(BlockingIOError):
        wire.send(frame)


ALL = (*INSIDE, "connections", "neighbours", "metadata", "handshakes", "streams", "jobs", "documents", "channel")


def main() -> None:
    """``WHAT SECONDS STATE_DIR REF HOME NET_ID SUBNET OFFSET``; prints ``begun``, and how many pieces it did."""
    what, seconds, state_dir, ref, home, net_id, subnet, offset = sys.argv[1:]
    network = TenantNetwork(int(net_id), IPv4Network(subnet))
    throttle = Throttle(Path(state_dir), InstanceRef.parse(ref), home, network, int(offset))
    work: Callable[[], Iterator[None]] = (
        (lambda: throttle.guest(INSIDE[what], float(seconds))) if what in INSIDE else getattr(throttle, what)
    )
    end, pieces = time.monotonic() + float(seconds), 0
    print("begun", flush=True)
    with closing(work()) as going:  # type: ignore[type-var]
        for _ in going:
            pieces += 1
            if time.monotonic() > end or select.select([sys.stdin], [], [], 0)[0]:
                break
    if what == "channel" and not throttle.refused:
        sys.exit("the guest answered every command: its channel was not filled")
    print(pieces, flush=True)


if __name__ == "__main__":
    main()
