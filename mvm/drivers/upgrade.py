"""Brings a state directory that an older mvm has written up to date.

Everything is migrated on copies. One rename decides: before it, nothing has changed, and the older mvm can go on with
what it has; after it, what is left to do is to move the copies to their places, which whoever comes next completes.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from mvm.domain.layout import STATE_VERSION, StateLayout
from mvm.domain.migration import SETTINGS, due
from mvm.drivers import redis_files, registry_migrations, state_dir, store_migrations
from mvm.drivers.files import sync, write_new
from mvm.drivers.redis_link import RedisLink
from mvm.errors import Failed, MvmError
from mvm.ports.shell import Shell
from mvm.settings import Settings

Report = Callable[[str], None]
_DRAFT, _DECIDED = ".upgrade", ".upgraded"
_STORE = ("node.db", "node.db-wal", "node.db-shm")


def upgrade(settings: Settings, shell: Shell, report: Report) -> None:
    """The state directory is of this mvm's version. The caller holds it, and no part of the stack runs.

    What it was made of is kept in ``before-VERSION``. Raises `NotAllowed` (``state.version``) when it is newer, and
    `Failed` (``state.upgrade_failed``) when a migration fails: then it is as it was.
    """
    layout = settings.layout
    _put_in_place(layout)
    found = state_dir.check_version(layout)
    if found is None or found == STATE_VERSION:
        return
    report(f"bringing {layout.root} from version {found} to version {STATE_VERSION}")
    draft = layout.root / _DRAFT
    shutil.rmtree(draft, ignore_errors=True)  # of one that failed
    try:
        draft.mkdir(mode=0o700)
        _draft_store(layout, draft)
        _draft_settings(layout, draft, found)
        _draft_registry(settings, shell, draft, found)
        write_new(draft / layout.version.name, f"{STATE_VERSION}\n".encode())
        _sync_all(draft)
        draft.rename(layout.root / _DECIDED)
        sync(layout.root)
    except (MvmError, OSError, sqlite3.Error, ValueError, KeyError, TypeError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        what = error.message if isinstance(error, MvmError) else error
        raise Failed(
            "state.upgrade_failed",
            f"{layout.root} could not be brought from version {found} to version {STATE_VERSION}: {what}",
            hint="nothing of it has changed: the mvm that wrote it can go on with it",
            found=found,
            expected=STATE_VERSION,
        ) from error
    _put_in_place(layout)


def _draft_store(layout: StateLayout, draft: Path) -> None:
    """A migrated copy of the node's store. The original is not opened: that alone would write to it."""
    if not layout.database.exists():
        return
    copy = draft / layout.database.name
    for name in _STORE[:2]:
        if (layout.root / name).exists():
            shutil.copyfile(layout.root / name, draft / name)
            (draft / name).chmod(0o600)
    with closing(sqlite3.connect(copy, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        store_migrations.migrate(db)
        db.execute("COMMIT")
        (problem,) = db.execute("PRAGMA integrity_check(1)").fetchone()
    if problem != "ok":
        raise Failed("store.damaged", f"the node's store is damaged: {problem}", hint="restore it from a backup")


def _draft_settings(layout: StateLayout, draft: Path, found: int) -> None:
    """The settings that the stack was started with, which ``mvm down`` reads before there are new ones."""
    saved = layout.settings
    migrations = due(SETTINGS, found)
    if not saved.exists() or not migrations:
        return
    document = json.loads(saved.read_text())
    for migration in migrations:
        migration.apply(document)
    new = draft / saved.relative_to(layout.root)
    new.parent.mkdir(mode=0o700)
    write_new(new, json.dumps(document, indent=2).encode())


def _draft_registry(settings: Settings, shell: Shell, draft: Path, found: int) -> None:
    """A private Redis is migrated as a copy. One that others share is migrated in place, in one transaction each."""
    if settings.redis_url:
        link = RedisLink(settings.redis, code="registry.unreachable")
        try:
            registry_migrations.migrate(link)
        finally:
            link.close()
        return
    if not any(settings.layout.redis.glob("*")):
        return
    copy = draft / settings.layout.redis.name
    shutil.copytree(settings.layout.redis, copy)
    with redis_files.served(copy, shell) as link:
        registry_migrations.migrate(link, unnumbered=found)


def _put_in_place(layout: StateLayout) -> None:
    """Each copy takes the place of what it was made from; the version comes last."""
    decided = layout.root / _DECIDED
    if not decided.exists():
        return
    before = layout.root / f"before-{STATE_VERSION}"
    before.mkdir(mode=0o700, exist_ok=True)
    if (decided / layout.database.name).exists():
        for name in _STORE:
            _set_aside(layout.root / name, before / name)
    for path in (layout.database, layout.redis, layout.settings):
        new = decided / path.relative_to(layout.root)
        if new.exists():
            _set_aside(path, before / path.relative_to(layout.root))
            new.rename(path)
            sync(path.parent)
    if (decided / layout.version.name).exists():  # never without one: it would be no state directory
        shutil.copy2(layout.version, before / layout.version.name)
        (decided / layout.version.name).replace(layout.version)
    _sync_all(before)  # what it was made of is there for good before it is gone from here
    sync(layout.root)
    shutil.rmtree(decided)


def _set_aside(path: Path, to: Path) -> None:
    if not path.exists():
        return
    to.parent.mkdir(mode=0o700, exist_ok=True)
    shutil.rmtree(to) if to.is_dir() else to.unlink(missing_ok=True)  # of an earlier upgrade to this version
    path.rename(to)


def _sync_all(directory: Path) -> None:
    for folder, _, names in os.walk(directory):
        for name in names:
            sync(Path(folder, name))
        sync(Path(folder))
