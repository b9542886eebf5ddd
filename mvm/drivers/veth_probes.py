"""Probes at the ends of veth pairs, each in a network namespace of its own; spoken to through packet sockets."""

from __future__ import annotations

import json
import select
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from mvm.drivers import netns
from mvm.errors import Failed
from mvm.ports.probing import ProbePort, Wire
from mvm.ports.shell import Shell

_ETH_P_ALL = 0x0003
_OUTGOING = 4  # a packet socket's word for what leaves by its interface
_LONGEST = 65_536
_FAR = "eth0"


class PacketWire:
    """One interface; with `leaving`, what the node sends out by it, else what arrives."""

    def __init__(self, namespace: Path | None, interface: str, *, leaving: bool = False) -> None:
        self._socket = netns.socket_in(namespace, socket.AF_PACKET, socket.SOCK_RAW)
        self._socket.bind((interface, _ETH_P_ALL))
        self._socket.setblocking(False)
        self._leaving = leaving

    def fileno(self) -> int:
        """For `select`."""
        return self._socket.fileno()

    def send(self, frame: bytes) -> None:
        """See ports/probing.py."""
        self._socket.send(frame)

    def heard(self) -> Sequence[bytes]:
        """See ports/probing.py."""
        frames: list[bytes] = []
        while True:
            try:
                data, address = self._socket.recvfrom(_LONGEST)
            except BlockingIOError:
                return frames
            if (address[2] == _OUTGOING) is self._leaving:
                frames.append(data)

    def close(self) -> None:
        """It is not listened to any more."""
        self._socket.close()


class VethProbes:
    """ports/probing.py."""

    def __init__(self, shell: Shell) -> None:
        self._shell = shell

    @contextmanager
    def attached(self, ports: Sequence[ProbePort], uplink: str) -> Iterator[Mapping[str, Wire]]:
        """See ports/probing.py."""
        prefix = f"mvm-probe-{Path('/proc/thread-self/ns/net').stat().st_ino}-"
        names = {port.name for port in ports}
        for left in netns.names(prefix):
            netns.delete(self._shell, left)
        self._remove(names)
        with ExitStack() as stack:
            wires: dict[str, Wire] = {}
            near: list[str] = []
            try:
                for number, port in enumerate(ports):
                    name = f"{prefix}{number}"
                    stack.callback(netns.delete, self._shell, name)
                    netns.create(self._shell, name)
                    near += _near(port, name)
                stack.callback(self._remove, names)
                self._batch(near)
                for number, port in enumerate(ports):
                    name = f"{prefix}{number}"
                    self._batch(_far(port), name)
                    wires[port.name] = self._wire(stack, PacketWire(netns.path_of(name), _FAR))
                if uplink:
                    wires[uplink] = self._wire(stack, PacketWire(None, uplink, leaving=True))
            except (Failed, OSError) as error:
                raise Failed("network.failed", f"no probes: {error}", hint="see: mvm net verify") from None
            yield wires

    def reaches(self, address: str, port: int, seconds: float) -> bool:
        """See ports/probing.py."""
        with socket.socket() as sock:
            sock.settimeout(seconds)
            try:
                sock.connect((address, port))
            except ConnectionRefusedError:
                return True
            except OSError:
                return False
            return True

    def wait(self, wires: Iterable[Wire], seconds: float) -> bool:
        """See ports/probing.py."""
        poll = select.poll()
        for wire in wires:
            if isinstance(wire, PacketWire):
                poll.register(wire, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def _remove(self, names: set[str]) -> None:
        """Ends of pairs; the kernel takes its time with those in namespaces that were deleted."""
        listed = self._shell.run(["ip", "-j", "-d", "link", "show", "type", "veth"]).stdout
        there = {link["ifname"] for link in json.loads(listed or "[]") if link}
        lines = "".join(f"link del dev {name}\n" for name in sorted(names & there))
        with suppress(Failed):  # some have gone meanwhile, with their namespaces
            self._shell.run(["ip", "-force", "-batch", "-"], stdin=lines)

    def _wire(self, stack: ExitStack, wire: PacketWire) -> PacketWire:
        stack.callback(wire.close)
        return wire

    def _batch(self, commands: Sequence[str], namespace: str = "") -> None:
        where = ["-n", namespace] if namespace else []
        self._shell.run(["ip", *where, "-batch", "-"], stdin="\n".join(commands) + "\n")


def _near(port: ProbePort, namespace: str) -> list[str]:
    near_mac = f"address {port.near_mac} " if port.near_mac else ""
    master = f"master {port.bridge} " if port.bridge else ""
    return [
        f"link add {port.name} {near_mac}type veth peer name {_FAR} address {port.mac} netns {namespace}",
        f"link set dev {port.name} {master}addrgenmode none up",
    ]


def _far(port: ProbePort) -> list[str]:
    commands = [f"link set dev {_FAR} addrgenmode none up"]
    if port.address:
        commands.append(f"addr add {port.address} dev {_FAR}")
    if port.gateway:
        commands.append(f"route add default via {port.gateway}")
    return commands
