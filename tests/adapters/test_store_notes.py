"""Notes on instances, and the last job of one, in the node's store."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import count
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


def work_of(store: SqliteStore, ask: Callable[[], object]) -> int:
    """How many hundreds of SQLite's instructions a question takes."""
    counted = count()
    store._db().set_progress_handler(lambda: next(counted) and 0, 100)
    ask()
    store._db().set_progress_handler(None, 0)
    return next(counted)


def test_asking_for_the_last_job_costs_the_same_whatever_is_remembered(store: SqliteStore) -> None:
    ref = str(make.instance_ref())
    last = make.ended(make.job(subject=ref))
    with store.transaction():
        store.put_job(last)
        for _ in range(2000):
            store.put_job(make.ended(make.job(subject=str(make.NODE))))
    assert store.last_job(ref) == last
    assert work_of(store, lambda: store.last_job(ref)) <= 2
    assert work_of(store, lambda: store.last_job("nobody")) <= 2
    assert work_of(store, lambda: store.last_job(str(make.NODE))) <= 2


def test_forgetting_drops_the_oldest_that_have_ended(store: SqliteStore) -> None:
    jobs = [make.job() if n == 1 else make.ended(make.job()) for n in range(6)]
    for job in jobs:
        store.put_job(job)
    assert store.forget_jobs(keep=6) == 0
    assert store.forget_jobs(keep=3) == 2
    assert list(store.jobs()) == [jobs[1], *jobs[3:]]
    assert store.forget_jobs(keep=0) == 3
    assert list(store.jobs()) == [jobs[1]]


def test_the_jobs_of_a_store_of_version_2_are_found_by_subject_and_forgotten_by_age(tmp_path: Path) -> None:
    jobs = [make.ended(make.job(subject=subject)) for subject in ("a", "b", "a", "b")]
    with closing(sqlite3.connect(tmp_path / "node.db", isolation_level=None)) as older:
        for migration in STORE[:2]:
            migration.apply(older)
        older.executemany("INSERT INTO jobs VALUES (?, 1, ?)", [(job.job_id, job.to_json()) for job in jobs])
        older.execute("PRAGMA user_version = 2")
        store_migrations.migrate(older)
    with closing(SqliteStore(tmp_path / "node.db")) as store:
        assert (store.last_job("a"), store.last_job("b"), store.last_job("c")) == (jobs[2], jobs[3], None)
        newer = make.ended(make.job(subject="a"))
        store.put_job(newer)
        assert store.last_job("a") == newer
        assert store.forget_jobs(keep=2) == 3
        assert list(store.jobs()) == [jobs[3], newer]


def test_the_last_job_of_an_instance_is_its_newest(store: SqliteStore) -> None:
    ref = str(make.instance_ref())
    older, other, newer = make.job(subject=ref), make.job(), make.job(subject=ref)
    assert store.last_job(ref) is None
    for job in (newer, other, older):
        store.put_job(job)
    assert store.last_job(ref) == newer
