"""A node's store, looked at from outside: nothing in it is made or changed, whatever version wrote it.

For those who must not open it for work, since its stack may be down, or another version's. A store that is not there,
or was only begun, has nothing in it. Of one that cannot be read nothing is known: all of these raise what
`sqlite_errors.translated` tells then.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

from mvm.domain.ids import NodeId
from mvm.domain.instance import Instance
from mvm.domain.pool import WorkerPool
from mvm.domain.tenant import Tenant
from mvm.drivers import sqlite_errors, store_migrations

_BUSY_S = 5.0


def instances(database: Path) -> Sequence[Instance]:
    """Every instance."""
    rows = _rows(database, "SELECT doc, generation FROM instances ORDER BY ref")
    return [Instance.from_dict(json.loads(doc), generation) for doc, generation in rows]


def tenants(database: Path) -> Sequence[Tenant]:
    """Every tenant."""
    return [Tenant.from_dict(json.loads(doc)) for (doc,) in _rows(database, "SELECT doc FROM tenants ORDER BY id")]


def nodes(database: Path) -> frozenset[NodeId]:
    """The nodes that its pools are placed on."""
    return frozenset(NodeId(json.loads(doc)["node_id"]) for (doc,) in _rows(database, "SELECT doc FROM pools"))


def pools(database: Path) -> Sequence[WorkerPool]:
    """Every pool; of a store of this version."""
    return [WorkerPool.from_dict(json.loads(doc)) for (doc,) in _rows(database, "SELECT doc FROM pools ORDER BY ref")]


def desired(database: Path) -> Mapping[str, Any] | None:
    """The document of the desired state, None when there is none; of a store of this version."""
    rows = _rows(database, "SELECT doc FROM desired")
    return cast("Mapping[str, Any]", json.loads(rows[0][0])) if rows else None


def _rows(database: Path, query: str) -> Sequence[Any]:
    if not database.exists():
        return []
    try:
        with closing(sqlite3.connect(f"file:{quote(str(database))}?mode=ro", uri=True, timeout=_BUSY_S)) as db:
            if not store_migrations.version(db):  # whoever was to make it has not come to its end
                return []
            return db.execute(query).fetchall()
    except sqlite3.Error as error:
        raise sqlite_errors.translated(database, error) from error
