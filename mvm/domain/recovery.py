"""What becomes of an instance whose job will not be done to its end: completed or undone, never left between."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from mvm.domain.lifecycle import Status, Verb


class Act(StrEnum):
    """What brings an instance to rest."""

    KEEP = "keep"
    TAKE_DOWN = "take down"
    PUT_BACK = "put back to sleep"
    PAUSE = "pause"
    RESUME = "resume"


class Rest(NamedTuple):
    """An act, and the status that it leads to."""

    act: Act
    status: Status


def settled(status: Status, verb: Verb, *, process: bool, snapshot: bool) -> Rest:
    """How an instance recorded as `status`, left in the middle of `verb`, comes to rest.

    `process`: its VMM may be there; `snapshot`: it can be woken from one. Where neither is, the sweep of stale PIDs
    finds out. What has been shut down or saved is completed, everything else undone.
    """
    if verb in (Verb.STOP, Verb.DESTROY):
        return Rest(Act.TAKE_DOWN, Status.STOPPED)
    if status is Status.SLEEPING:
        return Rest(Act.PUT_BACK, status) if snapshot else Rest(Act.TAKE_DOWN, Status.STOPPED)
    if verb is Verb.SLEEP and not process and snapshot:
        return Rest(Act.PUT_BACK, Status.SLEEPING)
    if status is Status.WARM:
        return Rest(Act.PAUSE if process else Act.KEEP, status)
    if status is Status.RUNNING:
        return Rest(Act.RESUME if process else Act.KEEP, status)
    return Rest(Act.TAKE_DOWN, status)
