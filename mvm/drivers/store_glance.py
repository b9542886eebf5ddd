"""A node's store, looked at from outside: nothing in it is made or changed, whatever version wrote it.

For those who must not open it for work, since its stack may be down, or another version's.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mvm.domain.ids import NodeId
from mvm.domain.instance import Instance

_BUSY_S = 5.0


def instances(database: Path) -> Sequence[Instance]:
    """Every instance; none when there is no store, or none that can be read."""
    rows = _rows(database, "SELECT doc, generation FROM instances ORDER BY ref")
    return [Instance.from_dict(json.loads(doc), generation) for doc, generation in rows]


def nodes(database: Path) -> frozenset[NodeId]:
    """The nodes that its pools are placed on; none when there is no store, or none that can be read."""
    return frozenset(NodeId(json.loads(doc)["node_id"]) for (doc,) in _rows(database, "SELECT doc FROM pools"))


def _rows(database: Path, query: str) -> Iterator[Any]:
    if not database.exists():
        return
    try:
        with closing(sqlite3.connect(f"file:{quote(str(database))}?mode=ro", uri=True, timeout=_BUSY_S)) as db:
            yield from db.execute(query).fetchall()
    except sqlite3.Error:  # what cannot be read is told by those who open it for work
        return
