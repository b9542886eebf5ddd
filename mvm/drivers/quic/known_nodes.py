"""Which node is meant by an address: said by the stack, or learnt when one first answered there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mvm.domain.ids import NodeId
from mvm.drivers.files import write_private
from mvm.errors import InvalidInput


class KnownNodes:
    """`own` are addresses that are known for certain. Others are learnt in `directory`, if there is one.

    As with ssh's hosts, the first answer is believed as far as the CA vouches for it, and later ones are compared.
    """

    def __init__(self, directory: Path | None = None, own: Mapping[str, NodeId] | None = None) -> None:
        self._directory = directory
        self._own = dict(own or {})

    def meant(self, where: str) -> NodeId | None:
        """The node at ``HOST:PORT``, or None if none ever answered there."""
        if where in self._own or self._directory is None:
            return self._own.get(where)
        try:
            return NodeId(_path(self._directory, where).read_text().strip())
        except (OSError, InvalidInput):  # nothing was learnt, or by another user, or a power cut left half of it
            return None

    def learn(self, where: str, node: NodeId, *, declared: bool) -> None:
        """A node has answered. What was `declared` replaces what was learnt before."""
        if self._directory is None or where in self._own or (not declared and self.meant(where) is not None):
            return
        path = _path(self._directory, where)
        try:
            self._directory.mkdir(mode=0o700, exist_ok=True)
            write_private(path, f"{node}\n".encode())
        except OSError:  # a directory that cannot be written: each time is the first one
            pass


def _path(directory: Path, where: str) -> Path:
    return directory / where.replace("%", "%25").replace("/", "%2F")
