"""``start.*``: how long it takes until a guest runs, cold and out of its pool's template.

``start.cold``: ``mvm instance start REF`` in a pool that boots its guests, from the spawn of the command to the guest
agent's first answer, which is the time of the job's step *identify guest* in the worker's log (written after the
reply, so never too early). It holds the interpreter's start, recording and sending the job, Celery's delivery, the
locks, the quota, a new overlay, the TAP and the boot. Bar: 1.25 times the same QEMU by hand, with a new overlay and a
TAP on the same bridge, from its spawn to the agent's reply, awaited by the same code.

``start.clone_vs_cold``: a start job in a pool of clones against one in a pool that boots, both from before the job is
recorded to its end in the worker's log: the guest has acknowledged its identity and is recorded as running. Bar 0.15.

``start.clone_vs_bare``: the same clone, against restoring the same template's files by hand, from QEMU's spawn to the
guest's acknowledgement of the same request ``configure``. Both find the template's memory in a memfd that somebody
maps. Bar 1.3.

Those compared alternate. The first of each is not counted: it brings files into the page cache and lets the worker
verify them and choose the accelerator, which it does once.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median

from mvm.domain.ids import InstanceRef, Revision
from mvm.domain.job import JobVerb
from tests.benchmarks import by_hand
from tests.benchmarks.bench_stack import CLONES, COLD, COMMAND, Bench, Times
from tests.benchmarks.result import Result, at_most_ratio
from tests.support.stack import Stack

_RUNS = 9
_CLONE_RUNS = 31  # a machine whose speed changes from one second to the next tells two medians of 9 apart by chance
_CLONES_A_BOOT = 3  # likewise
_ANSWERED = "identify guest"


def cold(bench: Bench) -> Result:
    """Run it; the way of ours, step by step, is told on stderr."""
    (ref,) = bench.create(COLD)
    bare, ours = [], []
    _command(bench, ref)
    with by_hand.place(bench.stack, InstanceRef.parse(ref)) as place:
        for run in range(_RUNS + 1):
            bare.append(by_hand.boot(place))
            ours.append(_command(bench, ref))
            bench.say(f"start.cold {run}/{_RUNS}: {ours[-1][_ANSWERED]:.3f} s, by hand {bare[-1]:.3f} s")
    bench.destroy(ref)
    tell_steps(bench, "start.cold", ours[1:])
    answered = [each[_ANSWERED] for each in ours[1:]]
    return at_most_ratio("start.cold", "s", "the same QEMU by hand", bare[1:], answered, 1.25)


def clone_vs_cold(bench: Bench) -> Result:
    clone, boots = bench.create(CLONES, 2), bench.create(COLD)
    bench.job(JobVerb.INSTANCE_START, clone[1])  # somebody maps the template's memory
    cold, ours = [], []
    for _ in range(_RUNS + 1):
        cold.append(_start(bench, boots[0])["succeeded"])
        ours += [_start(bench, clone[0])["succeeded"] for _ in range(_CLONES_A_BOOT)]
    bench.destroy(*clone, *boots)
    return at_most_ratio("start.clone_vs_cold", "s", "a cold boot", cold[1:], ours[_CLONES_A_BOOT:], 0.15)


def clone_vs_bare(bench: Bench) -> Result:
    """Run it; the way of ours, step by step, is told on stderr."""
    refs = bench.create(CLONES, 2)
    bench.job(JobVerb.INSTANCE_START, refs[1])
    bare, ours = [], []
    with by_hand.place(bench.stack, InstanceRef.parse(refs[0])) as place:
        hand = by_hand.Hand(place, template(bench.stack, CLONES))
        for _ in range(_CLONE_RUNS + 1):
            ours.append(_start(bench, refs[0]))
            guest = hand.clone()
            bare.append(guest.seconds)
            guest.end()
        hand.close()
    bench.destroy(*refs)
    tell_steps(bench, "start.clone_vs_bare", ours[1:])
    succeeded = [each["succeeded"] for each in ours[1:]]
    return at_most_ratio("start.clone_vs_bare", "s", "the restore by hand", bare[1:], succeeded, 1.3)


def template(stack: Stack, pool: str) -> Path:
    """Where a pool's template is."""
    ref = InstanceRef.parse(f"{pool}/i-00000000").pool_ref
    return stack.layout.template(ref, Revision(stack.json("pool", "info", pool)["revision"]))


def tell_steps(bench: Bench, name: str, runs: Sequence[Times]) -> None:
    """The medians of when each step began, on stderr."""
    for step in runs[0]:
        bench.say(f"{name} reaches {step!r} after {median(each[step] for each in runs) * 1000:.1f} ms")


def _start(bench: Bench, ref: str) -> Times:
    times = bench.job(JobVerb.INSTANCE_START, ref)
    bench.job(JobVerb.INSTANCE_STOP, ref, force=True)
    return times


def _command(bench: Bench, ref: str) -> Times:
    """Start `ref` by the command and stop it again."""
    argv = [COMMAND, "instance", "start", ref]
    run = partial(subprocess.run, argv, env=bench.stack.env, stdin=subprocess.DEVNULL, capture_output=True, check=True)
    times = bench.timed("worker", ref, lambda: (run(), None)[1])
    bench.stack.mvm("instance", "stop", "--force", ref)
    return times
