"""Restoring a backup into an empty state directory: all of it appears at once, or nothing."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from mvm.domain.backup import About, Entry
from mvm.domain.identity import Identity, Place
from mvm.domain.layout import StateLayout
from mvm.drivers.backup import archive
from mvm.drivers.files import closing_fd, sync, write_new, write_private
from mvm.errors import Failed, Forbidden, NotAllowed

Progress = Callable[[str, int], None]
"""What is being done, and so many more bytes of it."""

_ALWAYS_THERE = frozenset({"lost+found"})  # a file system of its own may be mounted there
_INSIDE = ".restoring"
_ID_BYTES = 6


def verify(path: Path, progress: Progress) -> tuple[About, Mapping[str, Entry]]:
    """What the backup says of itself and its files, once all of it is found whole; see `archive.check`."""
    return archive.check(path, lambda count: progress("verifying", count))


def restore(path: Path, layout: StateLayout, progress: Progress) -> About:
    """The state directory is as the backup has it. Nothing is written before all of the backup was found whole.

    Raises `NotAllowed` (``backup.not_empty``, ``backup.busy``) when the state directory is not empty or another restore
    is at it, `Failed` (``disk.full``, ``backup.failed``), and what `verify` does; then it is as it was.
    """
    _refuse_used(layout, frozenset())
    about, files = verify(path, progress)
    tops = frozenset(Path(name).parts[0] for name in files) | {layout.version.name, layout.identity.name}
    try:
        _refuse_used(layout, tops)
        with _draft(layout) as draft:
            archive.extract(path, draft, lambda count: progress("restoring", count))
            _introduce(draft, layout, about)
            write_new(draft / layout.version.name, f"{about.state_version}\n".encode())
            _finish(draft)
            _appear(draft, layout, tops)
    except PermissionError as error:
        raise Forbidden("permission.denied", f"{error.filename}: permission denied", hint="run it as root") from None
    except OSError as error:
        raise failed(error) from None
    return about


def failed(error: OSError) -> Failed:
    """A backup could not be written or restored."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return Failed("disk.full" if full else "backup.failed", f"{error.filename or 'the backup'}: {error.strerror}",
                  hint="free some space" if full else "nothing is left of it; mend that and try again")  # fmt: skip


def _refuse_used(layout: StateLayout, tops: frozenset[str]) -> None:
    """What a restore that was killed has left in place may be replaced, and nothing else."""
    root = layout.root
    there = {entry.name for entry in root.iterdir()} if root.is_dir() else set()
    interrupted = _INSIDE in there and layout.version.name not in there
    strangers = there - _ALWAYS_THERE - ({_INSIDE} | tops if interrupted else frozenset())
    if interrupted and not tops:
        return
    if strangers or (root.exists() and not root.is_dir()):
        raise NotAllowed(
            "backup.not_empty", f"{root} is not empty: it holds {min(strangers, default='no directory')!r}",
            hint="restore into a directory that is empty or does not exist: --state-dir DIR", state_dir=str(root),
        )  # fmt: skip


@contextmanager
def _draft(layout: StateLayout) -> Iterator[Path]:
    """An empty directory on the state directory's file system, ours alone, and gone when the block fails."""
    root = layout.root
    root.parent.mkdir(parents=True, exist_ok=True)
    within = root.is_dir() and (root.is_mount() or any(root.iterdir()))
    draft = root / _INSIDE if within else root.with_name(f".{root.name}.restoring")
    draft.mkdir(mode=0o700, exist_ok=True)
    with closing_fd(os.open(draft, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as fd:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise NotAllowed("backup.busy", f"another restore into {root} is at work", hint="wait for it") from None
        _empty(draft)
        try:
            yield draft
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise


def _appear(draft: Path, layout: StateLayout, tops: frozenset[str]) -> None:
    """The draft is the state directory; where that is a mount, the version says so last."""
    root = layout.root
    if draft.parent != root:
        draft.rename(root)  # an empty directory is replaced
        sync(root.parent)
        return
    for name in sorted(tops - {layout.version.name}):
        if (root / name).exists():
            _remove(root / name)
        if (draft / name).exists():
            (draft / name).rename(root / name)
    root.chmod(0o700)
    sync(root)
    (draft / layout.version.name).rename(layout.version)
    draft.rmdir()
    sync(root)


def _introduce(draft: Path, layout: StateLayout, about: About) -> None:
    """It is the node's that was backed up, and a state directory of its own: what runs for the original is not its."""
    found = draft.stat()
    place = Place(found.st_dev, found.st_ino)  # where the draft becomes the state directory as a whole
    own = Identity(secrets.token_hex(_ID_BYTES), about.node_id, layout.default_netns, place)
    write_private(draft / layout.identity.name, json.dumps(own.to_dict()).encode())


def _finish(draft: Path) -> None:
    """Every directory is on the disk; the files are already."""
    for folder, _, _ in os.walk(draft, topdown=False):
        sync(Path(folder))


def _empty(directory: Path) -> None:
    for path in directory.iterdir():
        _remove(path)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
