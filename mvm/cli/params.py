"""Parameters that more than one command takes: names, the output format, waiting, confirming."""

from __future__ import annotations

import functools
import math
import os
import pwd
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click

from mvm.cli.base import output_of
from mvm.cli.fleet import Fleet
from mvm.domain.ids import InstanceRef, JobId, NodeId, PoolRef, TenantId
from mvm.domain.pool import MAX_COUNT
from mvm.errors import InvalidInput

Target = TenantId | PoolRef | InstanceRef


class _Parsed(click.ParamType):  # type: ignore[type-arg]  # older click has no arguments
    """A domain value; the domain's parser says what is wrong with the text."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse; raises `InvalidInput`."""
        return self._parse(value) if isinstance(value, str) else value


def parse_target(text: str) -> Target:
    """A tenant, pool or instance, by how many slashes there are."""
    parse: tuple[Callable[[str], Target], ...] = (TenantId, PoolRef.parse, InstanceRef.parse)
    return parse[min(text.count("/"), 2)](text)


def _parse_subject(text: str) -> str:
    return str(parse_target(text)) if "/" in text else NodeId(text)  # every tenant's id may be a node's


def _parse_seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1e7:
        raise InvalidInput("usage", f"{text!r} is not a number of seconds", hint="write a number above 0",
                           field="timeout", value=text[:80])  # fmt: skip
    return value


TENANT = _Parsed("tenant", TenantId)
POOL = _Parsed("pool", PoolRef.parse)
INSTANCE = _Parsed("instance", InstanceRef.parse)
TARGET = _Parsed("ref", parse_target)
JOB = _Parsed("job", JobId)
NODE = _Parsed("node", NodeId)
SUBJECT = _Parsed("ref", _parse_subject)
SECONDS = _Parsed("seconds", _parse_seconds)


@dataclass(frozen=True, slots=True)
class JobWait:
    """How to wait for a job: not at all, or at most `timeout_s` seconds, or until its end."""

    wait: bool
    timeout_s: float | None


def wait_options(limit: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """``--no-wait`` and ``--timeout``, passed as ``wait: JobWait``; without the latter `limit` holds."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        about = with_default("Wait at most so long; the job goes on", limit)

        @click.option("--no-wait", is_flag=True, help="Print the job's id and return.")
        @click.option("--timeout", type=SECONDS, metavar="SECONDS", help=about)
        @functools.wraps(command)
        def wrapper(*args: Any, no_wait: bool, timeout: float | None, **kwargs: Any) -> Any:
            return command(*args, wait=JobWait(not no_wait, timeout), **kwargs)

        return wrapper

    return decorate


def with_default(text: str, default: object | None) -> str:
    """The help text of an option, a clause: with its default, if it has one."""
    return f"{text}." if default is None else f"{text}; default: {default}."


job_options = wait_options("no limit")
yes_option = click.option("-y", "--yes", is_flag=True, help="Do not ask.")


def pass_fleet(command: Callable[..., Any]) -> Callable[..., Any]:
    """Passes the `Fleet` and the output format as the first two arguments."""

    @click.pass_context
    @functools.wraps(command)
    def wrapper(ctx: click.Context, *args: Any, **kwargs: Any) -> Any:
        root = ctx.find_root()
        if root.obj is None:
            root.obj = Fleet(ctx.meta.get("mvm.state_dir"))
        return command(root.obj, output_of(ctx), *args, **kwargs)

    return wrapper


def is_terminal() -> bool:
    """Whether somebody can answer a question."""
    return sys.stdin.isatty()


def confirm(what: str, yes: bool) -> None:
    """Ask before `what` is done, unless `yes`; without a terminal that is `InvalidInput`."""
    if yes:
        return
    if not is_terminal():
        raise InvalidInput("confirm.required", f"to {what} needs a yes", hint="add --yes", field="yes")
    click.confirm(f"Really {what}?", abort=True, err=True)


def read_file(path: str, limit: int, flag: str, code: str) -> bytes:
    """What is in the file at `path` (``-``: standard input), of one longer than `limit` the start and one byte more.

    Raises `InvalidInput` with `code`.
    """
    try:
        with open(0 if path == "-" else path, "rb", closefd=path != "-") as file:
            return file.read(limit + 1)
    except (OSError, ValueError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or "no usable path"
        raise InvalidInput(code, f"--{flag} {path[:200]}: {why}", hint="name a file that you may read",
                           field=flag.replace("-", "_"), value=path[:200]) from None  # fmt: skip


def counted(value: int, flag: str, code: str) -> int:
    """`value` if it is a sensible count; raises `InvalidInput`."""
    if not 1 <= value <= MAX_COUNT:
        raise InvalidInput(code, f"--{flag} is {value}", hint=f"allowed: 1 to {MAX_COUNT}", field=flag, value=value)
    return value


def actor() -> str:
    """Who asks: the user, also behind sudo."""
    try:
        return os.environ.get("SUDO_USER") or pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())
