"""``mvm up``, ``down``, ``status`` and ``doctor``."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING

import click

from mvm.cli.base import Command, output_of
from mvm.cli.render import emit, show_list, show_one

if TYPE_CHECKING:
    from mvm.drivers.stack import Stack
    from mvm.settings import Settings

_UNREACHABLE = 6
_PARTS = {name: name for name in ("name", "state", "pid", "since", "answers", "note")}
_CHECKS = {name: name for name in ("name", "result", "detail", "hint")}


@click.command(cls=Command)
@click.option("--detach", is_flag=True, help="Return once every part answers; to end it: mvm down.")
@click.option(
    "--netns", metavar="NAME", help="Network namespace; 'host': none; default: mvm, or one by the state directory."
)
@click.option("--driver", type=click.Choice(["qemu", "fake"]), help="What runs the instances; default: qemu.")
@click.option(
    "--flower-port", type=click.IntRange(1, 65535), metavar="P", help="Flower's port on loopback; default: 5555."
)
@click.option(
    "--prepare", is_flag=True, help="Start nothing; only make the state directory, for a stack that others run."
)
@click.pass_context
def up(
    ctx: click.Context,
    detach: bool,
    netns: str | None,
    driver: str | None,
    flower_port: int | None,
    prepare: bool,
) -> None:
    """Start the stack on this machine; without --detach stay until Ctrl-C. Instances go on either way."""
    from mvm.drivers.stack import connection
    from mvm.telemetry.logging import parse_filter, without_passwords

    os.umask(0o077)  # logs and sockets of the stack are for its user alone
    settings = _settings(ctx, netns=netns, driver=driver, flower_port=flower_port)
    parse_filter(settings.log)  # every part would refuse it
    stack = _stack(settings)
    if prepare:
        stack.prepare_alone(_say)
        return
    with _interrupts_as_keyboard():
        stack.up(_say)
        try:
            facts = {
                name: without_passwords(value) if isinstance(value, str) else value
                for name, value in connection(stack.settings).items()
            }
            with suppress(BrokenPipeError):
                show_one(facts, output_of(ctx))
            _say(f"up; Flower's user is mvm, its password in {settings.layout.flower_password}")
            if detach:
                return
            _say("Ctrl-C stops the stack; instances go on")
            stack.watch()
        except KeyboardInterrupt:
            _down(stack)
        except BaseException:
            _down(stack)
            raise


@click.command(cls=Command)
@click.option("--instances", is_flag=True, help="Stop all running instances first.")
@click.pass_context
def down(ctx: click.Context, instances: bool) -> None:
    """Stop the stack and wait until it is gone. Instances go on unless --instances is given."""
    from mvm.drivers.stack import running_settings

    settings = running_settings(_settings(ctx))
    stack = _stack(settings)
    if instances:
        from mvm.cli.stop_all import down_with_instances

        down_with_instances(settings, stack, _say)
    else:
        stack.down(_say)
    if output_of(ctx) == "table":
        _say("down")
    else:
        emit({"state": "down"}, output_of(ctx))


@click.command(cls=Command)
@click.pass_context
def status(ctx: click.Context) -> None:
    """Show every part of the stack; exit 0 when all of them answer, else 6."""
    from mvm.drivers.stack import running_settings

    stack = _stack(running_settings(_settings(ctx)))
    parts = stack.status()
    show_list([part.to_dict() for part in parts], _PARTS, output_of(ctx), empty="")
    if all(part.state == "stopped" for part in parts):
        _say("not running; start it with: mvm up --detach")
    elif not stack.is_published():
        _say("no command can use it yet: it is being started, or who did that was killed; then: mvm up --detach")
        ctx.exit(_UNREACHABLE)
    if not all(part.answers for part in parts):
        ctx.exit(_UNREACHABLE)


@click.command(cls=Command)
@click.pass_context
def doctor(ctx: click.Context) -> None:
    """Check what mvm needs of this machine; exit 1 when something is missing."""
    from mvm.drivers.doctor import examine

    checks = [check.to_dict() for check in examine(_settings(ctx))]
    show_list(checks, _CHECKS, output_of(ctx), empty="")
    if any(check["result"] == "fail" for check in checks):
        ctx.exit(1)


def _settings(ctx: click.Context, **flags: object) -> Settings:
    from mvm.settings import load_settings

    return load_settings(state_dir=ctx.meta.get("mvm.state_dir"), **flags)


def _stack(settings: Settings) -> Stack:
    from mvm.drivers.shell import LocalShell
    from mvm.drivers.stack import Stack

    return Stack(settings, LocalShell())


def _down(stack: Stack) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    stack.down(_say)


@contextmanager
def _interrupts_as_keyboard() -> Iterator[None]:
    """SIGTERM and SIGHUP end the command the way Ctrl-C does: in order."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    former = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _say(text: str) -> None:
    with suppress(BrokenPipeError):  # whoever stops reading has not asked for the stack to end
        click.echo(text, err=True)
