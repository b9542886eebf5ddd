"""A backup of the simulated node, and a new host that has nothing but it."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mvm.domain.backup import Found, as_restored, found, job_as_restored
from mvm.domain.ids import InstanceRef
from tests.simulation.broker import SimQueue, SimRegistry
from tests.simulation.host import TrueTime
from tests.simulation.store import MemoryStore

if TYPE_CHECKING:
    from tests.simulation.world import World

_HOST = ("files", "saved", "spoilt", "revisions", "trails", "kept_secrets")


@dataclass(frozen=True)
class Backup:
    """What `mvm.drivers.backup` would have in its file."""

    store: MemoryStore
    host: dict[str, Any]


def take(world: World) -> Backup | None:
    """A backup of all, or None when a job is at an instance: a real one waits for it."""
    if any(name.startswith("instance ") for name in world.locks.held):
        return None
    store = world.store.copy(lambda _: None)
    how = {
        ref: found(row, has_vmm=ref in world.host.machines, wakes=world.host.layout.snapshot(ref) in world.host.saved)
        for ref, row in world.rows().items()
    }
    now = world.clock.now()
    store._instances = {ref: as_restored(row, how[ref], now) for ref, row in world.rows().items()}
    store._jobs = {key: job if job.state.final else job_as_restored(job, now) for key, job in store._jobs.items()}
    host = {name: copy(getattr(world.host, name)) for name in _HOST}
    host["trails"] = {tenant: bytes(trail) for tenant, trail in world.host.trails.items()}
    host["files"] = {ref: files for ref, files in host["files"].items() if ref in how}
    for ref, files in host["files"].items():
        kept = set(files.runtime) if how[ref] is Found.ASLEEP else set()
        host["files"][ref] = replace(files, runtime=kept)
    _drop_snapshots(world, host["saved"], {ref for ref, each in how.items() if each is Found.ASLEEP})
    return Backup(store, host)


def put_back(world: World, backup: Backup) -> None:
    """The old host is gone; a new one has what the backup has, and a Redis that knows nothing."""
    for process in (*world.processes.values(), *world.others):
        world.kill(process)
    world.host.reboot()
    for name, value in backup.host.items():
        setattr(world.host, name, copy(value))
    world.host.files = {ref: replace(files, runtime=set(files.runtime)) for ref, files in world.host.files.items()}
    world.host.trails = {tenant: bytearray(trail) for tenant, trail in world.host.trails.items()}
    world.store.become(backup.store)
    world.registry.set_state(SimRegistry(TrueTime(world.clock), lambda _: None).state())
    world.queue.set_state(SimQueue(lambda: 0.0, world.clock.now, lambda _: None).state())
    world.redis_down, world.forgot = False, True
    world.past.clear()  # of another Redis
    world.excused.update(world.accepted)
    world.harmed.update(world.rows())


def _drop_snapshots(world: World, saved: dict[Any, Any], asleep: set[InstanceRef]) -> None:
    keep = {world.host.layout.snapshot(ref) for ref in asleep}
    for path in [path for path, each in saved.items() if each.manifest.owner is not None and path not in keep]:
        del saved[path]
