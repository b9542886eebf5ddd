"""What runs on of a state directory's instances, whether or not its stack is there."""

from __future__ import annotations

from collections.abc import Sequence

from mvm.domain.ids import InstanceRef
from mvm.domain.layout import StateLayout
from mvm.drivers import claims, identity, netns, processes, store_glance
from mvm.drivers.shell import LocalShell


def remaining(layout: StateLayout, namespace: str | None) -> Sequence[str]:
    """What shows that a microVM runs on, a line each for people; empty when none does.

    `namespace` is where its network is: a name, or None for the caller's own. Asked are the store, whose processes are
    looked for, and the host: VMMs with the directory's mark, and TAPs that somebody holds. One of them is enough.
    """
    return (*vmms(layout), *_held_taps(layout, namespace))


def vmms(layout: StateLayout) -> Sequence[str]:
    """Those signs that are processes: they are the directory's wherever their network is."""
    return (*_recorded(layout), *_marked(layout))


def cut_off(layout: StateLayout, namespace: str | None) -> Sequence[InstanceRef]:
    """Instances whose VMMs run on, and have lost their network: none of its TAPs in `namespace` is theirs any more."""
    there = [one for one in store_glance.instances(layout.database) if one.process and processes.runs(one.process)]
    own = [one for one in there if one.process and not _others(layout, one.process.pid)]
    if not own:
        return []
    held = frozenset(claims.held_taps(namespace))
    networks = {tenant.id: tenant.network for tenant in store_glance.tenants(layout.database)}
    return [
        one.ref for one in own if one.ref.tenant in networks and networks[one.ref.tenant].tap(one.offset) not in held
    ]


def recorded_up(layout: StateLayout) -> Sequence[str]:
    """Those that have a VMM by the store, for a driver whose VMMs are no processes of this host."""
    return [str(one.ref) for one in store_glance.instances(layout.database) if one.has_vmm]


def _recorded(layout: StateLayout) -> Sequence[str]:
    """In a copy the store has recorded the original's, which bear its mark."""
    found = store_glance.instances(layout.database)
    return [
        f"process {one.process.pid} of {one.ref}"
        for one in found
        if one.process and processes.runs(one.process) and not _others(layout, one.process.pid)
    ]


def _others(layout: StateLayout, pid: int) -> bool:
    from mvm.drivers.qemu import argv

    bears = argv.mark_in(processes.arguments(pid))
    return identity.is_copy(layout) if bears is None else bears != identity.mark(layout)


def _marked(layout: StateLayout) -> Sequence[str]:
    from mvm.drivers.qemu.vmms import QemuVmms  # much to load for a command

    found = QemuVmms(layout, LocalShell()).processes()
    return [f"process {process.pid} of {ref}" for ref, several in found.items() for process in several]


def _held_taps(layout: StateLayout, namespace: str | None) -> Sequence[str]:
    """A TAP has a carrier while a process has it open. In the host's own namespace it may be another stack's."""
    if namespace is None or not netns.exists(namespace) or not owns(layout, namespace):
        return []
    return [f"TAP {name}" for name in claims.held_taps(namespace)]


def owns(layout: StateLayout, namespace: str | None) -> bool:
    """Whether `namespace`, which is there, can be this directory's: nobody else has claimed it.

    Of one that nobody has claimed, as by an older mvm, a copy knows from its original alone.
    """
    claim = claims.holder(namespace)
    return not identity.is_copy(layout) if claim is None else claim.mark == identity.mark(layout)
