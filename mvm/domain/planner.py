"""What to do so that a pool has what was asked of it. Pure: values in, values out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mvm.domain.ids import InstanceRef, PoolRef
from mvm.domain.instance import Instance
from mvm.domain.lifecycle import Status, Verb
from mvm.domain.pool import WorkerPool


@dataclass(frozen=True, slots=True)
class Create:
    """Create `count` instances in `pool` and start them."""

    pool: PoolRef
    count: int


@dataclass(frozen=True, slots=True)
class Request:
    """Ask `verb` of one instance."""

    ref: InstanceRef
    verb: Verb


Action = Create | Request

_STARTABLE = (Status.STOPPED, Status.READY, Status.CREATED)  # in the order they are taken
_UP = (Status.SLEEPING, Status.WARM, Status.RUNNING)  # in the order they are stopped: the coldest first


def plan(pool: WorkerPool, observed: Sequence[Instance]) -> tuple[Action, ...]:
    """Actions that move `observed` toward `pool.desired`. Empty means converged.

    An instance with a job in flight is counted where it will land, so a second pass adds nothing, and is left
    alone. Warm and sleeping ones count as running: the sleep policy put them there, and they wake when somebody asks.
    What exists is started before more is created, oldest first; of too many the coldest are stopped, newest first.
    """
    if pool.desired is None:
        return ()
    free = sorted((i for i in observed if i.in_flight is None), key=lambda i: (i.created_at, i.ref))
    missing = pool.desired.running - sum(i.lands_on in _UP for i in observed)
    if missing < 0:
        up = sorted((i for i in reversed(free) if i.status in _UP), key=lambda i: _UP.index(i.status))
        surplus = up[:-missing]
        return tuple(Request(i.ref, Verb.STOP) for i in surplus)
    startable = sorted((i for i in free if i.status in _STARTABLE), key=lambda i: _STARTABLE.index(i.status))[:missing]
    starts: tuple[Action, ...] = tuple(Request(i.ref, Verb.START) for i in startable)
    create = missing - len(startable)
    return (*starts, Create(pool.ref, create)) if create else starts
