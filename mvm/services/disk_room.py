"""Whether the disk has room for something large: what would leave too little is not begun."""

from __future__ import annotations

from mvm.domain.disk import Level, Watermarks, size
from mvm.domain.ids import InstanceRef
from mvm.domain.instance import Instance
from mvm.domain.lifecycle import Verb
from mvm.errors import QuotaExceeded, Unreachable
from mvm.ports.storage import NodeStorage
from mvm.ports.store import NodeStore
from mvm.ports.vmm import Snapshotting, VmmDriver

_BUILD = 500 << 20  # what an image needs while it is built


class DiskRoom:
    """Asked before a build, a template and a sleep. Raises `QuotaExceeded` (``disk.low``)."""

    def __init__(self, store: NodeStore, storage: NodeStorage, vmm: VmmDriver, marks: Watermarks) -> None:
        self._store = store
        self._storage = storage
        self._vmm = vmm
        self.marks = marks

    def left(self) -> int:
        """Bytes that may still be written; below 0 when less is free than is to be kept free."""
        return self._storage.space().free - self.marks.reserve

    def level(self) -> Level:
        """How the disk is."""
        return self.marks.level(self._storage.space().free)

    def has_room_to_build(self) -> bool:
        """Whether an image can be built."""
        return self.left() >= _BUILD

    def admit_build(self) -> None:
        """An image can be built."""
        self._admit("building an image", _BUILD)

    def admit_template(self, memory: int) -> None:
        """A template of a guest with so much memory can be made."""
        self._admit("making a template", memory)

    def admit_sleep(self, ref: InstanceRef, held: int) -> None:
        """What the VMM of `ref` holds in memory can be put on the disk, and what those hold that were admitted before.

        The caller holds `lock_names.DISK` until the job's next step says that it was admitted.
        """
        others = [each for each in self._store.instances() if each.ref != ref and self._is_promised(each)]
        self._admit(f"putting {ref} to sleep", held, sum(map(self._held, others)))

    def _is_promised(self, instance: Instance) -> bool:
        """Whether it falls asleep: not one that still asks for room, and may be refused."""
        if instance.in_flight is None or instance.in_flight.verb is not Verb.SLEEP:
            return False
        job = self._store.job(instance.in_flight.job_id)
        return job is not None and job.step is not None

    def _held(self, instance: Instance) -> int:
        if instance.process is None or not isinstance(self._vmm, Snapshotting):
            return 0
        try:
            return self._vmm.memory(instance.process).private
        except Unreachable:  # it is on the disk by now
            return 0

    def _admit(self, what: str, need: int, promised: int = 0) -> None:
        space, reserve = self._storage.space(), self.marks.reserve
        if space.free - promised - need >= reserve:
            return
        others = f", of which {size(promised)} are promised" if promised else ""
        raise QuotaExceeded(
            "disk.low",
            f"{what} may take {size(need)} of disk; {space.path} has {size(space.free)} free{others}, and "
            f"{size(reserve)} of it are kept free",
            hint="make room (mvm disk report, mvm disk clean), or lower MVM_DISK_RESERVE_MIB",
            path=space.path, free_bytes=space.free, need_bytes=need, promised_bytes=promised, reserve_bytes=reserve,
        )  # fmt: skip
