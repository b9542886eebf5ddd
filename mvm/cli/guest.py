"""The commands of ``mvm instance`` that reach into a guest: logs, ssh, exec."""

from __future__ import annotations

import os
import shlex
import sys
from base64 import b64decode
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import click

from mvm.cli.base import Command
from mvm.cli.fleet import READ_S, Fleet
from mvm.cli.params import INSTANCE, SECONDS, pass_fleet
from mvm.cli.render import clean, emit
from mvm.domain.ids import InstanceRef
from mvm.domain.lifecycle import Status
from mvm.errors import Failed, MvmError, NotAllowed, NotFound

_words = click.argument("command", metavar="-- CMD...", nargs=-1, type=click.UNPROCESSED)


def find(fleet: Fleet, ref: InstanceRef, method: str = "instance.info") -> tuple[str, dict[str, Any]]:
    """The address of the agent that has `ref`, and its answer to `method`; raises `NotFound` when none has it."""
    last: MvmError | None = None
    for address in fleet.addresses:
        try:
            return address, fleet.call(address, method, ref=str(ref))
        except NotFound as error:
            last = last or error
    assert last is not None, "a fleet has an agent"
    raise last


@click.command(cls=Command)
@click.argument("ref", type=INSTANCE)
@click.option("-f", "--follow", is_flag=True, help="Go on until Ctrl-C.")
@pass_fleet
def logs(fleet: Fleet, output: str, ref: InstanceRef, follow: bool) -> None:
    """Print the console of instance REF. JSON and YAML have an object per piece with -f, else one."""
    address, _ = find(fleet, ref)
    deadline_s = None if follow else READ_S
    pieces = fleet.agents.stream(address, "instance.logs", {"ref": str(ref), "follow": follow}, deadline_s=deadline_s)
    with closing(pieces) as stream:  # type: ignore[type-var]
        texts = (piece["text"] for piece in stream if piece["text"])  # an empty one only says that it goes on
        if output == "table":
            for text in texts:
                click.echo(clean(text, lines=True), nl=False)
        elif follow:
            for text in texts:
                if output == "yaml":
                    click.echo("---")
                emit({"ref": str(ref), "text": text}, output)
        else:
            emit({"ref": str(ref), "text": "".join(texts)}, output)


@click.command(cls=Command)
@click.argument("ref", type=INSTANCE)
@_words
@pass_fleet
def ssh(fleet: Fleet, _output: str, ref: InstanceRef, command: Sequence[str]) -> None:
    """Log in to instance REF, or run CMD there."""
    _, fields = find(fleet, ref)
    if fields["status"] != Status.RUNNING:
        raise NotAllowed("instance.not_running", f"{ref} is {fields['status']}", hint=f"mvm instance start {ref}",
                         subject=str(ref), status=fields["status"])  # fmt: skip
    _know_host(fleet, ref)
    argv = ssh_argv(fleet, ref, str(fields["guest_ip"]), command)
    sys.stdout.flush()
    try:
        os.execvp(argv[0], argv)
    except FileNotFoundError:
        raise Failed("shell.missing", f"there is no program {argv[0]}", hint="install iproute2 and openssh-client",
                     program=argv[0]) from None  # fmt: skip


def _know_host(fleet: Fleet, ref: InstanceRef) -> None:
    """Write the guest's host key, which this node made, where ssh will look for it."""
    from mvm.drivers.file_storage import FileStorage
    from mvm.drivers.shell import LocalShell

    public = FileStorage(fleet.layout, LocalShell()).keys(ref).host_public
    path = known_hosts(fleet, ref)
    with NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False) as file:  # 0600
        file.write(f"{ref.instance} {public}\n")
    Path(file.name).replace(path)


def known_hosts(fleet: Fleet, ref: InstanceRef) -> Path:
    """Where ssh finds the host key of `ref`, under the name of its id."""
    return fleet.layout.instance(ref) / "known_hosts"


def ssh_argv(fleet: Fleet, ref: InstanceRef, ip: str, command: Sequence[str]) -> list[str]:
    """ssh with the operator's key, to the guest whose host key we made; its words arrive as they are given."""
    enter = ["ip", "netns", "exec", fleet.netns] if fleet.netns else []
    options = {
        "IdentitiesOnly": "yes",
        "UserKnownHostsFile": f'"{known_hosts(fleet, ref)}"',
        "StrictHostKeyChecking": "yes",
        "HostKeyAlias": ref.instance,
        "LogLevel": "ERROR",
    }
    flags = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    remote = [shlex.join(command)] if command else []
    return [*enter, "ssh", "-i", str(fleet.layout.ssh_key), *flags, f"root@{ip}", *remote]


@click.command(cls=Command, name="exec")
@click.argument("ref", type=INSTANCE)
@_words
@click.option("--timeout", type=SECONDS, default="60", metavar="SECONDS", help="Then the guest ends it; default: 60.")
@pass_fleet
def exec_(fleet: Fleet, output: str, ref: InstanceRef, command: Sequence[str], timeout: float) -> None:
    """Run CMD as root in instance REF; exits with its exit code."""
    if not command:
        raise click.UsageError("Missing argument '-- CMD...'.")
    address, _ = find(fleet, ref)
    params = {"ref": str(ref), "command": shlex.join(command), "deadline_s": timeout}
    result = fleet.agents.call(address, "instance.exec", params, deadline_s=timeout + READ_S)
    streams = {name: b64decode(result[f"{name}_b64"]) for name in ("stdout", "stderr")}
    if output != "table":
        texts = {name: data.decode(errors="replace") for name, data in streams.items()}
        emit({"exit_code": result["exit_code"], **texts, "truncated": result["truncated"]}, output)
    else:
        click.echo(streams["stdout"], nl=False)
        click.echo(streams["stderr"], nl=False, err=True)
        if result["truncated"]:
            click.echo("note: the guest cut the output", err=True)
    raise click.exceptions.Exit(result["exit_code"])
