"""The ``mvm`` command. What it imports delays every command, so it is click and the standard library."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from mvm.cli.base import LazyGroup, output_in, output_of, wants_debug
from mvm.cli.paths import NewDirectory

_COMMANDS = {
    "up": ("mvm.cli.stack:up", "Start the stack on this machine."),
    "down": ("mvm.cli.stack:down", "Stop the stack; instances go on."),
    "status": ("mvm.cli.stack:status", "Whether each part of the stack answers."),
    "doctor": ("mvm.cli.stack:doctor", "Whether this machine has what mvm needs."),
    "backup": ("mvm.cli.backup:backup", "Backups of this machine's node."),
    "tenant": ("mvm.cli.tenant:tenant", "Tenants: security, quota and network."),
    "pool": ("mvm.cli.pool:pool", "Pools of a tenant: one image, one shape."),
    "instance": ("mvm.cli.instance:instance", "Instances of a pool: one microVM each."),
    "job": ("mvm.cli.job:job", "What was asked, and how it went."),
    "node": ("mvm.cli.node:node", "Nodes, asked through their agents."),
    "net": ("mvm.cli.net:net", "The tenants' networks, looked at and proven."),
    "disk": ("mvm.cli.disk:disk", "What lies on the disk, and cleaning it up."),
    "audit": ("mvm.cli.audit:audit", "Who changed what of a tenant, and why."),
    "coordinator": ("mvm.cli.coordinator:coordinator", "Ask agents anywhere, by address."),
    "agent": ("mvm.cli.agent:agent", "This node's agent and its certificates."),
}


class Root(LazyGroup):
    """Ends every failure with a message and its exit code, never with a traceback."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Parse the words before the subcommand."""
        words = list(args)  # click consumes `args`
        try:
            context = super().make_context(info_name, args, parent, **extra)
        except click.UsageError as error:
            raise click.exceptions.Exit(_report(error, output_in(words), "--debug" in words)) from None
        context.meta["mvm.words"] = words
        return context

    def invoke(self, ctx: click.Context) -> Any:
        """Run the subcommand."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except (click.exceptions.Exit, BrokenPipeError):  # click ends quietly when nobody reads on
            raise
        except KeyboardInterrupt:
            ctx.exit(130)
        except Exception as error:  # noqa: BLE001 - the process ends with it
            output = output_of(ctx)
            if isinstance(error, click.UsageError) and output == "table":
                output = output_in(ctx.meta["mvm.words"])
            ctx.exit(_report(error, output, wants_debug(ctx)))
        return result


def _report(error: Exception, output: str, debug: bool) -> int:
    from mvm.cli.errors import report

    return report(error, output=output, debug=debug)


@click.command(cls=Root, lazy=_COMMANDS, no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--state-dir", envvar="MVM_STATE_DIR", type=NewDirectory(), metavar="DIR",
    help="Where the node's state is (MVM_STATE_DIR; default: /var/lib/mvm).",
)  # fmt: skip
@click.version_option(package_name="mvm-fleet", message="%(version)s")
@click.pass_context
def cli(ctx: click.Context, state_dir: str | None) -> None:
    """Run fleets of microVMs for many tenants. Every change to an instance is a job."""
    if state_dir:
        ctx.meta["mvm.state_dir"] = state_dir


def main() -> None:
    """The entry point."""
    _prepare_streams()
    try:
        cli(prog_name="mvm")
    except OSError as error:  # before there is a subcommand: a help text that cannot be written
        words = sys.argv[1:]
        sys.exit(_report(error, output_in(words), "--debug" in words))


def _prepare_streams() -> None:
    """Whatever stdout is, closed or of a poor character set: results are written to it as well as can be."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
        setattr(sys, name, stream)
        stream.reconfigure(errors="backslashreplace")
