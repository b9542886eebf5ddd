"""Taking a guest's place on its bridge, to prove with traffic what passes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class ProbePort:
    """An interface named as a TAP would be, a port of `bridge` if one is given; behind it a host of its own.

    The host has `mac`, and `address` with `gateway` as its way out. `near_mac` is the near end's.
    """

    name: str
    bridge: str
    mac: str
    address: str = ""
    gateway: str = ""
    near_mac: str = ""


class Wire(Protocol):
    """The probe's end of a port, or an interface of the node that is listened to."""

    def send(self, frame: bytes) -> None:
        """Put a frame on it."""
        ...

    def heard(self) -> Sequence[bytes]:
        """What came by since it was last asked: into the probe, or out of the node; never what we sent ourselves."""
        ...


class Probing(Protocol):
    """Throwaway hosts on bridges, in the network namespace the node's worker lives in.

    Raises `Failed` (``network.failed``) with the kernel's words.
    """

    def attached(self, ports: Sequence[ProbePort], uplink: str) -> AbstractContextManager[Mapping[str, Wire]]:
        """Within it every port is up; a wire for each by its name, and one named `uplink` if that is not empty.

        What an earlier run left is removed first, and at the end nothing is left.
        """
        ...

    def reaches(self, address: str, port: int, seconds: float) -> bool:
        """Whether something answers when the node itself opens a TCP connection, be it by refusing it."""
        ...

    def wait(self, wires: Iterable[Wire], seconds: float) -> bool:
        """Wait until one of `wires` has heard something, `seconds` at most; whether one has."""
        ...
