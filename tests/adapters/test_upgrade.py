"""A state directory that an older mvm wrote comes up to date, or stays as it was."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from mvm.domain.job import Job
from mvm.domain.layout import STATE_VERSION, StateLayout
from mvm.domain.migration import Migration
from mvm.drivers import redis_files, registry_migrations, state_dir, store_migrations, upgrade
from mvm.drivers.redis_link import RedisLink
from mvm.drivers.redis_registry import RedisRegistry
from mvm.drivers.shell import LocalShell
from mvm.drivers.sqlite_store import SqliteStore
from mvm.errors import Failed, NotAllowed
from mvm.settings import Settings, load_settings
from tests.support import old_state
from tests.support.redis_server import RedisServer

pytestmark = pytest.mark.redis
SHELL = LocalShell()
REFS = sorted(old_state.PROCESSES)


class Killed(BaseException):
    """What a process does not survive."""


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    old_state.unpack(tmp_path / "s")
    return load_settings(state_dir=tmp_path / "s", driver="fake", netns="host")


def quiet(_text: str) -> None:
    """No progress."""


def contents(root: Path) -> dict[str, str]:
    """The digest of every file but SQLite's shared memory, which is a cache."""
    files = [path for path in sorted(root.rglob("*")) if path.is_file() and not path.name.endswith("-shm")]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def assert_up_to_date(layout: StateLayout) -> None:
    assert state_dir.check_version(layout) == STATE_VERSION
    with closing(SqliteStore(layout.database)) as store:
        assert {str(i.ref): i.status.value for i in store.instances()} == {
            ref: status for ref, (status, _) in old_state.PROCESSES.items()
        }
        assert [tenant.id for tenant in store.tenants()] == ["acme"]
        assert len(store.given_net_ids()) == 2
    with redis_files.served(layout.redis, SHELL) as link:
        registry = RedisRegistry(link)
        assert registry.tenant(store_tenant()) is not None
        assert len(registry.jobs()) >= 10
        assert link.command("GET", registry_migrations.VERSION_KEY) == b"%d" % STATE_VERSION
    assert not list(layout.root.glob(".upgrade*"))


def store_tenant() -> str:
    return "acme"


def test_what_6e69ba5_wrote_comes_up_to_date(settings: Settings) -> None:
    said: list[str] = []
    upgrade.upgrade(settings, SHELL, said.append)
    assert "version 1" in said[0]
    assert_up_to_date(settings.layout)
    after = contents(settings.layout.root)
    upgrade.upgrade(settings, SHELL, said.append)
    assert len(said) == 1
    assert contents(settings.layout.root).keys() == after.keys()


def test_what_version_2_wrote_comes_up_to_date(settings: Settings) -> None:
    layout = settings.layout
    with closing(sqlite3.connect(layout.database, isolation_level=None)) as db:
        (last,) = db.execute("SELECT doc FROM jobs ORDER BY doc ->> 'submitted_at' DESC, id DESC LIMIT 1").fetchone()
        store_migrations.STORE[1].apply(db)
        db.execute("PRAGMA user_version = 2")
    layout.version.write_text("2\n")
    upgrade.upgrade(settings, SHELL, quiet)
    assert_up_to_date(layout)
    job = Job.from_dict(json.loads(last))
    with closing(SqliteStore(layout.database)) as store:
        assert store.last_job(job.subject) == job


def test_a_part_of_the_stack_refuses_an_older_store(settings: Settings) -> None:
    with pytest.raises(NotAllowed) as caught:
        SqliteStore(settings.layout.database)
    assert caught.value.code == "state.version"
    assert "mvm up" in caught.value.hint


def test_a_newer_store_and_a_newer_registry_are_refused(settings: Settings, redis_server: RedisServer) -> None:
    with closing(sqlite3.connect(settings.layout.database)) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(NotAllowed) as caught:
        SqliteStore(settings.layout.database)
    assert caught.value.code == "state.version"
    link = RedisLink(redis_server.url, code="x")
    link.command("SET", registry_migrations.VERSION_KEY, 99)
    with pytest.raises(NotAllowed) as caught:
        registry_migrations.migrate(link)
    assert caught.value.code == "state.version"
    link.close()


def test_an_empty_registry_gets_this_version_and_an_old_one_is_migrated(redis_server: RedisServer) -> None:
    link = RedisLink(redis_server.url, code="x")
    registry_migrations.migrate(link)
    assert link.command("GET", registry_migrations.VERSION_KEY) == b"%d" % STATE_VERSION
    link.command("FLUSHALL")
    link.command("HSET", "mvm:nodes", "n1", "{}")
    registry_migrations.migrate(link)
    assert link.command("GET", registry_migrations.VERSION_KEY) == b"%d" % STATE_VERSION
    link.command("SET", registry_migrations.VERSION_KEY, 2)
    registry_migrations.migrate(link)
    assert link.command("GET", registry_migrations.VERSION_KEY) == b"%d" % STATE_VERSION, "also without a migration"
    link.close()


def test_an_emptied_registry_that_a_node_puts_back_is_of_this_version(redis_server: RedisServer) -> None:
    """Else the next up would take what is in it for that of the first version."""
    with closing(RedisLink(redis_server.url, code="x")) as link:
        RedisRegistry(link).restore([], {}, frozenset())
        assert link.command("GET", registry_migrations.VERSION_KEY) == b"%d" % STATE_VERSION


def _broken(_: object) -> None:
    raise sqlite3.OperationalError("no such column: hope")


@pytest.mark.parametrize("kind", ["STORE", "REGISTRY"])
def test_a_migration_that_fails_leaves_all_as_it_was(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    module = {"STORE": store_migrations, "REGISTRY": registry_migrations}[kind]
    *others, last = getattr(module, kind)
    broken = (*others, Migration(last.to, last.what, _broken))
    before = contents(settings.layout.root)
    with monkeypatch.context() as patch:
        patch.setattr(module, kind, broken)
        with pytest.raises(Failed) as caught:
            upgrade.upgrade(settings, SHELL, quiet)
    assert caught.value.code == "state.upgrade_failed"
    assert "hope" in caught.value.message
    assert contents(settings.layout.root) == before
    upgrade.upgrade(settings, SHELL, quiet)
    assert_up_to_date(settings.layout)


def test_killed_at_any_move_it_is_as_it_was_or_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rename in turn is the last thing that happens."""
    survived = [_killed_at(tmp_path / f"{number}", number, monkeypatch) for number in range(1, 12)]
    assert False in survived, "some were killed"
    assert survived[-1], "and one went through"


def _killed_at(root: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the upgrade went through although it was to be killed before its rename `number`."""
    old_state.unpack(root)
    settings = load_settings(state_dir=root, driver="fake", netns="host")
    before, left = contents(root), [number]
    real = {name: getattr(Path, name) for name in ("rename", "replace")}

    def counted(name: str) -> object:
        def move(self: Path, target: Path) -> object:
            left[0] -= 1
            if not left[0]:
                raise Killed
            return real[name](self, target)

        return move

    with monkeypatch.context() as patch:
        for name in real:
            patch.setattr(Path, name, counted(name))
        try:
            upgrade.upgrade(settings, SHELL, quiet)
        except Killed:
            through = False
        else:
            through = True
    if not (root / ".upgraded").exists() and not through:
        kept = {name: digest for name, digest in contents(root).items() if not name.startswith(".upgrade")}
        assert kept == before, "before it is decided the older mvm can go on"
    assert state_dir.check_version(settings.layout) is not None, "at any moment it is a state directory"
    upgrade.upgrade(settings, SHELL, quiet)
    assert_up_to_date(settings.layout)
    return through
