"""Taking a backup while the node is at work."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO

from mvm.domain import lock_names
from mvm.domain.backup import About, Found, as_restored, found, job_as_restored
from mvm.domain.ids import InstanceRef, NodeId, TenantId
from mvm.domain.instance import Instance
from mvm.domain.job import Job
from mvm.domain.layout import STATE_VERSION, StateLayout
from mvm.domain.lifecycle import Status
from mvm.drivers.backup.archive import Writer
from mvm.drivers.backup.restoring import failed
from mvm.drivers.files import sync
from mvm.errors import Failed, Forbidden, NotAllowed, NotFound, TimedOut
from mvm.ports.clock import Clock
from mvm.ports.locks import Locks
from mvm.ports.store import NodeStore
from mvm.ports.vmm import DiskCopying, Presence, Snapshotting, VmmDriver

Report = Callable[[str], None]
_LOCK_S = 300.0  # for a job that is at an instance to end
_OWN, _OVERLAY, _DATA, _SNAPSHOT = ("ssh_host_key", "console.log"), "overlay.qcow2", "data.img", "snapshot"
_MIB = 1 << 20


@dataclass(frozen=True)
class Taking:
    """Takes backups of one node. Jobs go on meanwhile: only the instance that is being copied waits."""

    layout: StateLayout
    node_id: NodeId
    store: NodeStore
    locks: Locks
    vmm: VmmDriver
    clock: Clock
    shared: bool = False  # the node has its registry or its broker together with others

    def take(self, into: Path, report: Report) -> About:
        """The file `into`, complete and on the disk, or nothing.

        Raises `NotAllowed` (``backup.exists``, ``backup.busy``), `Failed` (``disk.full``, ``backup.failed``) and
        `TimedOut` (``lock.busy``) when a job does not let go of its instance.
        """
        if into.exists():
            raise NotAllowed("backup.exists", f"{into} exists already", hint="choose another name", path=str(into))
        draft = into.with_name(f".{into.name}.partial")
        try:
            with self._room() as room, _new(draft) as file:
                about = About(self.node_id, self.clock.now(), STATE_VERSION, shared=self.shared)
                writer = Writer(file, about)
                self._write(writer, room, about.taken_at, report)
                writer.close()
                file.flush()
                os.fsync(file.fileno())
            draft.rename(into)
            sync(into.parent)
        except PermissionError as error:
            raise Forbidden(
                "permission.denied", f"{error.filename}: permission denied", hint="run it as root"
            ) from None
        except OSError as error:
            raise failed(error) from None
        finally:
            draft.unlink(missing_ok=True)
        return about

    def _write(self, writer: Writer, room: Path, taken_at: datetime, report: Report) -> None:
        copy = room / self.layout.database.name
        trails = self._store_and_trails(copy)
        for path, size in trails:
            writer.add(self._name(path), path, size=size)
        for folder in (self.layout.certs, self.layout.ssh_key.parent, self.layout.secrets):
            self._add_all(writer, folder)
        with closing(sqlite3.connect(copy, isolation_level=None)) as db:
            db.execute("BEGIN IMMEDIATE")
            instances = [InstanceRef.parse(ref) for (ref,) in db.execute("SELECT ref FROM instances ORDER BY ref")]
            for number, ref in enumerate(instances, 1):
                report(f"instance {number} of {len(instances)}: {ref}")
                self._add_instance(writer, room, ref, db, taken_at, report)
            _end_jobs(db, taken_at)
            db.execute("COMMIT")
            db.execute("PRAGMA journal_mode = DELETE")  # one file
        for revision in _folders(self.layout.images):
            report(f"revision {revision.name[:12]}")
            self._add_all(writer, revision)
        report("templates")
        self._add_all(writer, self.layout.templates)
        writer.add(self.layout.database.name, copy)

    def _store_and_trails(self, copy: Path) -> Sequence[tuple[Path, int]]:
        """A copy of the store, and the audit trails as they were in that moment: each file and its length.

        While a trail's lock is held, it and the lines that the store has for it make up the whole.
        """
        copy.touch(0o600)
        with ExitStack() as held:
            for folder in _folders(self.layout.audit):
                held.enter_context(self.locks.hold(lock_names.trail(TenantId(folder.name)), deadline_s=_LOCK_S))
            with closing(sqlite3.connect(self.layout.database)) as live, closing(sqlite3.connect(copy)) as db:
                live.backup(db)
            files = sorted(path for path in self.layout.audit.rglob("*") if path.is_file())
            return [(path, path.stat().st_size) for path in files]

    def _add_instance(
        self, writer: Writer, room: Path, ref: InstanceRef, db: sqlite3.Connection, taken_at: datetime, report: Report
    ) -> None:
        """Its files and, in the copy of the store, its record as they are while no job is at it."""
        with self.locks.hold(lock_names.instance(ref), deadline_s=_LOCK_S):
            try:
                instance = self.store.instance(ref)
            except NotFound:
                db.execute("DELETE FROM instances WHERE ref = ?", (str(ref),))
                db.execute("DELETE FROM notes WHERE ref = ?", (str(ref),))
                return
            has_vmm = self.vmm.observe(instance.ref, instance.process) is not Presence.ABSENT
            lost = self._lost(instance) if instance.status is Status.SLEEPING else None
            how = found(instance, has_vmm=has_vmm, wakes=lost is None)
            if how is Found.LOST:
                report(f"WARNING: {ref} sleeps and cannot be woken; it is stopped in the backup: {lost}")
            directory = self.layout.instance(ref)
            for name in _OWN:
                with suppress(FileNotFoundError):
                    writer.add(self._name(directory / name), directory / name)
            if (directory / _DATA).exists():
                with self._still(instance, directory / _DATA, how, room) as disk:
                    writer.add(self._name(directory / _DATA), disk)
            if how is Found.ASLEEP:
                writer.add(self._name(directory / _OVERLAY), directory / _OVERLAY)
                self._add_all(writer, directory / _SNAPSHOT)
        kept = as_restored(instance, how, taken_at, lost or "")
        db.execute("UPDATE instances SET doc = ? WHERE ref = ?", (json.dumps(kept.to_dict()), str(ref)))

    def _lost(self, instance: Instance) -> str | None:
        """Why one that sleeps cannot be woken, as far as sizes tell; None when nothing is amiss."""
        overlay = self.layout.instance(instance.ref) / _OVERLAY
        if not overlay.exists():
            return f"{overlay} is missing"
        if not isinstance(self.vmm, Snapshotting):
            return None
        parts = [self.layout.snapshot(instance.ref)]
        if instance.cloned and instance.revision is not None:
            parts.append(self.layout.template(instance.ref.pool_ref, instance.revision))
        try:
            for part in parts:
                for name, wanted in self.vmm.manifest(part).files.items():
                    found_size = (part / name).stat().st_size
                    if found_size != wanted.size:
                        return f"{part / name} has {found_size} bytes instead of {wanted.size}"
        except FileNotFoundError as error:
            return f"{error.filename} is missing"
        except (NotFound, Failed) as error:
            return error.message
        return None

    @contextmanager
    def _still(self, instance: Instance, disk: Path, how: Found, room: Path) -> Iterator[Path]:
        """A disk that nobody writes to: itself, or a copy of it as it is at one instant."""
        if how is not Found.IN_USE:
            yield disk
            return
        if not isinstance(self.vmm, DiskCopying) or instance.process is None:
            raise NotAllowed(
                "backup.in_use", f"the disk of {instance.ref} is in use and the VMM cannot copy it",
                hint=f"mvm instance stop {instance.ref}", subject=str(instance.ref),
            )  # fmt: skip
        free = os.statvfs(room)
        if free.f_bavail * free.f_frsize < disk.stat().st_size:
            raise Failed(
                "disk.full", f"there is no room in {room} for a copy of the disk of {instance.ref}, which is in use",
                hint="free some space, or stop it for the backup", subject=str(instance.ref),
            )  # fmt: skip
        copy = room / _DATA
        try:
            self.vmm.copy_data_disk(instance.ref, instance.process, disk, copy)
            yield copy
        finally:
            copy.unlink(missing_ok=True)

    def _add_all(self, writer: Writer, folder: Path) -> None:
        """Every file below `folder`; what is half made is left out."""
        for path in sorted(folder.rglob("*")):
            inside = path.relative_to(folder).parts
            half_made = any(part.startswith(".") or part.endswith((".new", ".tmp", ".lock")) for part in inside)
            if path.is_file() and not path.is_symlink() and not half_made:
                writer.add(self._name(path), path)

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self.layout.root))

    @contextmanager
    def _room(self) -> Iterator[Path]:
        """A directory for copies, which only one backup has at a time."""
        with ExitStack() as held:
            try:
                held.enter_context(self.locks.hold(lock_names.BACKUP, deadline_s=0))
            except TimedOut:
                raise NotAllowed(
                    "backup.busy", "another backup of this node is being taken", hint="wait for it"
                ) from None
            room = self.layout.run / "backup"
            self.layout.run.mkdir(mode=0o700, exist_ok=True)
            shutil.rmtree(room, ignore_errors=True)  # of one that was killed
            room.mkdir(mode=0o700)
            try:
                yield room
            finally:
                shutil.rmtree(room, ignore_errors=True)


def _end_jobs(db: sqlite3.Connection, taken_at: datetime) -> None:
    for job_id, doc in db.execute("SELECT id, doc FROM jobs WHERE final = 0").fetchall():
        ended = job_as_restored(Job.from_dict(json.loads(doc)), taken_at)
        db.execute("UPDATE jobs SET final = 1, doc = ? WHERE id = ?", (ended.to_json(), job_id))


def _folders(directory: Path) -> list[Path]:
    """Those in it by name, but what is half made."""
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if path.is_dir() and not path.name.startswith("."))


@contextmanager
def _new(path: Path) -> Iterator[IO[bytes]]:
    path.unlink(missing_ok=True)  # of one that was killed
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        yield file
