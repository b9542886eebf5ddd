"""How the instances of one pool come to its counts, to health and to its revision. Pure.

Every rule looks at where an instance will land and leaves those with a job alone, so that what was decided once is
not decided again while it is under way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass, field
from datetime import datetime

from mvm.domain.actions import Action, Create, Request, Why
from mvm.domain.ids import InstanceRef, PoolRef, Revision
from mvm.domain.instance import Instance
from mvm.domain.lifecycle import Status, Verb
from mvm.domain.pool import DesiredCounts, InstanceResources
from mvm.domain.room import Room

_STARTABLE = (Status.STOPPED, Status.READY, Status.CREATED)  # in the order they are taken
_UP = (Status.SLEEPING, Status.WARM, Status.RUNNING)  # in the order they are stopped: the coldest first


@dataclass(frozen=True, slots=True)
class PoolNeed:
    """What one pool needs. `max_unavailable` 0: a new revision comes with the next start, nothing is stopped for it."""

    ref: PoolRef
    counts: DesiredCounts
    shape: InstanceResources
    revision: Revision | None = None
    pinned: bool = False
    critical: bool = False
    max_unavailable: int = 0


@dataclass(frozen=True, slots=True)
class Scaled:
    """What to do, and what people should know of what is not done.

    `rolling` are how many keep another revision until health checks have found the new ones well.
    """

    actions: tuple[Action, ...] = ()
    remarks: tuple[str, ...] = ()
    rolling: int = 0


def scale(
    need: PoolNeed, observed: Sequence[Instance], room: Room, *, now: datetime,
    unhealthy: Set[InstanceRef] = frozenset(), sleepless: Set[InstanceRef] = frozenset(),
    unproven: Set[InstanceRef] = frozenset(),
) -> Scaled:  # fmt: skip
    """Actions that move `observed` toward `need` within `room`, which they use up. None means converged.

    What exists is started before more is created, oldest first, and one that is being stopped is waited for. Of too
    many the coldest are stopped, newest first. A pinned pool's instances are never put away or stopped; those of a
    critical one are only started when they are down by nobody's wish, and created when they are missing. An instance
    that a person has changed is left alone until its time is over; it takes one of the places that the counts give.
    """
    alive = sorted(
        (each for each in observed if each.lands_on is not Status.DESTROYED), key=lambda i: (i.created_at, i.ref)
    )
    if need.critical:
        return _first_fill(need, alive, room, now)
    return _Scaling(need, alive, room, now, unhealthy, sleepless, unproven).decide()


def proving(revisions: Mapping[PoolRef, Revision | None], instances: Collection[Instance]) -> tuple[Instance, ...]:
    """Those that run with their pool's revision while others of the pool are still up with another: a check that they
    pass is what a rollout goes on by.
    """
    rolling = {i.ref.pool_ref for i in instances if i.status.is_up and i.revision != revisions.get(i.ref.pool_ref)}
    if not rolling:
        return ()
    return tuple(
        i for i in instances
        if i.ref.pool_ref in rolling and i.status is Status.RUNNING and i.revision == revisions.get(i.ref.pool_ref)
    )  # fmt: skip


def _first_fill(need: PoolNeed, alive: Sequence[Instance], room: Room, now: datetime) -> Scaled:
    """Create what is missing, and start what is down by nobody's wish: it never ran, or its guest or host has ended."""
    up = sum(each.lands_on.is_up for each in alive)
    fallen = [each for each in alive if each.status in _STARTABLE and not _was_stopped(each)]
    free = [
        each for each in fallen
        if not each.in_flight and not (each.manual_override_until and each.manual_override_until > now)
    ]  # fmt: skip
    wanted = free[: max(0, need.counts.total - up)]
    starts = [each for each in wanted if room.run(need.shape)]
    missing = max(0, need.counts.total - len(alive))
    count = _admitted(need, missing, room)
    actions: list[Action] = [Request(each.ref, Verb.START, each.status, Why.TOO_FEW) for each in starts]
    if count:
        actions.append(Create(need.ref, count))
    down = sum(_was_stopped(each) and each.in_flight is None for each in alive)
    stays = min(down, need.counts.total - up - len(starts) - missing)
    remarks = [f"{stays} are stopped, and stay: the pool is critical"] if stays > 0 else []
    return Scaled(tuple(actions), (*remarks, *_no_room(missing - count + len(wanted) - len(starts))))


def _was_stopped(instance: Instance) -> bool:
    return instance.status is Status.STOPPED and instance.last_error is None


def _admitted(need: PoolNeed, wanted: int, room: Room) -> int:
    count = 0
    while count < wanted and room.add(need.ref, need.shape):
        count += 1
    return count


def _no_room(missing: int) -> tuple[str, ...]:
    return (f"{missing} more cannot start: no room in the tenant's quota",) if missing > 0 else ()


@dataclass(slots=True)
class _Scaling:
    need: PoolNeed
    alive: Sequence[Instance]  # oldest first
    room: Room
    now: datetime
    unhealthy: Set[InstanceRef]
    sleepless: Set[InstanceRef]
    unproven: Set[InstanceRef]
    actions: list[Action] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    held: set[InstanceRef] = field(default_factory=set)  # a person has changed these
    free: dict[InstanceRef, Instance] = field(default_factory=dict)  # that may be asked, oldest first
    have: Counter[Status] = field(default_factory=Counter)  # how many land in each place
    wanted: Counter[Status] = field(default_factory=Counter)
    settled: int = 0  # up, well as far as a rollout has to know, and not going away
    returning: int = 0  # on their way to where they can be started
    blocked: int = 0  # should run, and there is no room for
    rolling: int = 0  # keep another revision until new ones have passed a health check

    def decide(self) -> Scaled:
        counts = self.need.counts
        self.wanted = Counter({Status.RUNNING: counts.running})
        if counts.exact:
            self.wanted += Counter({Status.WARM: counts.warm or 0, Status.SLEEPING: counts.sleeping or 0})
        self._count()
        self._rouse()
        self._stop_surplus()
        self._roll()
        self._start()
        if counts.exact and not self.need.pinned:
            self._put_away()
        self.remarks += _no_room(self.blocked)
        return Scaled(tuple(self.actions), tuple(self.remarks), self.rolling)

    def _place(self, status: Status) -> Status:
        """Which of the places a status is in: with one count for all that are up, they are one place."""
        return status if self.need.counts.exact else Status.RUNNING

    def _missing(self, *places: Status) -> int:
        return sum(self.wanted[place] - self.have[place] for place in places or _UP)

    def _ask(self, instance: Instance, verb: Verb, why: Why) -> None:
        self.actions.append(Request(instance.ref, verb, instance.status, why))
        del self.free[instance.ref]

    def _free(self, *statuses: Status) -> list[Instance]:
        return [each for each in self.free.values() if each.status in statuses]

    def _count(self) -> None:
        held = [each for each in self.alive if each.manual_override_until and each.manual_override_until > self.now]
        for each in sorted(held, key=lambda i: not i.lands_on.is_up):
            self._give_place(each)
        self.held = {each.ref for each in held}
        sick: list[Instance] = []
        for each in self.alive:
            if each.ref in self.held:
                continue
            lands = each.lands_on
            if each.in_flight is None:
                self.free[each.ref] = each
                if each.ref in self.unhealthy and not self.need.pinned:
                    sick.append(each)
                    continue
            elif lands in _STARTABLE:
                self.returning += 1
            if lands.is_up:
                self.have[self._place(lands)] += 1
                self.settled += self._is_settled(each)
        for each in sick:
            self._ask(each, Verb.STOP, Why.UNHEALTHY)
            self.returning += 1

    def _give_place(self, held: Instance) -> None:
        """It takes a place where it is, or else another one."""
        lands = held.lands_on
        places = ([self._place(lands)] if lands.is_up else []) + list(reversed(_UP))
        place = next((place for place in places if self.wanted[place] > 0), None)
        if place is not None:
            self.wanted[place] -= 1
            self.settled += lands.is_up and self._is_settled(held)

    def _is_settled(self, instance: Instance) -> bool:
        return instance.status.is_up and instance.ref not in self.unproven

    def _rouse(self) -> None:
        """What sleeps or is warm beyond its count fills places that are hotter."""
        hotter = self._missing(Status.RUNNING, Status.WARM)
        self._wake(Status.SLEEPING, min(hotter, -self._missing(Status.SLEEPING)))
        self._wake(Status.WARM, min(self._missing(Status.RUNNING), -self._missing(Status.WARM)))

    def _wake(self, status: Status, count: int) -> None:
        for done, each in enumerate(self._free(status)[: max(0, count)]):
            if not self.room.run(self.need.shape, from_memory=status is Status.WARM):
                self.blocked += count - done
                return
            self._ask(each, Verb.WAKE, Why.TOO_FEW)
            self.have[self._place(status)] -= 1
            self.have[Status.RUNNING] += 1

    def _stop_surplus(self) -> None:
        surplus = -self._missing()
        if surplus <= 0:
            return
        if self.need.pinned:
            self.remarks.append(f"{surplus} too many are up, and stay: the pool is pinned")
            return
        up = reversed(self._free(*_UP))
        for each in sorted(up, key=lambda i: (_UP.index(i.status), i.revision == self.need.revision)):
            place = self._place(each.status)
            if surplus > 0 and self.have[place] > self.wanted[place]:
                self._ask(each, Verb.STOP, Why.TOO_MANY)
                self.have[place] -= 1
                self.settled -= self._is_settled(each)
                surplus -= 1

    def _roll(self) -> None:
        """Stop some that have another revision; they start again with the pool's. Not while a new one is not well."""
        revision = self.need.revision
        if revision is None or not self.need.max_unavailable:
            return
        old = [each for each in self._free(*_UP) if each.revision != revision]
        if not old:
            return
        failed = [each.ref for each in self.alive if each.revision == revision and self._is_failed(each)]
        if failed or self.need.pinned:
            why = f"{failed[0].instance} with the new revision is not well" if failed else "the pool is pinned"
            self.remarks.append(f"{len(old)} keep another revision: {why}")
            return
        unavailable = max(0, self.need.counts.total - self.settled)
        now = old[: max(0, self.need.max_unavailable - unavailable)]
        waited = [each.ref for each in self.alive if each.ref in self.unproven]
        if waited and not now:
            self.rolling = len(old)
            why = f"until {waited[0].instance} with the new one has passed a health check"
            self.remarks.append(f"{len(old)} keep another revision {why}")
        for each in now:
            self._ask(each, Verb.STOP, Why.ROLLOUT)
            self.have[self._place(each.status)] -= 1
            self.returning += 1

    def _is_failed(self, instance: Instance) -> bool:
        down = instance.status in _STARTABLE and instance.last_error is not None
        return (down and self._missing() > 0) or instance.ref in self.unhealthy  # a spare one does not count

    def _start(self) -> None:
        """Start and create what is missing in all."""
        missing = self._missing()
        idle = sorted(self._free(*_STARTABLE), key=lambda i: _STARTABLE.index(i.status))
        for each in idle[: max(0, missing)]:
            if not self.room.run(self.need.shape):
                self.blocked += max(0, missing - self.returning)
                return
            self._ask(each, Verb.START, Why.TOO_FEW)
            self.have[Status.RUNNING] += 1
            missing -= 1
        wanted = max(0, missing - self.returning)
        count = _admitted(self.need, wanted, self.room)
        self.blocked += wanted - count
        if count:
            self.actions.append(Create(self.need.ref, count))
            self.have[Status.RUNNING] += count

    def _put_away(self) -> None:
        """Fill the colder places from what runs beyond its count by now, and when there is no room to start more,
        from what runs within it: that makes the room.
        """
        beyond = max(0, -self._missing(Status.WARM))
        self._cool(self._able(self._free(Status.WARM)[::-1])[:beyond], Verb.SLEEP, Status.SLEEPING)
        spare = max(0, self._running_now() - self.wanted[Status.RUNNING] + self.blocked)
        running = self._free(Status.RUNNING)[::-1]
        warmed = self._cool(running[:spare], Verb.WARM, Status.WARM)
        self._cool(self._able(running[warmed:])[: spare - warmed], Verb.SLEEP, Status.SLEEPING)
        stuck = min(self._missing(Status.SLEEPING), sum(ref in self.sleepless for ref in self.free))
        if stuck > 0:
            self.remarks.append(f"{stuck} cannot sleep, and stay up: the template they were cloned from is gone")

    def _able(self, candidates: Sequence[Instance]) -> list[Instance]:
        return [each for each in candidates if each.ref not in self.sleepless]

    def _running_now(self) -> int:
        """How many run by now and go on, beside those that are held."""
        leaving = {action.ref for action in self.actions if isinstance(action, Request)} | self.held
        there = (i for i in self.alive if i.status is Status.RUNNING and i.lands_on is Status.RUNNING)
        return sum(each.ref not in leaving for each in there)

    def _cool(self, candidates: Sequence[Instance], verb: Verb, place: Status) -> int:
        count = 0
        for each in candidates[: max(0, self._missing(place))]:
            if verb is Verb.WARM and not self.room.pause():
                break
            self._ask(each, verb, Why.PLACE)
            self.have[each.status] -= 1
            self.have[place] += 1
            count += 1
        return count
