"""What the state directory's files take of the disk, by what they are and whose."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mvm.domain.disk import Kind, Space, Stored
from mvm.domain.ids import PoolId, PoolRef, Revision, TenantId
from mvm.domain.layout import StateLayout
from mvm.drivers.extents import SharedExtents
from mvm.errors import Failed, InvalidInput

_MOUNTS = Path("/proc/self/mountinfo")
_ESCAPED = re.compile(r"\\([0-7]{3})")
_BLOCK = 512  # what `st_blocks` counts in, whatever the file system's own are
_OF_INSTANCE = {"overlay.qcow2": Kind.OVERLAY, "data.img": Kind.DATA_DISK}
_LARGE = 1 << 16  # smaller files are not worth the question what they share


@dataclass(slots=True)
class _Sum:
    bytes: int = 0
    shared: int = 0


def measure(layout: StateLayout) -> Sequence[Stored]:
    """See `NodeStorage.usage`. Sparse files count by what is allocated; hard links and shared extents once."""
    found: dict[tuple[Kind, str, PoolRef | None, Revision | None], _Sum] = {}
    seen: set[tuple[int, int]] = set()
    extents = SharedExtents()
    for path, stat in _walk(str(layout.root)):
        what = found.setdefault(_what(Path(path).relative_to(layout.root)), _Sum())
        taken = stat.st_blocks * _BLOCK
        if (stat.st_dev, stat.st_ino) in seen:
            what.shared += taken
            continue
        seen.add((stat.st_dev, stat.st_ino))
        again = extents.again(path, stat) if taken >= _LARGE else 0
        what.bytes += taken - again
        what.shared += again
    return [
        Stored(kind, name, each.bytes, each.shared, pool, revision)
        for (kind, name, pool, revision), each in found.items()
    ]


def space(layout: StateLayout) -> Space:
    """See `NodeStorage.space`."""
    found: dict[int, Space] = {}
    for directory in (layout.root, layout.images, layout.templates, layout.instances):
        with suppress(FileNotFoundError):
            stat = os.statvfs(directory)
            free, total = stat.f_bavail * stat.f_frsize, stat.f_blocks * stat.f_frsize
            found.setdefault(directory.stat().st_dev, Space(str(directory), total, free))
    if not found:
        raise Failed("storage.failed", f"{layout.root}: there is no such directory", hint="start the stack: mvm up")
    return min(found.values(), key=lambda each: each.free)


def mounted_within(directory: Path) -> Path | None:
    """Where in `directory`, or at it, something is mounted."""
    points = (line.split()[4] for line in _MOUNTS.read_text().splitlines())
    found = (Path(_ESCAPED.sub(lambda code: chr(int(code[1], 8)), point)) for point in points)
    real = directory.resolve()
    return next((point for point in found if point.is_relative_to(real)), None)


def _walk(directory: str, *, top: bool = True) -> Iterator[tuple[str, os.stat_result]]:
    """Everything below. Links are followed right below the top only: somebody may have put a part of it elsewhere."""
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(directory) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):  # it went away meanwhile
                yield entry.path, entry.stat(follow_symlinks=False)
                if entry.is_dir(follow_symlinks=top):
                    yield from _walk(entry.path, top=False)


def _what(path: Path) -> tuple[Kind, str, PoolRef | None, Revision | None]:
    match path.parts:
        case ("images", name, *_) if not name.startswith("."):
            return Kind.REVISION, name, None, _revision(name)
        case ("images", name, *_) if name.startswith(".build-"):
            return Kind.CACHE, f"images/{name}", None, None
        case ("templates", tenant, pool, name, *_):
            return Kind.TEMPLATE, str(Path("templates", tenant, pool, name)), _pool(tenant, pool), _revision(name)
        case ("instances", tenant, pool, name, file, *_):
            return _of_instance(file), str(Path(tenant, pool, name)), _pool(tenant, pool), None
        case ("logs", *_):
            return Kind.LOG, "logs", None, None
        case ("cache", *_):
            return Kind.CACHE, "cache", None, None
        case _:
            return Kind.OTHER, path.parts[0], None, None


def _of_instance(file: str) -> Kind:
    if file.startswith("snapshot"):
        return Kind.SNAPSHOT
    return _OF_INSTANCE.get(file, Kind.LOG if file.endswith(".log") else Kind.OTHER)


def _pool(tenant: str, pool: str) -> PoolRef | None:
    with suppress(InvalidInput):
        return PoolRef(TenantId(tenant), PoolId(pool))
    return None


def _revision(name: str) -> Revision | None:
    with suppress(InvalidInput):
        return Revision(name)
    return None
