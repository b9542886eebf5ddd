"""``start.cold``: from the command to the guest agent's first answer; bar: 1.25 times the same QEMU by hand.

**Ours** is ``mvm instance start REF`` on a stopped instance: from the spawn of the command to the moment the node's
worker has the agent's reply, which is the time of the job's step *identify guest* in the worker's log (written after
the reply, so never too early). It holds the interpreter's start, recording and sending the job, Celery's delivery, the
locks, the quota, a new overlay, the TAP and the boot.

**By hand** is the same command line, made by mvm's own argv builder for the same image, memory and CPUs, with a new
overlay and a TAP on the same bridge of the same namespace, both made beforehand: from the spawn of QEMU to the agent's
reply, awaited by the same code.

The two alternate, and who is first does too. One start of each before that is not counted: it brings the image into
the page cache and lets the worker verify it and choose the accelerator, which it does once.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from ipaddress import IPv4Network
from pathlib import Path
from statistics import median

from mvm import guest
from mvm.domain.addressing import TenantNetwork
from mvm.domain.ids import InstanceRef, Revision
from mvm.drivers import netns, processes, tap
from mvm.drivers.guest_channel import UnixGuestChannel
from mvm.drivers.instance_sockets import listen
from mvm.drivers.qcow2 import write_empty
from mvm.drivers.qemu import argv
from mvm.drivers.qemu.qmp import MONITOR
from mvm.drivers.qemu.tsc import host_tsc_khz
from mvm.drivers.revisions import INITRAMFS, KERNEL, ROOTFS
from mvm.drivers.shell import LocalShell
from mvm.ports.vmm import BootSpec, Nic
from tests.benchmarks.bench_stack import COMMAND, Bench
from tests.benchmarks.result import Result, at_most_ratio
from tests.support.stack import Stack

_RUNS = 9
_ANSWER_S = 60.0
_TAP = "mvmbench0"
_MARK = "by-hand"  # no state directory's, so no sweep takes it for an orphan
_ANSWERED = "identify guest"


def cold(bench: Bench) -> Result:
    """Run it; the way of ours, step by step, is told on stderr."""
    stack = bench.stack
    ref = InstanceRef.parse(stack.mvm("instance", "create", "bench/web").strip())
    bare: list[float] = []
    ours: list[dict[str, float]] = []
    with _by_hand(stack, ref) as hand:
        for run in range(_RUNS + 1):
            hand_first = run % 2
            if hand_first:
                bare.append(hand.start())
            ours.append(_start(stack, ref))
            if not hand_first:
                bare.append(hand.start())
            bench.say(f"start.cold {run}/{_RUNS}: {ours[-1][_ANSWERED]:.3f} s, by hand {bare[-1]:.3f} s")
    stack.mvm("instance", "destroy", "-y", str(ref))
    del bare[0], ours[0]
    for step in ours[0]:
        bench.say(f"start.cold reaches {step!r} after {median(each[step] for each in ours):.3f} s")
    answered = [each[_ANSWERED] for each in ours]
    return at_most_ratio("start.cold", "s", "the same QEMU by hand", bare, answered, 1.25)


def _start(stack: Stack, ref: InstanceRef) -> dict[str, float]:
    """Start `ref` and stop it again; when each step of the job began, in seconds from the command's spawn."""
    log = stack.layout.logs / "worker.log"
    offset = log.stat().st_size
    began = time.time()
    subprocess.run(
        [COMMAND, "instance", "start", str(ref)], env=stack.env, stdin=subprocess.DEVNULL,
        capture_output=True, check=True,
    )  # fmt: skip
    ended = time.time()
    with log.open() as lines:
        lines.seek(offset)
        events = [json.loads(line) for line in lines if line.startswith("{")]
    stack.mvm("instance", "stop", "--force", str(ref))
    steps = {
        event.get("step", event["event"]): datetime.fromisoformat(event["timestamp"]).timestamp() - began
        for event in events
        if event.get("subject") == str(ref) and event["event"] in ("began", "step", "succeeded")
    }
    return {**steps, "the command's end": ended - began}


class ByHand:
    """The same microVM without mvm. Its thread is in the stack's namespace."""

    def __init__(self, spec: BootSpec, accelerator: argv.AccelName) -> None:
        self._spec = spec
        self._accelerator = accelerator
        self._shell = LocalShell()
        host_tsc_khz()  # measured once in a process

    def start(self) -> float:
        """Seconds from QEMU's spawn to the agent's reply."""
        spec, channel = self._spec, UnixGuestChannel()
        spec.overlay.unlink(missing_ok=True)
        with spec.overlay.open("w+b") as file:
            write_empty(file, spec.rootfs.stat().st_size)
        card = tap.attach(spec.nic.tap)
        names = (MONITOR, *guest.PORTS)
        sockets = {name: listen(spec.directory, name) for name in names}
        ports = {name: sockets[name].fileno() for name in guest.PORTS}
        fds = argv.Descriptors(card, sockets[MONITOR].fileno(), ports)
        command = argv.command(spec, fds, self._accelerator, host_tsc_khz(), _MARK)
        began = time.perf_counter()
        try:
            process = self._shell.spawn(
                command, log=spec.directory / "vmm.log", pass_fds=(fds.tap, fds.monitor, *fds.ports.values())
            )
        finally:
            os.close(card)
            for each in sockets.values():
                each.close()
        try:
            channel.hello(spec.ref, spec.directory, deadline_s=_ANSWER_S)
            return time.perf_counter() - began
        finally:
            processes.kill(process)
            processes.wait_gone(process, _ANSWER_S)


@contextmanager
def _by_hand(stack: Stack, ref: InstanceRef) -> Iterator[ByHand]:
    """Everything but QEMU itself is there within the block, and gone after it."""
    tenant, pool = stack.json("tenant", "info", str(ref.tenant)), stack.json("pool", "info", str(ref.pool_ref))
    network = TenantNetwork(tenant["net_id"], IPv4Network(tenant["subnet"]))
    image = stack.layout.revision(Revision(pool["revision"])).resolve()
    _start(stack, ref)  # which also chooses the accelerator
    accelerator = json.loads((stack.layout.run / "accelerator.json").read_text())["name"]
    shell = LocalShell()
    connection = json.loads(stack.layout.connection.read_text())
    with tempfile.TemporaryDirectory(dir=stack.layout.root) as name, netns.entered(netns.path_of(connection["netns"])):
        shell.run(["ip", "tuntap", "add", _TAP, "mode", "tap"])
        try:
            shell.run(["ip", "link", "set", _TAP, "master", network.bridge, "addrgenmode", "none", "up"])
            directory = Path(name)
            spec = BootSpec(
                ref=ref, directory=directory, kernel=image / KERNEL, initramfs=image / INITRAMFS,
                rootfs=image / ROOTFS, overlay=directory / "overlay.qcow2", data_disk=None,
                vcpus=pool["resources"]["vcpus"], mem_mib=pool["resources"]["mem_mib"],
                nic=Nic(_TAP, network.mac(network.offsets[-1])),
            )  # fmt: skip
            yield ByHand(spec, accelerator)
        finally:
            shell.run(["ip", "link", "del", _TAP])
