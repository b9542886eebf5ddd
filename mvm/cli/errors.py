"""How a failure looks: ``error[code]: message`` and a hint on stderr, with JSON the error on stdout too."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, TextIO

import click

from mvm.errors import Failed, InvalidInput, MvmError


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
    with suppress(OSError):  # nowhere to say it: the exit code tells
        show_error(error)
    if output != "table":
        from mvm.cli.render import emit

        with suppress(OSError):
            emit({"error": error_object(error)}, output)
    if isinstance(failure, OSError):
        _drop_unwritten()
    return error.exit_code


def _drop_unwritten() -> None:
    """What a stream could not write is tried once more as the process ends, which then tells of it in its own way."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            _turn_to_nowhere(stream)


def _turn_to_nowhere(stream: TextIO) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


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
    if isinstance(failure, OSError):
        return _of_system(failure)
    name = type(failure).__name__
    return MvmError("internal", f"{name}: {failure}", hint="this is a bug; --debug shows where")


def _of_system(failure: OSError) -> MvmError:
    """What the operating system refused: no defect of ours."""
    where = f"{failure.filename}: " if failure.filename else ""
    if failure.errno in (errno.ENOSPC, errno.EDQUOT):
        return Failed("disk.full", f"{where}there is no space left to write to", hint="free some space on its disk")
    said = failure.strerror or str(failure)
    return Failed("io.failed", f"{where}{said}", hint="--debug shows what was being done")
