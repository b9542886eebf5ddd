"""Control groups: what a VMM may use of the host, and ending all of it at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from mvm.domain.ids import InstanceRef


@dataclass(frozen=True, slots=True)
class GroupLimits:
    """The most that the processes of a group may use together: memory in MiB, CPUs, processes and threads."""

    memory_mib: int
    cpus: float
    pids: int


class Cgroups(Protocol):
    """One group per instance, of this state directory. Raises `Failed` (``cgroup.failed``) when the kernel refuses."""

    def missing(self) -> Mapping[str, str]:
        """Which of ``memory``, ``cpu`` and ``pids`` this host cannot limit, and why. They are then not limited."""
        ...

    def joining(self, ref: InstanceRef, limits: GroupLimits) -> AbstractContextManager[Sequence[int]]:
        """A fresh group with `limits` is there: open files, to all of which a process writes ``0`` to become one of it.

        It has one thread then. They are closed at the end of the block. Raises `Failed` when a group of `ref` still
        has processes.
        """
        ...

    def remove(self, ref: InstanceRef) -> None:
        """Whatever is left of its processes is killed and the group is gone; may be repeated.

        Raises `TimedOut` (``cgroup.busy``) when the kernel does not let them go.
        """
        ...

    def out_of_memory(self, ref: InstanceRef) -> int:
        """How many of its processes the kernel has ended for want of memory; 0 where there is no such group."""
        ...

    def groups(self) -> frozenset[InstanceRef]:
        """Whose groups there are."""
        ...
