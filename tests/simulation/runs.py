"""Running what a seed means; and when it fails, finding the fewest events with which it does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mvm.domain.job import JobVerb
from tests.simulation.bases import begin
from tests.simulation.checks import after_event, at_the_end, had_to_fail, left_lying
from tests.simulation.events import Event, events_of
from tests.simulation.world import HOLD_S, World

ROUNDS = 12
"""Sweeps of each kind in which everything has to be as it should, once faults are over."""
_STEPS = 400


@dataclass(frozen=True, slots=True)
class Result:
    """A run that has ended: what was wrong, if anything, and how it went, if that was to be told."""

    seed: int
    events: tuple[Event, ...]
    breaches: tuple[str, ...]
    trace: tuple[str, ...] = ()
    rounds: int = 0


def run(seed: int, events: Sequence[Event] | None = None, *, trace: bool = False) -> Result:
    """The run of `seed`, with other `events` if they are given. Call it within `simulated`."""
    events = events_of(seed) if events is None else events
    world = begin(seed)
    world.told = [] if trace else None
    world.remembers = any(event.name in ("redis", "reboot") for event in events)
    rounds, breaches = 0, list[str]()
    try:
        for event in events:
            world.perform(event)
            breaches = after_event(world)
            if breaches:
                break
        else:
            rounds, breaches = settle(world)
    finally:
        for process in (*world.processes.values(), *world.others):
            world.kill(process)
    return Result(seed, tuple(events), tuple(dict.fromkeys(breaches)), tuple(world.told or ()), rounds)


def settle(world: World) -> tuple[int, list[str]]:
    """Faults are over, and sweeps come: how many of each it took, and what is still not as it should be."""
    world.tell("--- faults are over")
    world.host.clear_faults()
    world.clock.set_by = 0.0
    world.redis_down = False
    world.restart()
    _drain(world)
    left = world.breaches or left_lying(world)
    if left:
        return 0, left
    # A person's word holds as long as it was given for, and a sweep that came from a clock that was ahead until then.
    until = [row.manual_override_until for row in world.rows().values() if row.manual_override_until]
    until += [j.expires_at for j in world.registry.all_jobs().values() if j.verb.is_sweep and j.expires_at]
    wait = max([(end - world.clock.now()).total_seconds() for end in until], default=0.0)
    if until:
        world.pass_time(max(wait, HOLD_S) + 1)
    breaches: list[str] = []
    for number in range(1, ROUNDS + 1):
        world.pass_time(35.0)
        before = world.registry.all_jobs()
        sweeps = [JobVerb.SWEEP_STALE_PIDS, JobVerb.SWEEP_ORPHANS, JobVerb.SWEEP_RECONCILE]
        if world.has_ill or world.rolls():
            sweeps.insert(0, JobVerb.SWEEP_HEALTH)
        if number == 1:
            sweeps.append(JobVerb.SWEEP_IDLENESS)
        if world.was_low:
            sweeps.append(JobVerb.SWEEP_DISK)
        for verb in sweeps:
            world.heartbeat()  # a sweep may have waited for silent guests
            world.jobs().sweep(verb, every_s=15.0)
            _drain(world)
        if world.breaches or (vain := had_to_fail(world, before)):
            return number, list(world.breaches) or vain
        breaches = at_the_end(world)
        world.tell(f"--- round {number}: {breaches or 'all is well'}")
        if not breaches:
            break
    return number, breaches


def _drain(world: World) -> None:
    """Everything that can go on does, and every message is delivered."""
    for _ in range(_STEPS):
        if world.breaches:
            return
        ready = [actor for actor in world.actors() if actor.runnable]
        if ready:
            world.step(ready[0], None)
            continue
        due = [*world.queue.due(urgent=True), *world.queue.due(urgent=False)]
        if due:
            world.deliver(due[0])
            continue
        later = [message.not_before for message in world.queue.ready] + list(world.deadlines.values())
        if not later:
            return
        world.clock.elapsed = max(world.clock.elapsed, min(later))
    world.breach(f"stuck: still at work after {_STEPS} steps: {[actor.name for actor in world.actors()]}")


def shrink(seed: int, events: Sequence[Event], fails: Callable[[Sequence[Event]], bool]) -> list[Event]:
    """The fewest of `events` that still fail: ever smaller pieces are left out, then the rest is made plain."""
    left, size = list(events), max(1, len(events) // 2)
    while True:
        shorter = False
        at = 0
        while at < len(left):
            fewer = left[:at] + left[at + size :]
            if fails(fewer):
                left, shorter = fewer, True
            else:
                at += size
        if size == 1 and not shorter:
            break
        size = size if shorter else max(1, size // 2)
    for at, event in enumerate(left):
        for plainer in (replace(event, calls=None), replace(event, pick=0), replace(event, value=0)):
            plain = replace(left[at], **{n: getattr(plainer, n) for n in ("pick", "value", "calls")
                                         if getattr(plainer, n) != getattr(event, n)})  # fmt: skip
            if plain != left[at] and fails([*left[:at], plain, *left[at + 1 :]]):
                left[at] = plain
    return left


def shortest(result: Result) -> Result:
    """The same breach with as few events as can be, and its trace."""
    kind = _kind(result.breaches)

    def fails(events: Sequence[Event]) -> bool:
        return kind in {_kind([breach]) for breach in run(result.seed, events).breaches}

    return run(result.seed, shrink(result.seed, result.events, fails), trace=True)


def _kind(breaches: Sequence[str]) -> str:
    return breaches[0].partition(":")[0] if breaches else ""
