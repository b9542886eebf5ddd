"""What SQLite's errors mean for whoever asked the store."""

from __future__ import annotations

import errno
import sqlite3
from pathlib import Path

from mvm.errors import Failed, MvmError, TimedOut

_KIND = 0xFF  # of an extended code: its last byte is the primary one

# Somebody else has it, and will not for ever. PROTOCOL: the locks of the write-ahead log were raced for in vain.
_BUSY = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL})
_DAMAGED = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_UNWRITABLE = frozenset(
    {sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH, sqlite3.SQLITE_NOLFS}
)


def translated(path: Path, error: sqlite3.Error) -> MvmError:
    """`TimedOut` (``store.busy``) is tried again; `Failed`: ``disk.full``, ``store.damaged``, ``store.failed``."""
    message = f"the node's store {path}: {error}"
    kind = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & _KIND
    if kind in _BUSY:
        return TimedOut("store.busy", message, hint="another program holds its lock; who is it? fuser " + str(path))
    if kind == sqlite3.SQLITE_FULL:
        return full(path, str(error))
    if kind in _DAMAGED:
        hint = "mvm down, move the state directory away, and restore the last backup: mvm backup restore FILE"
        return Failed("store.damaged", message, hint=hint)
    if kind in _UNWRITABLE:
        return Failed("store.failed", message, hint="look at the file's permissions and at how its disk is mounted")
    if kind == sqlite3.SQLITE_IOERR:
        return Failed("store.failed", message, hint="the disk failed: look at the kernel's log")
    return Failed("store.failed", message, hint="look at the file's permissions and the disk")


def of_disk(path: Path, error: OSError) -> MvmError:
    """The disk did not take what was committed."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return full(path, error.strerror or "no space")
    return Failed("store.failed", f"the node's store {path}: {error.strerror}",
                  hint="the disk failed: look at the kernel's log")  # fmt: skip


def full(path: Path, why: str) -> Failed:
    """There is no room for it."""
    return Failed("disk.full", f"the node's store {path}: {why}", hint="free some space")
