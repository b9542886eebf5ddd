"""How much of the kernel's table of connections guests can fill, tried from their places."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

from mvm.domain import frames
from mvm.domain.addressing import METADATA
from mvm.domain.egress import Egress
from mvm.domain.isolation import OUTSIDE
from mvm.domain.probes import PORT, Party
from mvm.drivers import netns
from mvm.drivers.netlink import ACK, REQUEST, Line, frame
from tests.support.apart import Trial

FLOWS = 256  # a tenant's share here
MANY = 60  # flows that need no tracking
_COUNT = Path("/proc/sys/net/netfilter/nf_conntrack_count")
_NETFILTER, _DELETE = 12, 1 << 8 | 2  # no tuple given: all of the namespace


def forget() -> None:
    """The thread's namespace has no connection in the table."""
    Line(_NETFILTER).ask(frame(_DELETE, 1, REQUEST | ACK, struct.pack("!BBH", 0, 0, 0)), 1)


def known() -> int:
    """How many it has."""
    return int(_COUNT.read_text())


def tracked(trial: Trial) -> list[dict[str, Any]]:
    """As the rows of probes: for each thing that guests can do often, whether it takes no more than its share."""
    party = trial.parties[0]
    assert party.policies[0][1].kind is Egress.NAT, "it has a way out"
    ports = trial.node.networks.plan.host_ports
    tries: dict[str, tuple[int, Callable[[], None]]] = {
        "flows within, by udp": (0, lambda: _within(trial, party, "udp")),
        "flows within, by tcp": (0, lambda: _within(trial, party, "tcp")),
        "pings of the gateway": (0, lambda: _pings(trial, party)),
    }
    rows = [_row(kind, limit, _counted(send)) for kind, (limit, send) in tries.items()]
    for each in trial.parties:
        if each.policies[0][1].kind is not Egress.NONE:
            rows.append(_row("flows to the outside", FLOWS, _counted(partial(outwards, trial, each, 2 * FLOWS))))
    for kind, address, port in (
        ("connections to metadata", METADATA, 80),
        *(("connections to a host's port", party.one.network.gateway, each.port) for each in ports),
    ):
        with _conversations(trial, party, address, port):
            rows.append(_row(kind, 0, known()))
    forget()
    for wire in trial.wires.values():  # full of these, they would not hear what comes next
        while wire.heard():
            pass
    return rows


def _row(kind: str, limit: int, count: int) -> dict[str, Any]:
    ok = count <= limit + MANY // 2  # others' few in the same namespace
    return {"kind": kind, "source": "t0", "target": f"{limit} tracked", "seen": f"{count} tracked", "ok": ok}


def _counted(send: Callable[[], None]) -> int:
    forget()
    send()
    return known()


def _within(trial: Trial, party: Party, kind: str) -> None:
    """Both ends with changing ports, as two guests that mirror each other."""
    a, b = party.one, party.two
    for number in range(MANY):
        for one, other, sport, port in ((a, b, 30_000 + number, PORT), (b, a, PORT, 30_000 + number)):
            packet = (
                frames.udp(one.ip, other.ip, b"mirrored", port=port, sport=sport)
                if kind == "udp"
                else frames.tcp(one.ip, other.ip, number, port=port, sport=sport)
            )
            trial.wires[one.wire].send(frames.ethernet(other.mac, one.mac, frames.IP, packet))


def _pings(trial: Trial, party: Party) -> None:
    a = party.one
    for number in range(MANY):
        packet = frames.echo(a.ip, a.network.gateway, b"ping", ident=1000 + number)
        trial.wires[a.wire].send(a.by_gateway(packet))


def outwards(trial: Trial, party: Party, count: int) -> None:
    """So many flows by the uplink, to where the tenant's policy lets everything."""
    a, policy = party.one, party.policies[0][1]
    to = next((each.network[0] for each in policy.allow if each.port is None), OUTSIDE)
    for number in range(count):
        packet = frames.udp(a.ip, to, b"outward", port=PORT, sport=1024 + number)
        trial.wires[a.wire].send(a.by_gateway(packet))


@contextmanager
def _conversations(trial: Trial, party: Party, address: IPv4Address, port: int) -> Iterator[None]:
    """Within it many connections to the host are open, over which it has said something."""
    home = next(
        path for name in trial.node.probe_names() if str(party.one.ip) in _addresses(path := netns.path_of(name))
    )
    with ExitStack() as stack:
        ear = stack.enter_context(socket.socket())
        ear.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        ear.bind((str(address), port))
        ear.listen(MANY)
        forget()
        speaking = threading.Thread(target=_speak, args=(ear, stack))
        speaking.start()
        try:
            for _ in range(MANY):
                client = stack.enter_context(netns.socket_in(home, socket.AF_INET, socket.SOCK_STREAM))
                client.settimeout(0.5)
                client.connect((str(address), port))
                client.recv(1)
        except TimeoutError:
            pass  # who is not let in takes nothing either; the other probes tell
        finally:
            ear.shutdown(socket.SHUT_RDWR)
            speaking.join()
        yield


def _speak(ear: socket.socket, stack: ExitStack) -> None:
    with suppress(OSError):  # it is shut
        while True:
            connection, _ = ear.accept()
            stack.callback(connection.close)
            connection.sendall(b"x")


def _addresses(home: Path) -> set[str]:
    with netns.entered(home):
        from mvm.drivers.linux_network import LinuxNetwork
        from mvm.drivers.shell import LocalShell

        return set(LinuxNetwork(LocalShell()).addresses())
