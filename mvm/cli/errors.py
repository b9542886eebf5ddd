"""How a failure looks: ``error[code]: message`` and a hint on stderr, with JSON the error on stdout too."""

from __future__ import annotations

import os
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import click

from mvm.errors import InvalidInput, MvmError


def show_error(error: MvmError) -> None:
    """The error's lines on stderr."""
    from mvm.cli.render import clean, paint

    label = paint(f"error[{error.code}]", "bad", err=True)
    click.echo(f"{label}: {clean(error.message, lines=True)}", err=True)
    if error.hint:
        click.echo(f"{paint('hint', 'hint', err=True)}: {clean(error.hint)}", err=True)


def error_object(error: MvmError) -> dict[str, Any]:
    """What the contract calls an error: ``code, message, hint, fields``."""
    return {"code": error.code, "message": error.message, "hint": error.hint, "fields": error.fields}


def show_and_exit(errors: Sequence[MvmError]) -> None:
    """Show all, and end with the exit code they have in common, else 1. Does nothing when there are none."""
    for error in errors:
        show_error(error)
    codes = {error.exit_code for error in errors}
    if codes:
        raise click.exceptions.Exit(codes.pop() if len(codes) == 1 else 1)


def report(failure: BaseException, *, output: str, debug: bool) -> int:
    """Show why a command ended; returns its exit code."""
    if isinstance(failure, click.exceptions.NoArgsIsHelpError):
        failure.show()
        return failure.exit_code
    if debug:
        traceback.print_exception(failure)
    error = _translate(failure)
    show_error(error)
    if output != "table":
        from mvm.cli.render import emit

        emit({"error": error_object(error)}, output)
    return error.exit_code


def _translate(failure: BaseException) -> MvmError:
    if isinstance(failure, MvmError):
        return failure
    if isinstance(failure, click.UsageError):
        path = failure.ctx.command_path if failure.ctx else "mvm"
        fields: Mapping[str, object] = {}
        if isinstance(failure, click.BadParameter) and failure.param is not None and failure.param.name:
            fields = {"field": failure.param.name}
        return InvalidInput("usage", failure.format_message(), hint=f"see: {path} --help", **fields)
    if isinstance(failure, click.Abort):
        return MvmError("aborted", "nothing was done")
    if isinstance(failure, click.ClickException):
        return MvmError("usage", failure.format_message())
    if isinstance(failure, PermissionError) and os.geteuid():
        from mvm.cli.fleet import no_permission

        return no_permission(failure.filename)
    name = type(failure).__name__
    return MvmError("internal", f"{name}: {failure}", hint="this is a bug; --debug shows where")
