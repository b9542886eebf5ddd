"""What a fake guest's ``sh`` understands."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from mvm.domain.commands import ExecResult


def run_command(command: str, hostname: str, secrets: Mapping[str, str]) -> ExecResult:
    """Run echo, exit, hostname, cat /etc/hostname, true and false, with ``;`` between them and ``>&2`` behind.

    Of ``/run/secrets`` it knows ls and sha256sum: `secrets` are names and digests.
    """
    lexer = shlex.shlex(command, posix=True, punctuation_chars=";")
    lexer.whitespace_split = True
    streams = {1: "", 2: ""}
    code = 0
    for words in _split(list(lexer)):
        stream = 2 if ">&2" in words else 1
        match [word for word in words if word != ">&2"]:
            case ["exit", *rest]:
                return _result(int(rest[0]) & 0xFF if rest else code, streams)
            case ["echo", *rest]:
                code, streams[stream] = 0, streams[stream] + " ".join(rest) + "\n"
            case ["hostname"] | ["cat", "/etc/hostname"]:
                code, streams[stream] = 0, streams[stream] + hostname + "\n"
            case ["ls", "/run/secrets"]:
                code, streams[stream] = 0, streams[stream] + "".join(f"{name}\n" for name in sorted(secrets))
            case ["sha256sum", path] if path.removeprefix("/run/secrets/") in secrets:
                digest = secrets[path.removeprefix("/run/secrets/")]
                code, streams[stream] = 0, streams[stream] + f"{digest}  {path}\n"
            case ["true"]:
                code = 0
            case ["false"]:
                code = 1
            case [name, *_]:
                code, streams[2] = 127, streams[2] + f"sh: {name}: not found\n"
    return _result(code, streams)


def _result(code: int, streams: dict[int, str]) -> ExecResult:
    return ExecResult(code, _bytes(streams[1]), _bytes(streams[2]))


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _split(words: list[str]) -> list[list[str]]:
    commands: list[list[str]] = [[]]
    for word in words:
        if word == ";":
            commands.append([])
        else:
            commands[-1].append(word)
    return commands
