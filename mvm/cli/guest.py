"""The commands of ``mvm instance`` that reach into a guest: logs, ssh, exec."""

from __future__ import annotations

import os
import shlex
import sys
from base64 import b64decode, b64encode
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import click

from mvm.cli.base import Command
from mvm.cli.errors import show_error
from mvm.cli.fleet import READ_S, Fleet
from mvm.cli.params import INSTANCE, SECONDS, pass_fleet
from mvm.cli.render import clean, emit
from mvm.cli.words import WordsCommand, unread_input
from mvm.domain.commands import ExecEnd, ExecOutput, ExecPart, ExecResult, as_line, collected
from mvm.domain.ids import InstanceRef
from mvm.domain.lifecycle import Status
from mvm.errors import Failed, InvalidInput, MvmError, NotAllowed, NotFound, TimedOut

_JSON_LIMIT = 8 << 20  # bytes of each stream in one object
_INCOMPLETE = 125  # exit code of a command that succeeded and was not told in full
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


@click.command(cls=WordsCommand)
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


@click.command(cls=WordsCommand, name="exec")
@click.argument("ref", type=INSTANCE)
@_words
@click.option("--timeout", type=SECONDS, default="60", metavar="SECONDS", help="Then the guest ends it; default: 60.")
@pass_fleet
def exec_(fleet: Fleet, output: str, ref: InstanceRef, command: Sequence[str], timeout: float) -> None:
    """Run CMD as root in instance REF; exits with its exit code.

    Ctrl-C ends CMD in the guest. It reads nothing from standard input. 124: CMD was ended at its --timeout. 125: CMD
    succeeded, but not all of its output is here.
    """
    if not command:
        raise click.UsageError("Missing argument '-- CMD...'.")
    if unread_input():
        raise _input_refused()
    address, _ = find(fleet, ref)
    line = as_line([os.fsencode(word) for word in command])
    params = {"ref": str(ref), "command_b64": b64encode(line).decode(), "deadline_s": timeout}
    stream = fleet.agents.stream(address, "instance.exec", params, deadline_s=timeout + READ_S)
    with closing(_parts(stream)) as parts:
        if output == "table":
            ended = _pass_on(parts)
        else:
            result = collected(parts, limit=_JSON_LIMIT)
            ended = ExecEnd(result.exit_code, result.truncated, result.timed_out)
            emit(_as_object(result), output)
    raise click.exceptions.Exit(_exit_code(ended, timeout))


def _parts(stream: Iterator[dict[str, Any]]) -> Generator[ExecPart, None, None]:
    """What the agent tells of a command."""
    with closing(stream):  # type: ignore[type-var]
        for part in stream:
            if "exit_code" in part:
                yield ExecEnd(part["exit_code"], part["truncated"], part["timed_out"])
                return
            yield ExecOutput(b64decode(part.get("stdout_b64", "")), b64decode(part.get("stderr_b64", "")))
    raise Failed("agent.protocol", "the agent did not tell how the command ended")


def _pass_on(parts: Iterator[ExecPart]) -> ExecEnd:
    for part in parts:
        if isinstance(part, ExecEnd):
            return part
        click.echo(part.stdout, nl=False)
        click.echo(part.stderr, nl=False, err=True)
    raise AssertionError("a command's parts have an end")


def _as_object(result: ExecResult) -> dict[str, Any]:
    """As JSON has it; what is no UTF-8 is there in base64 too."""
    streams = {"stdout": result.stdout, "stderr": result.stderr}
    texts = {name: data.decode(errors="replace") for name, data in streams.items()}
    encoded = {
        f"{name}_b64": b64encode(data).decode() for name, data in streams.items() if texts[name].encode() != data
    }
    return {
        "exit_code": result.exit_code,
        **texts,
        **encoded,
        "truncated": result.truncated,
        "timed_out": result.timed_out,
    }


def _exit_code(ended: ExecEnd, timeout: float) -> int:
    """What to exit with after saying, if so, why it is not the command's own."""
    errors: list[MvmError] = []
    if ended.timed_out:
        errors.append(
            TimedOut(
                "guest.timed_out",
                f"the command did not end within {timeout:g} s, and its guest ends it",
                hint="--timeout SECONDS gives it longer",
                timeout_s=timeout,
            )
        )
    if ended.truncated:
        errors.append(Failed("guest.output_cut", "the output is not complete: only its beginning was kept",
                             hint="let the command write to a file and fetch that, or print less"))  # fmt: skip
    if unread_input():
        errors.append(_input_refused())
    for error in errors:
        show_error(error)
    return ended.exit_code or (_INCOMPLETE if errors else 0)


def _input_refused() -> InvalidInput:
    return InvalidInput(
        "exec.input", "standard input has data, and commands in guests read nothing from it",
        hint="give it in CMD's words; if it is not meant for CMD: </dev/null",
    )  # fmt: skip
