"""Bugs to be found: each a way in which fleets of this kind really fail, put in for the time of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

from mvm.domain import scaling
from mvm.domain.identity import Identity
from mvm.domain.ids import InstanceRef
from mvm.domain.instance import ProcessIdentity
from mvm.domain.lifecycle import Status
from mvm.drivers.fake.machines import FakeVmm
from mvm.ports.vmm import Presence
from mvm.services.lifecycle import Lifecycle
from mvm.services.snapshots import Snapshots
from tests.simulation.broker import Message, SimQueue


@contextmanager
def drop_the_lock() -> Iterator[None]:
    """Two jobs work on one instance at once."""
    with patch.object(Lifecycle, "_locked", lambda self, ref: nullcontext()):
        yield


@contextmanager
def ack_early() -> Iterator[None]:
    """A message is gone once a worker has it, not once the job has ended."""
    take = SimQueue.take

    def taken(self: SimQueue, message: Message, by: str) -> None:
        take(self, message, by)
        self.ack(message)

    with patch.object(SimQueue, "take", taken):
        yield


@contextmanager
def forget_an_undo() -> Iterator[None]:
    """What a start has made stays when it fails."""
    with patch.object(Lifecycle, "_undo_start", lambda self, ref, network: None):
        yield


@contextmanager
def count_ready_as_gone() -> Iterator[None]:
    """What has been made and never ran is not seen by those who count."""
    scale = scaling.scale

    def blind(need: Any, observed: Any, room: Any, **words: Any) -> scaling.Scaled:
        return scale(need, [i for i in observed if i.status is not Status.READY], room, **words)

    with patch("mvm.domain.planner.scale", blind), patch("mvm.services.reconcile.scale", blind):
        yield


@contextmanager
def compare_pid_only() -> Iterator[None]:
    """A process that has the pid of one that ended is taken for it."""

    def observe(self: FakeVmm, ref: InstanceRef, process: ProcessIdentity | None) -> Presence:
        pids = {machine.process.pid for machine in self._host.machines.values()}
        if process is None:
            return Presence.PRESENT if ref in self._host.machines else Presence.ABSENT
        return Presence.PRESENT if process.pid in pids else Presence.ABSENT

    with patch.object(FakeVmm, "observe", observe):
        yield


@contextmanager
def stop_what_stands_still() -> Iterator[None]:
    """A warm instance is ended as it is, with what its guest has not written yet."""
    with patch.object(Snapshots, "let_run", lambda self, instance, deadline_s: True):
        yield


@contextmanager
def go_by_another_name() -> Iterator[None]:
    """A node whose host was renamed comes up all the same, and its pools are another node's."""
    with patch.object(Identity, "check_node", lambda self, node_id: None):
        yield


PLANTED: Mapping[str, Callable[[], AbstractContextManager[None]]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        drop_the_lock,
        ack_early,
        forget_an_undo,
        count_ready_as_gone,
        compare_pid_only,
        stop_what_stands_still,
        go_by_another_name,
    )
}
