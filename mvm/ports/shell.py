"""Running other programs: the one door to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mvm.domain.instance import ProcessIdentity


@dataclass(frozen=True, slots=True)
class Completed:
    """A program that ran to its end."""

    stdout: str
    stderr: str


class Shell(Protocol):
    """Runs programs and starts ones that outlive us.

    Raises `Failed` (``shell.failed``, with the exit code and the end of its stderr) when a program fails,
    `Failed` (``shell.missing``) when there is no such program, and `TimedOut` past the deadline.
    """

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: str = "",
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout_s: float = 60.0,
        meanwhile: Callable[[], None] | None = None,
    ) -> Completed:
        """Run to the end and return its output, decoded as UTF-8 with replacement.

        `meanwhile` is called about once a second; what it raises ends the program and all that it started.
        """
        ...

    def spawn(
        self, argv: Sequence[str], *, log: Path, output: Path | None = None, stdin: bytes = b"",
        pass_fds: Sequence[int] = (), program: str | None = None,
    ) -> ProcessIdentity:  # fmt: skip
        """Start a program in a session of its own that goes on when we end; both its streams append to `log`.

        Its standard output appends to `output` instead, if that is given. It reads `stdin`, at most 4 KiB. `program`
        is the file to run when that is not the one that `argv` begins with.
        """
        ...
