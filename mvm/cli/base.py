"""Commands and groups that share ``--output`` and ``--debug``. Imports click only: ``mvm --help`` waits for it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import click

OUTPUTS = ("table", "json", "yaml")
_OUTPUT, _DEBUG = "mvm.output", "mvm.debug"


def output_of(ctx: click.Context) -> str:
    """The format asked for; the option nearest to the end of the line wins."""
    return str(ctx.meta.get(_OUTPUT, "table"))


def wants_debug(ctx: click.Context) -> bool:
    """Whether tracebacks are wanted."""
    return bool(ctx.meta.get(_DEBUG))


def output_in(args: list[str]) -> str:
    """The format named in `args`, for a line so wrong that it could not be parsed."""
    words = args[: args.index("--")] if "--" in args else args
    for name in OUTPUTS:
        spellings = {f"--output={name}", f"-o{name}", f"-o={name}"}
        pairs = pairwise(words)
        if spellings.intersection(words) or any(flag in ("-o", "--output") and value == name for flag, value in pairs):
            return name
    return "table"


def _remember(key: str) -> Any:
    def callback(ctx: click.Context, _param: click.Parameter, value: Any) -> None:
        if value:
            ctx.meta[key] = value

    return callback


def common_options() -> list[click.Parameter]:
    """``--output`` and ``--debug``; eager, so that they are known when another parameter turns out wrong."""
    return [
        click.Option(
            ["-o", "--output"], type=click.Choice(OUTPUTS), expose_value=False, is_eager=True,
            callback=_remember(_OUTPUT), help="How to print the result (default: table).",
        ),
        click.Option(
            ["--debug"], is_flag=True, expose_value=False, is_eager=True, callback=_remember(_DEBUG),
            help="Show a traceback when something fails.",
        ),
    ]  # fmt: skip


class Command(click.Command):
    """A command with the common options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.extend(common_options())


class Group(click.Group):
    """A noun: a group with the common options, whose commands have them too."""

    command_class = Command
    group_class = type

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.extend(common_options())


class LazyGroup(Group):
    """A group whose commands are imported when they are used; their help lines are known before."""

    def __init__(self, *args: Any, lazy: Mapping[str, tuple[str, str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lazy = lazy  # name -> ("module:attribute", help line)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in the table's order."""
        return list(self._lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return the command."""
        if cmd_name not in self._lazy:
            return None
        module, _, attribute = self._lazy[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in self._lazy.items()])
