"""Paths on the command line, looked at before anything is done. Imports click only, as `mvm.cli.main` needs it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click


class NewFile(click.Path):
    """A file to be written: its directory is there, and a new one may be made in it."""

    def __init__(self) -> None:
        super().__init__(dir_okay=False, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path; fails with the part of it that is wrong."""
        path = super().convert(value, param, ctx)
        directory = Path(os.fsdecode(path)).absolute().parent
        if wrong := _not_a_directory(directory):
            self.fail(wrong, param, ctx)
        if not directory.exists():
            self.fail(f"{directory}: there is no such directory", param, ctx)
        if not os.path.lexists(path) and not os.access(directory, os.W_OK | os.X_OK):
            self.fail(f"{directory}: may not be written to", param, ctx)
        return path


class NewDirectory(click.Path):
    """A directory that is there, or may be made with those above it."""

    def __init__(self) -> None:
        super().__init__(file_okay=False, readable=False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path; fails with the part of it that is wrong."""
        path = super().convert(value, param, ctx)
        if wrong := _not_a_directory(Path(os.fsdecode(path)).absolute()):
            self.fail(wrong, param, ctx)
        return path


def _not_a_directory(path: Path) -> str | None:
    """What of `path`, as far as it exists, is something else than a directory."""
    for part in (path, *path.parents):
        if os.path.lexists(part):
            return None if part.is_dir() else f"{part}: is not a directory"
    return None
