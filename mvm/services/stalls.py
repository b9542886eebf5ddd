"""Guests that stand still though they should run: their VMMs are asked, told of, and let go on as soon as they can."""

from __future__ import annotations

import structlog

from mvm.domain.findings import Stalled, Then
from mvm.domain.instance import Instance
from mvm.domain.job import Job
from mvm.domain.vmm import VmmState, ending_of, has_room, told, why_still
from mvm.errors import MvmError
from mvm.ports.storage import NodeStorage
from mvm.ports.vmm import Snapshotting, VmmDriver
from mvm.services.lifecycle import Lifecycle

log = structlog.get_logger("mvm.stalls")


class Stalls:
    """What the health sweep makes of guests that do not answer: it is their VMMs that know why."""

    def __init__(self, vmm: VmmDriver, storage: NodeStorage, lifecycle: Lifecycle) -> None:
        self._vmm = vmm
        self._storage = storage
        self._lifecycle = lifecycle

    def state(self, instance: Instance) -> VmmState:
        """What the VMM of a running instance says; `RUNNING` also when it says nothing, which is another's business."""
        if instance.process is None:
            return VmmState.RUNNING
        try:
            return self._vmm.state(instance.ref, instance.process)
        except MvmError as error:
            log.info("VMM not asked", instance=str(instance.ref), code=error.code)
            return VmmState.RUNNING

    def meet(self, job: Job, instance: Instance, state: VmmState) -> Stalled | None:
        """What came of an instance whose VMM says `state`, if that is why its guest does not answer."""
        if not (state.stands_still or state.over):
            return None
        try:
            found = self._ended(job, instance, state) if state.over else self._still(job, instance, state)
        except MvmError as error:  # a job holds it, or its VMM does not answer: the next sweep sees
            found = Stalled(str(instance.ref), state, Then.LEFT, why=error.message)
        then = found.then.value
        log.warning("guest stands still", instance=found.ref, state=state.value, then=then, why=found.why)
        return found

    def over(self, job: Job, instance: Instance) -> None:
        """A guest that stood still answers again."""
        try:
            self._lifecycle.let_go_on(job, instance, "its guest answers again")
        except MvmError as error:
            log.info("still told as standing still", instance=str(instance.ref), code=error.code)

    def _ended(self, job: Job, instance: Instance, state: VmmState) -> Stalled:
        ended = ending_of(state)
        words, code = told(ended, instance.process.pid if instance.process else None)
        reason = f"{words}; its VMM said {state.value}"
        if self._lifecycle.mark_gone(job, instance, reason, ended, code):
            return Stalled(str(instance.ref), state, Then.STOPPED, ended)
        return Stalled(str(instance.ref), state, Then.CHANGED)

    def _still(self, job: Job, instance: Instance, state: VmmState) -> Stalled:
        return Stalled(str(instance.ref), state, self._let_go_on(job, instance, state))

    def _let_go_on(self, job: Job, instance: Instance, state: VmmState) -> Then:
        """What comes of letting it go on, if it may; that it does not is recorded once."""
        reason, code = why_still(state)
        wants_room = state is VmmState.IO_ERROR and not has_room(self._storage.space().free)
        if (
            not wants_room
            and isinstance(self._vmm, Snapshotting)
            and self._lifecycle.let_go_on(job, instance, f"{reason}; that is over")
        ):
            return Then.GOES_ON
        if instance.stalled is not state and not self._lifecycle.mark_stalled(job, instance, state, reason, code):
            return Then.CHANGED
        return Then.NO_ROOM if wants_room else Then.STANDS_STILL
