"""``mvm backup``: of this machine's node, beside its stack or without."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

import click

from mvm.cli.base import Group, output_of
from mvm.cli.paths import NewFile
from mvm.cli.render import show_one

if TYPE_CHECKING:
    from mvm.domain.backup import About
    from mvm.settings import Settings

_EVERY_S = 1.0
_FILE = click.argument("file", type=click.Path(dir_okay=False, path_type=Path))


@click.group(cls=Group)
def backup() -> None:
    """Backups of this machine's node, in a file that is for its owner alone: it has all keys."""


@backup.command()
@click.argument("file", type=NewFile())
@click.pass_context
def create(ctx: click.Context, file: Path) -> None:
    """Back the node up into FILE, which must not exist. Guests run on; their disks are as after a power cut."""
    from mvm.domain.disk import size
    from mvm.drivers.stack import running_settings
    from mvm.wiring import open_backup

    os.umask(0o077)
    settings = running_settings(_settings(ctx))
    _require(settings)
    about = open_backup(settings).take(file, _say)
    _show(ctx, file, about, size=size(file.stat().st_size))


@backup.command()
@_FILE
@click.pass_context
def verify(ctx: click.Context, file: Path) -> None:
    """Read all of FILE and compare it with its digests; exit 1 when it is damaged."""
    from mvm.drivers.backup.restoring import verify as check

    about, files = check(file, _progress(file))
    _show(ctx, file, about, files=len(files))


@backup.command()
@_FILE
@click.pass_context
def restore(ctx: click.Context, file: Path) -> None:
    """Restore FILE into the state directory, which must be empty. A damaged one is refused before anything is written.

    What ran is stopped, with its disk as it was; what slept sleeps.
    """
    from mvm.drivers.backup.restoring import restore as put_back

    os.umask(0o077)
    settings = _settings(ctx)
    about = put_back(file, settings.layout, _progress(file))
    if about.shared or settings.redis_url or settings.broker_url:
        _say(f"the original node {about.node_id} must not run any more: with a shared Redis both take the same jobs")
    _show(ctx, file, about, state_dir=str(settings.state_dir))


def _settings(ctx: click.Context) -> Settings:
    from mvm.settings import load_settings

    return load_settings(state_dir=ctx.meta.get("mvm.state_dir"))


def _require(settings: Settings) -> None:
    """Raises `NotFound` (``backup.no_state``) when there is nothing to back up."""
    from mvm.drivers.state_dir import check_version
    from mvm.errors import NotFound

    if check_version(settings.layout) is None or not settings.layout.database.exists():
        raise NotFound(
            "backup.no_state", f"{settings.state_dir} is not the state directory of a node that was ever up",
            hint="set MVM_STATE_DIR", state_dir=str(settings.state_dir),
        )  # fmt: skip


def _show(ctx: click.Context, file: Path, about: About, **more: object) -> None:
    facts = {
        "file": str(file),
        "node_id": str(about.node_id),
        "taken_at": about.taken_at.isoformat(timespec="seconds"),
        "state_version": about.state_version,
        **more,
    }
    show_one(facts, output_of(ctx))


def _progress(file: Path) -> Callable[[str, int], None]:
    """Shows now and then how much is done: on a terminal in one line."""
    from mvm.domain.disk import size

    total, done, last = file.stat().st_size if file.exists() else 0, dict[str, int](), [monotonic()]
    line = ("\r\x1b[K", False) if sys.stderr.isatty() else ("", True)

    def show(what: str, count: int) -> None:
        done[what] = done.get(what, 0) + count
        if monotonic() - last[0] < _EVERY_S:
            return
        last[0] = monotonic()
        of = f" of {size(total)}" if what == "verifying" else ""
        with suppress(BrokenPipeError):
            click.echo(f"{line[0]}{what}: {size(done[what])}{of}", nl=line[1], err=True)

    return show


def _say(text: str) -> None:
    with suppress(BrokenPipeError):
        click.echo(text, err=True)
