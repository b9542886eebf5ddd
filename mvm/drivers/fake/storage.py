"""The fake host's files."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from mvm.domain.disk import Kind, Space, Stored, Template
from mvm.domain.ids import InstanceRef, PoolId, PoolRef, Revision, TenantId
from mvm.drivers.fake.state import Files, Part, point
from mvm.errors import Failed, NotFound
from mvm.ports.storage import InstanceKeys, RevisionFiles

_SIZES = {Kind.REVISION: 200 << 20, Kind.TEMPLATE: 64 << 20, Kind.OVERLAY: 1 << 20, Kind.DATA_DISK: 4 << 20,
          Kind.SNAPSHOT: 8 << 20}  # fmt: skip


class FakeStorage(Part):
    """ports/storage.py. Paths lie below the host's layout; there is nothing at them."""

    def _files(self, ref: InstanceRef) -> Files:
        if ref not in self._host.files:
            raise Failed("storage.failed", f"{self.directory(ref)}: No such file or directory")
        return self._host.files[ref]

    def directory(self, ref: InstanceRef) -> Path:
        """See ports/storage.py."""
        return self._host.layout.instance(ref)

    @point("storage.prepare")
    def prepare(self, ref: InstanceRef, *, data_disk_mib: int) -> None:
        """See ports/storage.py."""
        if ref not in self._host.files:
            private = self._host.clock.random(64)
            keys = InstanceKeys(f"ssh-ed25519 {b64encode(private[32:]).decode()}", private)
            self._host.files[ref] = Files(keys, data_disk=False)
        self._host.files[ref].data_disk |= data_disk_mib > 0

    @point("storage.keys")
    def keys(self, ref: InstanceRef) -> InstanceKeys:
        """See ports/storage.py."""
        return self._files(ref).keys

    @point("storage.data_disk")
    def data_disk(self, ref: InstanceRef) -> Path | None:
        """See ports/storage.py."""
        files = self._host.files.get(ref)
        return self.directory(ref) / "data.img" if files and files.data_disk else None

    @point("storage.fresh_overlay")
    def fresh_overlay(self, ref: InstanceRef, rootfs: Path) -> Path:
        """See ports/storage.py."""
        self._files(ref).runtime.add("overlay.qcow2")
        return self.directory(ref) / "overlay.qcow2"

    def overlay(self, ref: InstanceRef) -> Path:
        """See ports/storage.py."""
        return self.directory(ref) / "overlay.qcow2"

    @point("storage.clean_runtime")
    def clean_runtime(self, ref: InstanceRef) -> None:
        """See ports/storage.py."""
        if ref in self._host.files:
            self._host.files[ref].runtime.clear()

    @point("storage.remove")
    def remove(self, ref: InstanceRef) -> None:
        """See ports/storage.py."""
        self._host.files.pop(ref, None)
        self._host.consoles.pop(self.directory(ref), None)

    def template(self, pool: PoolRef, revision: Revision) -> Path:
        """See ports/storage.py."""
        return self._host.layout.template(pool, revision)

    def snapshot(self, ref: InstanceRef) -> Path:
        """See ports/storage.py."""
        return self._host.layout.snapshot(ref)

    @point("storage.drop_templates")
    def drop_templates(self, pool: PoolRef) -> None:
        """See ports/storage.py."""
        below = self._host.layout.templates / pool.tenant / pool.pool
        for path in [path for path in self._host.saved if path.is_relative_to(below)]:
            del self._host.saved[path]

    @point("storage.instances")
    def instances(self) -> frozenset[InstanceRef]:
        """See ports/storage.py."""
        return frozenset(self._host.files)

    def not_ours(self, ref: InstanceRef) -> str | None:
        """See ports/storage.py."""
        return self._host.mounts.get(ref)

    @point("storage.leftovers")
    def leftovers(self) -> Mapping[InstanceRef, Sequence[str]]:
        """See ports/storage.py."""
        return {ref: sorted(files.runtime) for ref, files in self._host.files.items() if files.runtime}

    @point("storage.revision")
    def revision(self, revision: Revision) -> RevisionFiles:
        """See ports/storage.py."""
        if revision not in self._host.revisions:
            raise NotFound(
                "revision.not_found", f"revision {revision.short} is not on this node", hint="build it again"
            )
        if revision in self._host.damaged:
            raise Failed("revision.damaged", f"revision {revision.short}: rootfs.ext4 differs from its manifest")
        at = self._host.layout.revision(revision)
        return RevisionFiles(at / "vmlinux", at / "initramfs.cpio", at / "rootfs.ext4")

    @point("storage.revisions")
    def revisions(self) -> frozenset[Revision]:
        """See ports/storage.py."""
        return frozenset(self._host.revisions)

    @point("storage.remove_revision")
    def remove_revision(self, revision: Revision) -> None:
        """See ports/storage.py."""
        self._host.revisions.discard(revision)
        self._host.damaged.discard(revision)

    @point("storage.templates")
    def templates(self) -> frozenset[Template]:
        """See ports/storage.py."""
        return frozenset(found for path in self._host.saved if (found := self._template(path)))

    def _template(self, path: Path) -> Template | None:
        with suppress(ValueError):
            tenant, pool, revision = path.relative_to(self._host.layout.templates).parts
            return PoolRef(TenantId(tenant), PoolId(pool)), Revision(revision)
        return None

    @point("storage.remove_template")
    def remove_template(self, pool: PoolRef, revision: Revision) -> None:
        """See ports/storage.py."""
        self._host.saved.pop(self._host.layout.template(pool, revision), None)

    @point("storage.remove_packages")
    def remove_packages(self, needed: Collection[Revision]) -> int:
        """See ports/storage.py. It caches none."""
        return 0

    def shared_with_others(self) -> str | None:
        """See ports/storage.py."""
        return None

    @point("storage.usage")
    def usage(self) -> Sequence[Stored]:
        """See ports/storage.py. All things of a kind are as large."""
        return list(self._stored())

    def _stored(self) -> Iterator[Stored]:
        host = self._host
        for revision in sorted(host.revisions):
            yield Stored(Kind.REVISION, revision, _SIZES[Kind.REVISION], revision=revision)
        for path in sorted(host.saved):
            if found := self._template(path):
                pool, of = found
                yield Stored(Kind.TEMPLATE, f"templates/{pool}/{of}", _SIZES[Kind.TEMPLATE], pool=pool, revision=of)
        for ref, files in sorted(host.files.items()):
            kinds = [Kind.DATA_DISK] if files.data_disk else []
            kinds += [Kind.OVERLAY] if files.runtime else []
            kinds += [Kind.SNAPSHOT] if host.layout.snapshot(ref) in host.saved else []
            yield from (Stored(kind, str(ref), _SIZES[kind], pool=ref.pool_ref) for kind in kinds)

    @point("storage.space")
    def space(self) -> Space:
        """See ports/storage.py. What is stored has no influence: `disk_free` says how much is left."""
        return Space(str(self._host.layout.root), 1 << 40, self._host.disk_free)
