"""The agent inside a guest."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from mvm.domain.commands import ExecPart, ExecResult
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

    `mac` is its card's; `address` is ``IP/PREFIX``; `machine_id` is 32 hex digits; `ssh_host_key` is dropbear's
    private form; `entropy` (64 bytes) reseeds the guest's RNG. With `data_disk` it must have one and mounts it; with
    `secrets` there are some on its disk of secrets, which it mounts at ``/run/secrets``.
    """

    hostname: str
    machine_id: str
    mac: str
    address: str
    gateway: str
    now: datetime
    ssh_host_key: bytes
    authorized_key: str
    entropy: bytes
    data_disk: bool = False
    secrets: bool = False


class Worker(StrEnum):
    """What the workload says of itself by the file ``/run/mvm/worker-*`` it last made; UNKNOWN if it made none."""

    READY = "ready"
    IDLE = "idle"
    BUSY = "busy"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class GuestStatus:
    """What tells how idle a guest is: counters since its boot, CPU in seconds and card in bytes, and the 1 min load.

    `cpu_s` is what all vCPUs spent on anything but waiting.
    """

    uptime_s: float
    worker: Worker
    cpu_s: float
    load: float
    rx_bytes: int
    tx_bytes: int


class GuestChannel(Protocol):
    """Talks to the agent in the guest of one instance through its directory.

    Every call has a deadline in seconds. Raises `GuestSilent` (``guest.silent``) when the guest does not answer in
    time, `GuestGone` (``guest.gone``) when its VMM has ended or was never started, and `GuestRefused`
    (``guest.refused``) when what it says is no answer. One caller speaks at a time; others wait their turn within
    their deadline.

    Who answers may be anybody: a tenant's root replaces the agent as it likes. So whatever comes ends in an answer or
    one of these three, it costs the caller a bounded amount of work, and what the host does to the VMM never hangs on
    it.
    """

    def hello(self, ref: InstanceRef, directory: Path, *, deadline_s: float) -> GuestHello:
        """Wait until the agent is there."""
        ...

    def configure(self, ref: InstanceRef, directory: Path, identity: GuestIdentity, *, deadline_s: float) -> None:
        """Give the guest its identity; returns once it has acknowledged all of it.

        Raises `GuestRefused` with the guest's words when it could not; ``missing`` in its fields lists
        the parts that were not acknowledged.
        """
        ...

    def status(self, ref: InstanceRef, directory: Path, *, deadline_s: float) -> GuestStatus:
        """What the guest does."""
        ...

    def settle(self, ref: InstanceRef, directory: Path, *, deadline_s: float) -> None:
        """Make a template's guest ready to be saved: small, but with what its clones need first in memory."""
        ...

    def prepare_sleep(self, ref: InstanceRef, directory: Path, *, deadline_s: float) -> None:
        """Make the guest small before it is saved; returns once its disks are synced, its caches dropped, and its
        secrets let go as `drop_secrets` does.

        Workloads are told by an executable ``/etc/mvm/sleep``, if the image has one, which may take its time.
        Raises `GuestRefused` when that fails.
        """
        ...

    def wake(
        self, ref: InstanceRef, directory: Path, *, now: datetime, entropy: bytes, secrets: bool, deadline_s: float
    ) -> None:
        """Tell a resumed guest the time and give it fresh entropy (64 bytes); with `secrets` it mounts them.

        Returns once it has everything.
        """
        ...

    def drop_secrets(self, ref: InstanceRef, directory: Path, *, deadline_s: float) -> None:
        """The guest overwrites what it has in memory of its disk of secrets, and unmounts it; may be repeated.

        Raises `GuestRefused`, and nothing has changed, while a process has a file open there.
        """
        ...

    def mount_secrets(self, ref: InstanceRef, directory: Path, *, deadline_s: float) -> None:
        """The guest mounts its disk of secrets; may be repeated."""
        ...

    def ping(self, ref: InstanceRef, directory: Path, *, deadline_s: float) -> float:
        """The guest's uptime in seconds."""
        ...

    def execute(self, ref: InstanceRef, directory: Path, command: str, *, deadline_s: float) -> ExecResult:
        """`run` it, and wait for all of it; of each stream the first MiB is kept."""
        ...

    def run(
        self, ref: InstanceRef, directory: Path, command: bytes, *, deadline_s: float
    ) -> Generator[ExecPart, None, None]:
        """Run `command` with the guest's ``sh -c`` as root: its output as it comes, and at last how it ended.

        It yields an empty part several times a second, whatever comes: that is when a caller who has gone is
        noticed. Closing the generator ends the command in the guest, and so does the deadline, which `ExecEnd` tells.
        Raises `TimedOut` (``guest.busy``) when until then others ran as many as the guest takes at once.
        """
        ...

    def shutdown(self, ref: InstanceRef, directory: Path, *, deadline_s: float) -> None:
        """Ask for a clean shutdown; returns once the guest has taken the request."""
        ...
