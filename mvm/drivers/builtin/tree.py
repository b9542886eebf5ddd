"""A file system's content in memory, before it becomes an archive or an image. Everything is owned by root."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mvm.errors import Failed

EPOCH = 1_700_000_000  # every file's times, so that images do not depend on when they were built


@dataclass(frozen=True, slots=True)
class Entry:
    """One file: `mode` with its type bits; `data` is a link's target, empty for directories."""

    mode: int
    data: bytes = b""


class Tree:
    """Entries by relative path. Parents come by themselves; the last one added under a path wins."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}

    def __getitem__(self, path: str) -> Entry:
        return self._entries[path]

    def __contains__(self, path: str) -> bool:
        return path in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def items(self) -> Iterator[tuple[str, Entry]]:
        """All entries by path, parents before their children."""
        return iter(sorted(self._entries.items()))

    def directory(self, path: str, mode: int = 0o755) -> None:
        """Add a directory, or set its mode."""
        self._add(path, Entry(stat.S_IFDIR | mode))

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Add a regular file."""
        self._add(path, Entry(stat.S_IFREG | mode, data))

    def link(self, path: str, target: str) -> None:
        """Add a symbolic link."""
        self._add(path, Entry(stat.S_IFLNK | 0o777, target.encode()))

    def merge(self, other: Tree, keep: Callable[[str], bool]) -> None:
        """Add the entries of `other` whose path `keep` accepts."""
        for path, entry in other.items():
            if keep(path):
                self._add(path, entry)

    def _add(self, path: str, entry: Entry) -> None:
        parts = path.split("/")
        if not path.isprintable() or '"' in path or not all(part not in ("", ".", "..") for part in parts):
            raise Failed("image.build_failed", f"a package holds a file with the unusable name {path!r}")
        for depth in range(1, len(parts)):
            self._entries.setdefault("/".join(parts[:depth]), Entry(stat.S_IFDIR | 0o755))
        self._entries[path] = entry
