"""What SQLite's errors become, each from a real one."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from mvm.domain.instance import Instance
from mvm.domain.lifecycle import Status
from mvm.drivers import sqlite_store
from mvm.drivers.sqlite_store import SqliteStore
from mvm.errors import Failed, MvmError, TimedOut
from tests.support import make


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sqlite_store, "_BUSY_MS", 50)
    with closing(SqliteStore(tmp_path / "node.db")) as store:
        store.insert_instance(Instance(make.instance_ref(), make.NODE, 3, Status.RUNNING, make.START))
    return tmp_path / "node.db"


def refused(path: Path) -> MvmError:
    """What it says of whoever reads and writes."""
    try:
        with closing(SqliteStore(path)) as store:
            store.put_desired({"x": "y" * 100_000})
            store.instances()
    except MvmError as error:
        return error
    raise AssertionError("it was read and written")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Another program writes."""
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield


def test_one_that_is_locked_is_tried_again(path: Path) -> None:
    with locked(path):
        error = refused(path)
    assert isinstance(error, TimedOut)
    assert (error.code, error.retryable) == ("store.busy", True)


def test_a_damaged_one_is_told_from_one_that_cannot_be_written(path: Path, tmp_path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(path.stat().st_size - 4096))
    damaged = refused(path)
    path.write_bytes(b"no database at all" * 1000)
    other = refused(path)
    (tmp_path / "directory").mkdir()
    unopened = refused(tmp_path / "directory")
    assert [(type(e), e.code) for e in (damaged, other)] == [(Failed, "store.damaged")] * 2
    assert (type(unopened), unopened.code) == (Failed, "store.failed")


def test_a_full_disk_is_told(path: Path) -> None:
    with closing(SqliteStore(path)) as store:
        store._writer().execute("PRAGMA max_page_count = 20")
        with pytest.raises(Failed) as caught:
            store.put_desired({"x": "y" * 1_000_000})
    assert caught.value.code == "disk.full"
