"""Notes on instances, and the last job of one, in the node's store."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from mvm.domain.instance import Instance
from mvm.domain.lifecycle import Status
from mvm.drivers import store_migrations
from mvm.drivers.sqlite_store import SqliteStore
from mvm.drivers.store_migrations import STORE
from mvm.errors import Failed
from mvm.ports.store import Note
from tests.support import make


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    opened = SqliteStore(tmp_path / "node.db")
    opened.insert_instance(Instance(make.instance_ref(), make.NODE, 3, Status.RUNNING, make.START))
    yield opened
    opened.close()


def test_the_last_desired_state_is_kept(store: SqliteStore) -> None:
    assert store.desired() is None
    store.put_desired({"node_id": "n1", "generation": 1})
    store.put_desired({"node_id": "n1", "generation": 2})
    assert store.desired() == {"node_id": "n1", "generation": 2}


def test_a_note_is_kept_until_its_instance_is_forgotten(store: SqliteStore) -> None:
    ref = make.instance_ref()
    assert store.note(ref, Note.SLEPT) is None
    store.put_note(ref, Note.SLEPT, {"bytes": 1})
    store.put_note(ref, Note.SLEPT, {"bytes": 2})
    store.put_note(ref, Note.WOKE, {"seconds": 0.5})
    assert store.note(ref, Note.SLEPT) == {"bytes": 2}
    assert store.notes(Note.WOKE) == {ref: {"seconds": 0.5}}
    assert store.notes(Note.POLICY) == {}
    store.delete_instance(ref)
    assert store.notes(Note.SLEPT) == {}
    store.put_note(ref, Note.SLEPT, {"bytes": 3})
    assert store.notes(Note.SLEPT) == {}, "nobody is left to forget it"


def test_what_could_not_be_committed_is_undone_and_the_next_write_goes_on(store: SqliteStore) -> None:
    def refuse(action: int, word: str | None, *_: str | None) -> int:
        commits = action == sqlite3.SQLITE_TRANSACTION and word == "COMMIT"
        return sqlite3.SQLITE_DENY if commits else sqlite3.SQLITE_OK

    store._writer().set_authorizer(refuse)
    with pytest.raises(Failed), store.transaction():
        store.put_desired({"generation": 1})
    store._writer().set_authorizer(None)
    assert store.desired() is None
    store.put_desired({"generation": 2})
    assert store.desired() == {"generation": 2}


def test_a_store_from_before_there_were_notes_gets_them(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "node.db", isolation_level=None)) as older:
        STORE[0].apply(older)
        older.execute("PRAGMA user_version = 1")
        store_migrations.migrate(older)
    with closing(SqliteStore(tmp_path / "node.db")) as store:
        store.insert_instance(Instance(make.instance_ref(), make.NODE, 3, Status.RUNNING, make.START))
        store.put_note(make.instance_ref(), Note.WOKE, {"seconds": 1})
        assert store.note(make.instance_ref(), Note.WOKE) == {"seconds": 1}


def test_the_last_job_of_an_instance_is_its_newest(store: SqliteStore) -> None:
    ref = str(make.instance_ref())
    older, other, newer = make.job(subject=ref), make.job(), make.job(subject=ref)
    assert store.last_job(ref) is None
    for job in (newer, other, older):
        store.put_job(job)
    assert store.last_job(ref) == newer
