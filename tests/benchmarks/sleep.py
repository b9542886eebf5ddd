"""``sleep.*``, ``wake.*``, ``warm.resume`` and ``clone.pss``, of idle guests with 256 MB.

``sleep.time``: a sleep job from before it is recorded to its end in the worker's log, against the delta procedure by
hand: the same request to the guest, QMP's stop, the devices, the pages that differ, zstd, fsync, rename, the end.
Bar 1.5. ``sleep.size``: the bytes of the same snapshots as a percentage of the guest's memory, against the procedure's
files. Bar 2.

``wake.idle``: an urgent wake of the same guests, from before the QUIC connection is opened to the guest's reply, as
the agent logs it, against restoring what the procedure saved, from QEMU's spawn to the guest's reply
to the same request ``wake``. Both find the template's memory in a memfd that somebody maps. Bar 1.3.

``wake.backlog``: the same wake while 10,000 jobs lie in the queue of the node, whose worker does them, against itself
without. Bar 1.2.

``warm.resume``: an urgent wake of a warm guest, in milliseconds, from when it is asked for on the open connection of a
coordinator to the guest's reply, as the agent logs it, against QMP's cont and the request ``wake`` by hand. Bar 15. How
long it takes when the connection has to be opened first is told, too.

``clone.pss``: 20 clones, each proportional share of memory in MB, against a guest that was booted. Bar 45.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from statistics import median

from mvm.domain.ids import InstanceRef
from mvm.domain.job import JobState, JobVerb, Lane
from mvm.drivers.celery_queue import PRIORITY_SEPARATOR
from mvm.drivers.redis_link import RedisLink
from mvm.ports.queue import node_queue
from tests.benchmarks import by_hand
from tests.benchmarks.bench_stack import CLONES, COLD, NODE, Bench, Times
from tests.benchmarks.result import Result, at_most, at_most_ratio
from tests.benchmarks.start import tell_steps, template

_RUNS = 31  # this many, for a machine may change its speed from one second to the next
_RAM = 256 << 20
_BACKLOG, _MARGIN = 10_000, 2_000
_BLOCKS, _BLOCK = 2, 8
_QUEUE = f"{node_queue(NODE)}{PRIORITY_SEPARATOR}3"  # of normal jobs
_NOBODY = f"{CLONES}/i-00000000"
_CLONES = 20


@dataclass
class _Rounds:
    """Sleep and wake, ours and by hand, round by round."""

    sleeps: list[Times] = field(default_factory=list)
    wakes: list[Times] = field(default_factory=list)
    sizes: list[float] = field(default_factory=list)
    hand_sleeps: list[float] = field(default_factory=list)
    hand_wakes: list[float] = field(default_factory=list)
    hand_sizes: list[float] = field(default_factory=list)


@cache
def _rounds(bench: Bench) -> _Rounds:
    found = _Rounds()
    refs = bench.create(CLONES, 2)
    for ref in refs:
        bench.job(JobVerb.INSTANCE_START, ref)
    with by_hand.place(bench.stack, InstanceRef.parse(refs[0])) as place:
        hand = by_hand.Hand(place, template(bench.stack, CLONES))
        guest = hand.clone()
        try:
            for _ in range(_RUNS + 1):
                found.sleeps.append(bench.job(JobVerb.INSTANCE_SLEEP, refs[0]))
                seconds, saved = hand.sleep(guest)
                found.hand_sleeps.append(seconds)
                found.sizes.append(_bytes(bench.stack.layout.snapshot(InstanceRef.parse(refs[0]))) * 100 / _RAM)
                found.hand_sizes.append(_bytes(saved) * 100 / _RAM)
                found.wakes.append(bench.wake(refs[0]))
                guest = hand.wake(saved)
                found.hand_wakes.append(guest.seconds)
        finally:
            guest.end()
            hand.close()
    bench.destroy(*refs)
    for each in vars(found).values():
        del each[0]
    return found


def _bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.iterdir())


def sleep_time(bench: Bench) -> Result:
    found = _rounds(bench)
    tell_steps(bench, "sleep.time", found.sleeps)
    ours = [each["succeeded"] for each in found.sleeps]
    return at_most_ratio("sleep.time", "s", "the delta procedure by hand", found.hand_sleeps, ours, 1.5)


def sleep_size(bench: Bench) -> Result:
    found = _rounds(bench)
    return at_most("sleep.size", "% of RAM", "the delta procedure by hand", found.hand_sizes, found.sizes, 2)


def wake_idle(bench: Bench) -> Result:
    found = _rounds(bench)
    tell_steps(bench, "wake.idle", found.wakes)
    ours = [each["guest replied"] for each in found.wakes]
    return at_most_ratio("wake.idle", "s", "the restore by hand", found.hand_wakes, ours, 1.3)


def wake_backlog(bench: Bench) -> Result:
    refs = bench.create(CLONES, 2)
    for ref in refs:
        bench.job(JobVerb.INSTANCE_START, ref)
    quiet, loaded = [], []
    link = RedisLink(bench.client.connection["broker_url"], code="broker.unreachable")
    for _ in range(_BLOCKS):
        for _ in range(_BLOCK):
            quiet.append(_sleep_and_wake(bench, refs[0]))
        for _ in range(_BLOCK):
            _fill(bench, link)
            loaded.append(_sleep_and_wake(bench, refs[0]))
        bench.say(f"wake.backlog: {_queued(link)} jobs are still queued")
        _drop(bench, link)
    link.close()
    bench.destroy(*refs)
    for name, runs in (("wake.backlog without", quiet), ("wake.backlog with", loaded)):
        tell_steps(bench, name, runs)
    bare, ours = ([each["guest replied"] for each in runs] for runs in (quiet, loaded))
    return at_most_ratio("wake.backlog", "s", "itself with an empty queue", bare, ours, 1.2)


def _sleep_and_wake(bench: Bench, ref: str) -> Times:
    bench.job(JobVerb.INSTANCE_SLEEP, ref, lane=Lane.URGENT)
    return bench.wake(ref)


def _fill(bench: Bench, link: RedisLink) -> None:
    """At least `_BACKLOG` jobs wait, and will a while: those of an instance that is not there."""
    jobs = bench.client.jobs
    while (missing := _BACKLOG + _MARGIN - _queued(link)) > _MARGIN // 2:
        more = [jobs.new(JobVerb.INSTANCE_START, _NOBODY, NODE, actor="bench") for _ in range(min(missing, 1000))]
        bench.client.registry.record(more)
        bench.queue.send(more)


def _drop(bench: Bench, link: RedisLink) -> None:
    """Nothing of it is left, or what lies in no queue would be sent again."""
    link.command("DEL", _QUEUE)
    now, registry = datetime.now(UTC), bench.client.registry
    for job in registry.open_jobs(NODE):
        if job.subject == _NOBODY and job.state is JobState.QUEUED:
            registry.update(job.with_(state=JobState.CANCELLED, finished_at=now))


def _queued(link: RedisLink) -> int:
    return int(link.command("LLEN", _QUEUE))


def warm_resume(bench: Bench) -> Result:
    (ref,) = bench.create(CLONES)
    bench.job(JobVerb.INSTANCE_START, ref)
    bare, ours, alone = [], [], []
    with by_hand.place(bench.stack, InstanceRef.parse(ref)) as place:
        hand = by_hand.Hand(place, template(bench.stack, CLONES))
        guest = hand.clone()
        try:
            for _ in range(_RUNS + 1):
                bench.job(JobVerb.INSTANCE_WARM, ref)
                alone.append(bench.wake(ref))
                bench.job(JobVerb.INSTANCE_WARM, ref)
                with bench.agent() as agent:
                    ours.append(bench.wake(ref, agent))
                with by_hand.Monitor(place.spec.directory) as monitor:
                    monitor.run("stop")
                    began = time.perf_counter()
                    monitor.run("cont")
                guest.tell_time()
                bare.append((time.perf_counter() - began) * 1000)
        finally:
            guest.end()
            hand.close()
    bench.destroy(ref)
    tell_steps(bench, "warm.resume with a new connection", alone[1:])
    tell_steps(bench, "warm.resume", ours[1:])
    replied = [each["guest replied"] * 1000 for each in ours[1:]]
    return at_most("warm.resume", "ms", "QMP's cont by hand", bare[1:], replied, 15)


def clone_pss(bench: Bench) -> Result:
    refs, boots = bench.create(CLONES, _CLONES), bench.create(COLD)
    for ref in (*refs, *boots):
        bench.job(JobVerb.INSTANCE_START, ref)
    shares = {i["ref"]: _pss_mb(i["pid"]) for i in bench.stack.json("instance", "list") if i["pid"]}
    bench.destroy(*refs, *boots)
    clones = [shares[ref] for ref in refs]
    bench.say(f"clone.pss: {min(clones):.1f} to {max(clones):.1f} MB, median {median(clones):.1f} MB")
    return at_most("clone.pss", "MB", "a guest that was booted", [shares[boots[0]]], clones, 45)


def _pss_mb(pid: int) -> float:
    words = Path(f"/proc/{pid}/smaps_rollup").read_text().split()
    return int(words[words.index("Pss:") + 1]) * 1024 / 1e6
