"""Commands that end in another program's words: their own options come before the first of these."""

from __future__ import annotations

import fcntl
import os
import stat
import struct
import sys
import termios
from collections.abc import Collection, Sequence
from typing import Any

import click

from mvm.cli.base import Command


class WordsCommand(Command):
    """``NAME [OPTIONS] REF [OPTIONS] [--] WORD...``: from the first word on nothing is an option of ours."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse as if ``--`` had been written where the words begin."""
        options = [param for param in self.get_params(ctx) if isinstance(param, click.Option)]
        valued = {name for option in options if not option.is_flag for name in option.opts}
        return super().parse_args(ctx, with_dashes(args, valued))


def with_dashes(args: Sequence[str], valued: Collection[str]) -> list[str]:
    """`args` with ``--`` before the word that follows the first argument; options in `valued` take a value."""
    arguments = 0
    at = 0
    while at < len(args) and args[at] != "--":
        if args[at].startswith("-") and args[at] != "-":
            at += 2 if args[at] in valued else 1
            continue
        arguments += 1
        if arguments > 1:
            return [*args[:at], "--", *args[at:]]
        at += 1
    return list(args)


def unread_input() -> bool:
    """Whether something waits on standard input that nobody has read; a terminal does not count."""
    try:
        fd = sys.stdin.fileno()
        kind = os.fstat(fd).st_mode
        if stat.S_ISREG(kind):
            return os.fstat(fd).st_size > os.lseek(fd, 0, os.SEEK_CUR)
        if stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind):
            return _waiting(fd) > 0
    except (AttributeError, ValueError, OSError):  # there is none
        return False
    return False


def _waiting(fd: int) -> int:
    count: Any = fcntl.ioctl(fd, termios.FIONREAD, bytes(4))
    return int(struct.unpack("@i", count)[0])
