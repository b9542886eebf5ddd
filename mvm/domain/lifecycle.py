"""The instance's state machine: one table. Guards, hints and the docs' diagram are asked of it."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType

from mvm.errors import NotAllowed


class Status(StrEnum):
    """Resting places. What is in flight is a job, never a status."""

    CREATED = "created"
    READY = "ready"
    RUNNING = "running"
    WARM = "warm"
    SLEEPING = "sleeping"
    STOPPED = "stopped"
    DESTROYED = "destroyed"

    @property
    def has_vmm(self) -> bool:
        """Whether there is a VMM, whether its vCPUs run or stand still."""
        return self in (Status.RUNNING, Status.WARM)

    @property
    def is_up(self) -> bool:
        """Whether it counts as up: it goes on where it was, from memory or from what it sleeps in."""
        return self.has_vmm or self is Status.SLEEPING


class Verb(StrEnum):
    """What can be asked of an instance."""

    PREPARE = "prepare"
    START = "start"
    WARM = "warm"
    SLEEP = "sleep"
    WAKE = "wake"
    STOP = "stop"
    DESTROY = "destroy"


S, V = Status, Verb

TRANSITIONS: Mapping[tuple[Status, Verb], Status] = MappingProxyType(
    {
        (S.CREATED, V.PREPARE): S.READY,
        (S.CREATED, V.START): S.RUNNING,  # by way of ready
        (S.READY, V.START): S.RUNNING,
        (S.STOPPED, V.START): S.RUNNING,
        (S.WARM, V.START): S.RUNNING,  # as wake
        (S.SLEEPING, V.START): S.RUNNING,  # as wake; forced, from its disks alone
        (S.RUNNING, V.WARM): S.WARM,
        (S.WARM, V.WAKE): S.RUNNING,
        (S.WARM, V.SLEEP): S.SLEEPING,
        (S.RUNNING, V.SLEEP): S.SLEEPING,  # by way of warm
        (S.SLEEPING, V.WAKE): S.RUNNING,
        **{(s, V.STOP): S.STOPPED for s in (S.RUNNING, S.WARM, S.SLEEPING)},
        **{(s, V.DESTROY): S.DESTROYED for s in S if s is not S.DESTROYED},
    }
)


def allowed_verbs(status: Status) -> tuple[Verb, ...]:
    """What can be asked of an instance in `status`, in the order of `Verb`."""
    return tuple(verb for verb in Verb if (status, verb) in TRANSITIONS)


def landing(status: Status, verb: Verb, subject: object = "the instance") -> Status:
    """Where `verb` takes an instance that is `status`.

    Raises `NotAllowed` (``instance.invalid_transition``) with the allowed verbs as its hint.
    """
    to = TRANSITIONS.get((status, verb))
    if to is None:
        allowed = ", ".join(allowed_verbs(status)) or "nothing"
        raise NotAllowed(
            "instance.invalid_transition",
            f"{subject} is {status} and cannot {verb}",
            hint=f"allowed now: {allowed}",
            subject=str(subject),
            status=status.value,
            verb=verb.value,
        )
    return to
