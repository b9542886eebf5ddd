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
from mvm.domain.desired import DesiredPool
from mvm.domain.ids import InstanceRef, PoolRef, Revision
from mvm.domain.instance import Instance
from mvm.domain.lifecycle import Status, Verb
from mvm.domain.pool import DesiredCounts, InstanceResources, WorkerPool
from mvm.domain.remarks import Cause, Remark
from mvm.domain.room import Lack, Room
from mvm.domain.vmm import Ending, OnExit

_STARTABLE = (Status.STOPPED, Status.READY, Status.CREATED)  # in the order they are taken
_UP = (Status.SLEEPING, Status.WARM, Status.RUNNING)  # in the order they are stopped: the coldest first


@dataclass(frozen=True, slots=True)
class PoolNeed:
    """What one pool needs. `max_unavailable` 0: a new revision comes with the next start, nothing is stopped for it.

    What people did to its instances before `scaled_at` does not hold any more.
    """

    ref: PoolRef
    counts: DesiredCounts
    shape: InstanceResources
    revision: Revision | None = None
    pinned: bool = False
    critical: bool = False
    max_unavailable: int = 0
    scaled_at: datetime | None = None
    on_exit: OnExit = OnExit.RESTART

    @classmethod
    def of(
        cls,
        rules: WorkerPool | DesiredPool,
        counts: DesiredCounts,
        known: WorkerPool | None,
        *,
        max_unavailable: int = 0,
    ) -> PoolNeed:
        """With the `rules` of a document, or of the pool itself where none lists it; what it has is `known`, if there
        is one.
        """
        return cls(
            rules.ref,
            counts,
            known.resources if known else rules.resources,
            known.revision if known else None,
            pinned=rules.pinned,
            critical=rules.critical,
            max_unavailable=max_unavailable,
            scaled_at=known.scaled_at if known else None,
            on_exit=rules.on_exit,
        )

    def rests(self, instance: Instance) -> bool:
        """Whether it ended by itself and the pool lets such ones be: it keeps its place in the counts."""
        return rests(self.on_exit, instance)


def rests(on_exit: OnExit, instance: Instance) -> bool:
    """Whether it ended by itself, in a pool that lets such ones be."""
    by_itself = instance.ended is not None and instance.ended.by_guest
    idle = instance.status is Status.STOPPED and instance.in_flight is None
    return on_exit is OnExit.STOP and by_itself and idle


@dataclass(frozen=True, slots=True)
class Scaled:
    """What to do, and all that keeps the pool from its counts beside that this is still to be done.

    `rolling` are how many keep another revision until health checks have found the new ones well.
    """

    actions: tuple[Action, ...] = ()
    remarks: tuple[Remark, ...] = ()
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
    that a person has changed is left alone until its time is over; it takes one of the places that the counts give. One
    that ended by itself fills a place, where `PoolNeed.on_exit` says so; elsewhere those that rebooted start first.
    """
    alive = sorted(
        (each for each in observed if each.lands_on is not Status.DESTROYED), key=lambda i: (i.created_at, i.ref)
    )
    if need.critical:
        return _first_fill(need, alive, room, now)
    return _Scaling(need, alive, room, now, unhealthy, sleepless, unproven).decide()


def revived(
    observed: Sequence[Instance], shape: InstanceResources, room: Room, *, now: datetime
) -> tuple[Request, ...]:
    """Starts of those that rebooted, oldest first, in a pool that has no counts."""
    rebooted = [
        i for i in observed if i.status is Status.STOPPED and i.ended is Ending.REBOOTED and i.in_flight is None
    ]
    free = [i for i in rebooted if not i.held_until(now, None)]
    starts = [i for i in sorted(free, key=lambda i: (i.created_at, i.ref)) if room.run(shape)]
    return tuple(Request(i.ref, Verb.START, i.status, Why.REBOOTED) for i in starts)


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


def at_counts(counts: DesiredCounts, observed: Collection[Instance]) -> bool:
    """Whether `observed` are as `counts` has them, now; with one count for all that are up, they are one place."""
    places = [(each.status, each.lands_on) for each in observed]
    if not counts.exact:
        return sum(now.is_up and then.is_up for now, then in places) == counts.running
    between = any(now is not then for now, then in places if now.is_up or then.is_up)
    return not between and all(places.count((place, place)) == count for place, count in _places(counts).items())


def _first_fill(need: PoolNeed, alive: Sequence[Instance], room: Room, now: datetime) -> Scaled:
    """Create what is missing, and start what is down by nobody's wish: it never ran, or its guest or host has ended."""
    up = [each for each in alive if each.lands_on.is_up]
    down = [each for each in alive if each.status in _STARTABLE and not each.in_flight]
    held = [each for each in down if each.held_until(now, need.scaled_at)]
    fallen = [each for each in down if not (_was_stopped(each) or need.rests(each)) and each not in held]
    wanted = fallen[: max(0, need.counts.total - len(up))]
    starts: list[Instance] = []
    blocked: Counter[Lack] = Counter()
    for each in wanted:
        if room.run(need.shape):
            starts.append(each)
        else:
            blocked[room.lack] += 1
    missing = max(0, need.counts.total - len(alive))
    count = _admitted(need, missing, room)
    if missing > count:
        blocked[room.lack] += missing - count
    actions: list[Action] = [Request(each.ref, Verb.START, each.status, Why.TOO_FEW) for each in starts]
    if count:
        actions.append(Create(need.ref, count))

    short = need.counts.total - len(up) - len(starts) - missing
    remarks = [*_under_way(need, alive), *_held(need, held if short > 0 else (), now)]
    stopped = [each.ref for each in down if _was_stopped(each) and each not in held][: max(0, short)]
    if stopped:
        remarks.append(Remark(need.ref, Cause.CRITICAL, len(stopped), tuple(stopped)))
    resting = [each.ref for each in down if need.rests(each) and each not in held][: max(0, short - len(stopped))]
    if resting:
        remarks.append(Remark(need.ref, Cause.RESTED, len(resting), tuple(resting)))
    if len(up) > need.counts.total:
        surplus = len(up) - need.counts.total
        remarks.append(Remark(need.ref, Cause.CRITICAL_SURPLUS, surplus))
    elif others := _in_other_states(need.counts, up):
        remarks.append(Remark(need.ref, Cause.CRITICAL_STATES, others))
    return Scaled(tuple(actions), (*remarks, *_lacking(need, blocked)))


def _in_other_states(counts: DesiredCounts, up: Sequence[Instance]) -> int:
    """How many are up in a state of which `counts` asks for fewer; none where one count is for all that are up."""
    if not counts.exact:
        return 0
    there = Counter(each.status for each in up if each.in_flight is None)
    return (there - Counter(_places(counts))).total()


def _places(counts: DesiredCounts) -> dict[Status, int]:
    """How many `counts` asks for in each state, where they are exact."""
    return {Status.RUNNING: counts.running, Status.WARM: counts.warm or 0, Status.SLEEPING: counts.sleeping or 0}


def _was_stopped(instance: Instance) -> bool:
    return instance.status is Status.STOPPED and instance.last_error is None


def _admitted(need: PoolNeed, wanted: int, room: Room) -> int:
    count = 0
    while count < wanted and room.add(need.ref, need.shape):
        count += 1
    return count


def _lacking(need: PoolNeed, blocked: Counter[Lack]) -> list[Remark]:
    return [Remark(need.ref, lack.cause, count, limit=lack.limit) for lack, count in blocked.items() if count > 0]


def _under_way(need: PoolNeed, alive: Sequence[Instance]) -> list[Remark]:
    """What has a job, as long as the pool is not at its counts."""
    busy = tuple(each.ref for each in alive if each.in_flight)
    if not busy or at_counts(need.counts, alive):
        return []
    return [Remark(need.ref, Cause.UNDER_WAY, len(busy), busy)]


def _held(need: PoolNeed, held: Sequence[Instance], now: datetime) -> list[Remark]:
    """`until` is when the first of them is free again. Scaling to the counts there are frees all of them at once."""
    ends = {until: each.ref for each in held if (until := each.held_until(now, need.scaled_at))}
    if not ends:
        return []
    first = min(ends)
    others = tuple(each.ref for each in held if each.ref != ends[first])
    return [Remark(need.ref, Cause.HELD, len(held), (ends[first], *others), first, detail=need.counts.flags)]


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
    remarks: list[Remark] = field(default_factory=list)
    held: set[InstanceRef] = field(default_factory=set)  # a person has changed these
    free: dict[InstanceRef, Instance] = field(default_factory=dict)  # that may be asked, oldest first
    have: Counter[Status] = field(default_factory=Counter)  # how many land in each place
    wanted: Counter[Status] = field(default_factory=Counter)
    settled: int = 0  # up, well as far as a rollout has to know, and not going away
    returning: int = 0  # on their way to where they can be started
    blocked: Counter[Lack] = field(default_factory=Counter)  # should run, and there is no room for
    misplaced: list[Instance] = field(default_factory=list)  # held where they are not wanted
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
        self.remarks += _lacking(self.need, self.blocked)
        known = [*_under_way(self.need, self.alive), *_held(self.need, self.misplaced, self.now)]
        return Scaled(tuple(self.actions), (*known, *self.remarks), self.rolling)

    def _remark(self, cause: Cause, count: int, *refs: InstanceRef) -> None:
        self.remarks.append(Remark(self.need.ref, cause, count, refs))

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
        held = [each for each in self.alive if each.held_until(self.now, self.need.scaled_at)]
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
        self._let_rest()

    def _let_rest(self) -> None:
        """Those that ended by themselves, and are to be let be, fill places for which others would be started."""
        resting = [each for each in self.free.values() if self.need.rests(each)]
        for each in resting:
            del self.free[each.ref]
            place = next((place for place in reversed(_UP) if self.wanted[place] > self.have[place]), None)
            if place is not None:
                self.wanted[place] -= 1
                self.settled += 1
        if resting:
            self._remark(Cause.RESTED, len(resting), *(each.ref for each in resting))

    def _give_place(self, held: Instance) -> None:
        """It takes a place where it is, or else another one."""
        lands = held.lands_on
        places = ([self._place(lands)] if lands.is_up else []) + list(reversed(_UP))
        place = next((place for place in places if self.wanted[place] > 0), None)
        if place != (self._place(lands) if lands.is_up else None):
            self.misplaced.append(held)
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
                self.blocked[self.room.lack] += count - done
                return
            self._ask(each, Verb.WAKE, Why.TOO_FEW)
            self.have[self._place(status)] -= 1
            self.have[Status.RUNNING] += 1

    def _stop_surplus(self) -> None:
        surplus = -self._missing()
        if surplus <= 0:
            return
        if self.need.pinned:
            self._remark(Cause.PINNED, surplus)
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
        if self.need.pinned:
            self._remark(Cause.PINNED_REVISION, len(old))
            return
        if failed := [each.ref for each in self.alive if each.revision == revision and self._is_failed(each)]:
            self._remark(Cause.NOT_WELL, len(old), *failed)
            return
        unavailable = max(0, self.need.counts.total - self.settled)
        now = old[: max(0, self.need.max_unavailable - unavailable)]
        waited = [each.ref for each in self.alive if each.ref in self.unproven]
        if waited and not now:
            self.rolling = len(old)
            self._remark(Cause.HEALTH_CHECK, len(old), *waited)
        for each in now:
            self._ask(each, Verb.STOP, Why.ROLLOUT)
            self.have[self._place(each.status)] -= 1
            self.returning += 1

    def _is_failed(self, instance: Instance) -> bool:
        down = instance.status in _STARTABLE and instance.last_error is not None and not self.need.rests(instance)
        return (down and self._missing() > 0) or instance.ref in self.unhealthy  # a spare one does not count

    def _start(self) -> None:
        """Start and create what is missing in all."""
        missing = self._missing()
        idle = sorted(
            self._free(*_STARTABLE), key=lambda i: (i.ended is not Ending.REBOOTED, _STARTABLE.index(i.status))
        )
        for each in idle[: max(0, missing)]:
            if not self.room.run(self.need.shape):
                self.blocked[self.room.lack] += max(0, missing - self.returning)
                return
            self._ask(each, Verb.START, Why.REBOOTED if each.ended is Ending.REBOOTED else Why.TOO_FEW)
            self.have[Status.RUNNING] += 1
            missing -= 1
        wanted = max(0, missing - self.returning)
        count = _admitted(self.need, wanted, self.room)
        if wanted > count:
            self.blocked[self.room.lack] += wanted - count
        if count:
            self.actions.append(Create(self.need.ref, count))
            self.have[Status.RUNNING] += count

    def _put_away(self) -> None:
        """Fill the colder places from what runs beyond its count by now, and when there is no room to start more,
        from what runs within it: that makes the room.
        """
        beyond = max(0, -self._missing(Status.WARM))
        self._cool(self._able(self._free(Status.WARM)[::-1])[:beyond], Verb.SLEEP, Status.SLEEPING)
        spare = max(0, self._running_now() - self.wanted[Status.RUNNING] + self.blocked.total())
        running = self._free(Status.RUNNING)[::-1]
        warmed = self._cool(running[:spare], Verb.WARM, Status.WARM)
        self._cool(self._able(running[warmed:])[: spare - warmed], Verb.SLEEP, Status.SLEEPING)
        stuck = min(self._missing(Status.SLEEPING), sum(ref in self.sleepless for ref in self.free))
        if stuck > 0:
            self._remark(Cause.SLEEPLESS, stuck, *(ref for ref in self.free if ref in self.sleepless))

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
                self.blocked[self.room.lack] += min(len(candidates) - count, self._missing(place))
                break
            self._ask(each, verb, Why.PLACE)
            self.have[each.status] -= 1
            self.have[place] += 1
            count += 1
        return count
