"""Who a state directory is, however its path is spelled, and which node it belongs to. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from mvm.domain.ids import NodeId
from mvm.errors import NotAllowed

_ID_DIGITS = 12


class Place(NamedTuple):
    """Where a directory is, by device and inode: the same by every path, another's for a copy."""

    device: int
    inode: int


@dataclass(frozen=True, slots=True)
class Identity:
    """What a state directory remembers of itself.

    `id` marks its VMMs and control groups. `netns` is the namespace that its stack makes unless told otherwise.
    """

    id: str
    node_id: NodeId
    netns: str
    place: Place

    @property
    def mark(self) -> str:
        """Tells its VMMs and control groups from those of other state directories on the same host."""
        return mark_of(self.id)

    def at(self, place: Place, netns: str) -> Identity:
        """As it is found at `place`. A copy is a directory of its own: what runs for the original is not its."""
        if place == self.place:
            return self
        return replace(self, id=_digest(f"{self.id} at {place.device}:{place.inode}"), netns=netns, place=place)

    def check_node(self, node_id: NodeId) -> None:
        """Raises `NotAllowed` (``node.renamed``) unless it is `node_id`'s.

        Pools are placed, jobs queued and certificates made by the node's name: under another they would be stranded.
        """
        if node_id != self.node_id:
            raise NotAllowed(
                "node.renamed", f"this state directory belongs to node {self.node_id}, not to {node_id}",
                hint=f"a node keeps its name: unset MVM_NODE_ID, or set it to {self.node_id}",
                node_id=str(self.node_id), given=str(node_id),
            )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """JSON form, as kept in the directory."""
        return {"id": self.id, "node_id": str(self.node_id), "netns": self.netns, "place": list(self.place)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Identity:
        """Inverse of `to_dict`."""
        return cls(str(data["id"]), NodeId(data["node_id"]), str(data["netns"]), Place(*map(int, data["place"])))


def mark_of(identity: str) -> str:
    """The mark that an id stands for."""
    return f"mvm-{identity}"


def id_of_path(path: Path) -> str:
    """The id of a state directory that has none of its own: former versions knew it by its path as it was spelled."""
    return _digest(str(path))


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:_ID_DIGITS]
