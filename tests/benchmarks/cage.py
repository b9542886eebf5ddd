"""``cage.start``: what a VMM's cage costs a start.

The same driver restores the same template, with the cage and without: from the call of `clone` to the guest's
acknowledgement of its identity. Without means QEMU as root in the node's own namespaces and control group, with only
its own filter of system calls. Clones are measured since they start fastest, so that the cage weighs most. Those
compared alternate; the first of each is not counted. Bar 1.15.
"""

from __future__ import annotations

import time
from dataclasses import replace

from mvm.domain.ids import InstanceRef, Revision
from mvm.domain.pool import SeccompPolicy
from mvm.drivers.guest_channel import UnixGuestChannel
from mvm.drivers.qcow2 import write_empty
from mvm.drivers.qemu.driver import QemuDriver
from mvm.drivers.shell import LocalShell
from tests.benchmarks import by_hand
from tests.benchmarks.bench_stack import CLONES, Bench
from tests.benchmarks.result import Result, at_most_ratio
from tests.benchmarks.start import template

_RUNS = 15


def start(bench: Bench) -> Result:
    """Run it."""
    ref, other = bench.create(CLONES, 2)
    bench.stack.mvm("instance", "start", other)  # there is a template, and somebody maps its memory
    revision = Revision(bench.stack.json("pool", "info", CLONES)["revision"])
    layout, shell = bench.stack.layout, LocalShell()
    caged, bare = QemuDriver(layout, shell), QemuDriver(layout, shell, caged=False)
    times: dict[QemuDriver, list[float]] = {bare: [], caged: []}
    with by_hand.place(bench.stack, InstanceRef.parse(ref)) as place:
        directory = layout.instance(place.spec.ref)
        spec = replace(
            place.spec, directory=directory, overlay=directory / "overlay.qcow2", uid=0x6FFF_0003,
            seccomp=SeccompPolicy.STRICT,
        )  # fmt: skip
        channel = UnixGuestChannel()
        for _ in range(_RUNS + 1):
            for driver, seconds in times.items():
                with spec.overlay.open("wb") as file:
                    write_empty(file, spec.rootfs.stat().st_size)
                began = time.perf_counter()
                process = driver.clone(template(bench.stack, CLONES), spec, revision=revision)
                driver.resume(spec.ref, process)
                channel.configure(spec.ref, spec.directory, place.identity, deadline_s=by_hand.ANSWER_S)
                seconds.append(time.perf_counter() - began)
                driver.kill(spec.ref, process)
    bench.destroy(ref, other)
    return at_most_ratio("cage.start", "s", "a start without the cage", times[bare][1:], times[caged][1:], 1.15)
