"""The agent inside a guest."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

from mvm.domain.ids import InstanceRef


@dataclass(frozen=True, slots=True)
class GuestHello:
    """What a guest agent says of itself when it is ready."""

    version: int
    uptime_s: float
    kernel: str


@dataclass(frozen=True, slots=True)
class GuestIdentity:
    """What makes a booted guest this instance. The keys never appear in arguments or logs.

    `address` is ``IP/PREFIX``; `ssh_host_key` is dropbear's private form, `entropy` reseeds the guest's RNG.
    """

    hostname: str
    address: str
    gateway: str
    now: datetime
    ssh_host_key: bytes
    authorized_key: str
    entropy: bytes


@dataclass(frozen=True, slots=True)
class ExecResult:
    """A command that ran in a guest; `truncated` when a stream was longer than the guest keeps (1 MiB)."""

    exit_code: int
    stdout: bytes
    stderr: bytes
    truncated: bool = False


class GuestChannel(Protocol):
    """Talks to the agent in the guest of one instance through its directory.

    Every call has a deadline in seconds. Raises `TimedOut` (``guest.silent``) when the guest does not answer in
    time and `Unreachable` (``guest.gone``) when its VMM has ended or was never started. One caller speaks at a
    time; others wait their turn within their deadline.
    """

    def hello(self, ref: InstanceRef, directory: Path, *, deadline_s: float) -> GuestHello:
        """Wait until the agent is there."""
        ...

    def configure(self, ref: InstanceRef, directory: Path, identity: GuestIdentity, *, deadline_s: float) -> None:
        """Give the guest its identity; returns once it has acknowledged all of it.

        Raises `Failed` (``guest.refused``) with the guest's words when it could not.
        """
        ...

    def ping(self, ref: InstanceRef, directory: Path, *, deadline_s: float) -> float:
        """The guest's uptime in seconds."""
        ...

    def execute(self, ref: InstanceRef, directory: Path, command: str, *, deadline_s: float) -> ExecResult:
        """Run `command` with the guest's ``sh -c`` as root; past the deadline the guest ends it."""
        ...

    def shutdown(self, ref: InstanceRef, directory: Path, *, deadline_s: float) -> None:
        """Ask for a clean shutdown; returns once the guest has taken the request."""
        ...
