"""Who a state directory is, however its path is spelled, and which node it belongs to. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from mvm.domain.ids import NodeId
from mvm.errors import NotAllowed

_ID_DIGITS = 12
_LONGEST_ALIAS = 255  # include/uapi/linux/if.h: IFALIASZ, with its NUL
_CLAIM = re.compile(r"(mvm-[0-9a-f]{12}) (.+)", re.DOTALL)


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


class Claim(NamedTuple):
    """A state directory's claim on a network namespace: its mark, and where it lies, for people."""

    mark: str
    where: str

    @property
    def text(self) -> str:
        """As it stands in the namespace, which has room for `_LONGEST_ALIAS` bytes: the mark is what counts."""
        return f"{self.mark} {self.where}".encode()[:_LONGEST_ALIAS].decode(errors="ignore")

    @classmethod
    def parse(cls, text: str) -> Claim | None:
        """Inverse of `text`; None for what is no claim."""
        found = _CLAIM.fullmatch(text)
        return cls(*found.groups()) if found else None

    def check(self, other: Claim, namespace: str | None) -> None:
        """Raises `NotAllowed` (``stack.netns_claimed``) unless `other` is the same state directory's.

        `namespace` is what both want: its name, None for the host's own.
        """
        if self.mark == other.mark:
            return
        inside = f"ip -n {namespace}" if namespace else "ip"
        raise NotAllowed(
            "stack.netns_claimed",
            f"{namespace_words(namespace)} is claimed by the state directory {self.where} ({self.mark}), "
            f"whose guests may use it also while its stack is down",
            hint=f"use another namespace, or leave --netns away for one of your own; to give it up: "
            f"mvm --state-dir {self.where} down --instances; where that directory is no more: "
            f"{inside} link set dev lo alias ''",
            netns=namespace, claimed_by=self.mark, state_dir=self.where,
        )  # fmt: skip


def namespace_words(namespace: str | None) -> str:
    """A network namespace, for people; None is the host's own."""
    return f"network namespace {namespace}" if namespace else "the host's network namespace"


def mark_of(identity: str) -> str:
    """The mark that an id stands for."""
    return f"mvm-{identity}"


def id_of_path(path: Path) -> str:
    """The id of a state directory that has none of its own: former versions knew it by its path as it was spelled."""
    return _digest(str(path))


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:_ID_DIGITS]
