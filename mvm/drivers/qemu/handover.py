"""Files that a VMM inherits open, so that it can reach no other and needs no right to these."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mvm.errors import Failed


class Handover:
    """Open files, and the paths by which QEMU knows them."""

    def __init__(self, closing: ExitStack) -> None:
        self._closing = closing
        self.fds: list[int] = []

    def file(self, path: Path, flags: int) -> Path:
        """Open `path`; QEMU gets no other access to it than by `flags`. Raises `Failed` (``vmm.start_failed``)."""
        with _translated(path):
            fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW)
        self._closing.callback(os.close, fd)
        self.fds.append(fd)
        return Path(f"/dev/fdset/{fd}")

    def words(self) -> Sequence[str]:
        """The options that tell QEMU of them."""
        return [word for fd in self.fds for word in ("-add-fd", f"fd={fd},set={fd}")]


def readable(path: Path) -> Path:
    """`path`, whose content is no secret: who can reach it may read it. Its directories let nobody but the node in."""
    with _translated(path):
        mode = stat.S_IMODE(path.stat().st_mode)
        if not mode & stat.S_IROTH:
            path.chmod(mode | stat.S_IRGRP | stat.S_IROTH)
    return path


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Failed(
            "vmm.start_failed", f"{path}: {error.strerror}", hint="is the image whole? see: mvm doctor"
        ) from None
