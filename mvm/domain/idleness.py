"""Who is idle and may be put away: samples and a pool's policy in, a decision with its reason out. Pure.

Times are seconds of the node's steady clock: a host whose wall clock is set puts nobody to sleep.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from mvm.domain.ids import InstanceRef, TenantId
from mvm.domain.lifecycle import Status
from mvm.domain.pool import SleepPolicy

IDLE_CPU = 0.02  # of one CPU; answering a sample takes less
IDLE_RX = 128.0  # bytes a second: neighbours' ARP requests are no work
IDLE_TX = 32.0  # bytes a second: keepalives; one small HTTP answer in half a minute is more
BUSY = "busy"


class Choice(StrEnum):
    """What is done with an instance."""

    KEEP = "keep"
    WARM = "warm"
    SLEEP = "sleep"


@dataclass(frozen=True, slots=True)
class Decision:
    """A choice, and why: a clause for people."""

    choice: Choice
    reason: str


@dataclass(frozen=True, slots=True)
class Sample:
    """What a guest said of itself at `at`: counters since its boot, its load, and its worker's signal."""

    at: float
    uptime_s: float
    cpu_s: float
    rx_bytes: int
    tx_bytes: int
    load: float
    worker: str


@dataclass(frozen=True, slots=True)
class Watch:
    """What is known of one run of an instance, that is, since it was last started or woken (`run` names it).

    It was first seen at `since`, has done nothing since `idle_since`, and between its last two samples used `cpu`
    of one CPU and `rx` and `tx` bytes a second.
    """

    run: str
    since: float
    idle_since: float
    last: Sample | None = None
    cpu: float = 0.0
    rx: float = 0.0
    tx: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON form, as stored."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Watch:
        """Inverse of `to_dict`."""
        return cls(**{**data, "last": Sample(**data["last"]) if data["last"] else None})


def observe(watch: Watch | None, run: str, at: float, sample: Sample | None) -> Watch:
    """`watch` after `sample` of the given run; None when there is none, because the guest is paused or silent.

    A new run, a guest that has booted again and a host that has are watched anew: idleness of before does not count.
    """
    if watch is None or watch.run != run or at < (watch.last.at if watch.last else watch.since):
        return Watch(run, at, at, sample)
    if sample is None:
        return watch
    last = watch.last
    if last is None:
        return Watch(run, watch.since, at, sample)
    seconds = sample.at - last.at
    deltas = (sample.cpu_s - last.cpu_s, sample.rx_bytes - last.rx_bytes, sample.tx_bytes - last.tx_bytes)
    if sample.uptime_s < last.uptime_s or min(deltas) < 0:
        return Watch(run, at, at, sample)
    if seconds <= 0:
        return watch
    cpu, rx, tx = (delta / seconds for delta in deltas)
    active = sample.worker == BUSY or cpu >= IDLE_CPU or rx > IDLE_RX or tx > IDLE_TX
    return Watch(run, watch.since, at if active else watch.idle_since, sample, cpu, rx, tx)


@dataclass(frozen=True, slots=True)
class Candidate:
    """An instance that is up, and all that counts. `silent`: its guest was asked and did not answer.

    `frees_mib` is what the host gains in memory when it sleeps, and at most what that takes of the disk.
    """

    ref: InstanceRef
    status: Status
    watch: Watch
    policy: SleepPolicy
    protected: str | None = None
    silent: bool = False
    frees_mib: int = 0


def must_stay(candidate: Candidate, now: float) -> str | None:
    """Why it is put away in no case, not even when memory is short; None if nothing speaks against it."""
    watch, policy = candidate.watch, candidate.policy
    if candidate.protected:
        return f"its pool is {candidate.protected}"
    if candidate.status is Status.WARM:
        return None
    if candidate.silent:
        return "its guest did not say what it does"
    if watch.last and watch.last.worker == BUSY:
        return "its worker is busy"
    ran = now - watch.since
    if ran < policy.min_running_s:
        return f"it has run for {ran:.0f} s of at least {policy.min_running_s} s"
    return None


def judge(candidate: Candidate, now: float) -> Decision:
    """What its pool's policy says, if there is memory enough."""
    stays = must_stay(candidate, now)
    if stays:
        return Decision(Choice.KEEP, stays)
    policy, idle = candidate.policy, now - candidate.watch.idle_since
    for choice, after in ((Choice.SLEEP, policy.sleep_after_s), (Choice.WARM, policy.warm_after_s)):
        if after and idle >= after and not (choice is Choice.WARM and candidate.status is Status.WARM):
            return Decision(choice, f"idle for {idle:.0f} s, {choice} after {after} s")
    return Decision(Choice.KEEP, f"idle for {idle:.0f} s" if idle > 0 else _not_idle(candidate.watch))


def decide(
    candidates: Sequence[Candidate],
    now: float,
    *,
    short_mib: int = 0,
    room_mib: int | None = None,
    warm_room: Mapping[TenantId, int] | None = None,
) -> dict[InstanceRef, Decision]:
    """What to do with each. When `short_mib` of the host's memory are missing, the coldest sleep first until they
    are there, however short their idleness; a pool that never lets its instances sleep does not then either.

    No more are put to sleep than the disk has `room_mib` for; of the others those that may be go warm instead. No more
    of a tenant go warm than its quota has room for in `warm_room`; the others run on.
    """
    decisions = {candidate.ref: judge(candidate, now) for candidate in candidates}
    short = short_mib - sum(c.frees_mib for c in candidates if decisions[c.ref].choice is Choice.SLEEP)
    for candidate in sorted(candidates, key=lambda c: (c.watch.idle_since, c.ref)):
        if short <= 0:
            break
        idle = now - candidate.watch.idle_since
        asleep = decisions[candidate.ref].choice is Choice.SLEEP
        if asleep or idle <= 0 or not candidate.policy.sleep_after_s or must_stay(candidate, now):
            continue
        decisions[candidate.ref] = Decision(
            Choice.SLEEP, f"memory is short by {short_mib} MiB, and it is among the coldest: idle for {idle:.0f} s"
        )
        short -= candidate.frees_mib
    if room_mib is not None:
        _fit(candidates, decisions, room_mib, now)
    _keep_within(candidates, decisions, dict(warm_room or {}))
    return decisions


def _keep_within(
    candidates: Sequence[Candidate], decisions: dict[InstanceRef, Decision], warm_room: dict[TenantId, int]
) -> None:
    """Of those that are to go warm the coldest do, as long as their tenant's quota has room."""
    for candidate in sorted(candidates, key=lambda c: (c.watch.idle_since, c.ref)):
        decided, tenant = decisions[candidate.ref], candidate.ref.tenant
        if decided.choice is not Choice.WARM or tenant not in warm_room:
            continue
        warm_room[tenant] -= 1
        if warm_room[tenant] < 0:
            why = f"{decided.reason}, but no more of tenant {tenant} may be warm: its max_warm is reached"
            decisions[candidate.ref] = Decision(Choice.KEEP, why)


def _fit(candidates: Sequence[Candidate], decisions: dict[InstanceRef, Decision], room_mib: int, now: float) -> None:
    for candidate in sorted(candidates, key=lambda c: (c.watch.idle_since, c.ref)):
        decided = decisions[candidate.ref]
        if decided.choice is not Choice.SLEEP:
            continue
        if candidate.frees_mib <= room_mib:
            room_mib -= candidate.frees_mib
            continue
        after, running = candidate.policy.warm_after_s, candidate.status is Status.RUNNING
        due = running and after and now - candidate.watch.idle_since >= after
        decisions[candidate.ref] = Decision(
            Choice.WARM if due else Choice.KEEP,
            f"{decided.reason}, but the disk is low: sleeping may take {candidate.frees_mib} MiB of it, "
            f"and {max(0, room_mib)} MiB may be used",
        )


def outlook(candidate: Candidate, now: float) -> tuple[Choice, float] | None:
    """What comes next if it stays as idle as it is and memory suffices, and in how many seconds; None: nothing."""
    if candidate.protected:
        return None
    policy, watch, warm = candidate.policy, candidate.watch, candidate.status is Status.WARM
    earliest = now if warm else watch.since + policy.min_running_s
    steps = [(Choice.SLEEP, policy.sleep_after_s)] if warm else [
        (Choice.WARM, policy.warm_after_s), (Choice.SLEEP, policy.sleep_after_s)
    ]  # fmt: skip
    due = [(max(earliest, watch.idle_since + after) - now, choice) for choice, after in steps if after]
    if not due:
        return None
    # Of two that are due at once it is sleep, as in `judge`.
    wait = max(0.0, min(due)[0])
    return [choice for seconds, choice in due if seconds <= wait][-1], wait


def _not_idle(watch: Watch) -> str:
    if watch.last is None or watch.last.at == watch.since:
        return "it is watched from now on"
    return f"it works: {watch.cpu:.0%} CPU, {watch.rx:.0f} B/s in, {watch.tx:.0f} B/s out"
