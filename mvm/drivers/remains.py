"""What runs on of a state directory's instances, whether or not its stack is there."""

from __future__ import annotations

import json
from collections.abc import Sequence

from mvm.domain.addressing import tap_uid
from mvm.domain.layout import StateLayout
from mvm.drivers import netns, processes, store_glance
from mvm.drivers.shell import LocalShell


def remaining(layout: StateLayout, namespace: str | None) -> Sequence[str]:
    """What shows that a microVM runs on, a line each for people; empty when none does.

    `namespace` is where its network is: a name, or None for the caller's own. Asked are the store, whose processes are
    looked for, and the host: VMMs with the directory's mark, and TAPs that somebody holds. One of them is enough.
    """
    return (*_recorded(layout), *_marked(layout), *_held_taps(namespace))


def recorded_up(layout: StateLayout) -> Sequence[str]:
    """Those that have a VMM by the store, for a driver whose VMMs are no processes of this host."""
    return [str(one.ref) for one in store_glance.instances(layout.database) if one.has_vmm]


def _recorded(layout: StateLayout) -> Sequence[str]:
    found = store_glance.instances(layout.database)
    return [f"process {one.process.pid} of {one.ref}" for one in found if one.process and processes.runs(one.process)]


def _marked(layout: StateLayout) -> Sequence[str]:
    from mvm.drivers.qemu.vmms import QemuVmms  # much to load for a command

    found = QemuVmms(layout, LocalShell()).processes()
    return [f"process {process.pid} of {ref}" for ref, several in found.items() for process in several]


def _held_taps(namespace: str | None) -> Sequence[str]:
    """A TAP has a carrier while a process has it open. In the host's own namespace it may be another stack's."""
    if namespace is None or not netns.exists(namespace):
        return []
    links = json.loads(LocalShell(netns.path_of(namespace)).run(["ip", "-j", "link", "show"]).stdout or "[]")
    held = [link["ifname"] for link in links if link and "LOWER_UP" in link.get("flags", ())]
    return [f"TAP {name}" for name in held if tap_uid(name) is not None]
