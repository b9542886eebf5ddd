"""A plain Shell for driver tests."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from mvm.domain.instance import ProcessIdentity
from mvm.errors import Failed
from mvm.ports.shell import Completed


class PlainShell:
    """`run` alone; remembers what it ran."""

    def __init__(self) -> None:
        self.ran: list[Sequence[str]] = []

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: str = "",
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout_s: float = 60.0,
    ) -> Completed:
        self.ran.append(argv)
        done = subprocess.run(
            argv, input=stdin, env={**os.environ, **(env or {})}, cwd=cwd, timeout=timeout_s, capture_output=True,
            text=True, errors="replace", check=False,
        )  # fmt: skip
        if done.returncode:
            raise Failed("shell.failed", f"{argv[0]} ended with {done.returncode}: {done.stderr[-2000:]}")
        return Completed(done.stdout, done.stderr)

    def spawn(self, argv: Sequence[str], *, log: Path, pass_fds: Sequence[int] = ()) -> ProcessIdentity:
        raise AssertionError("these tests start nothing that outlives them")
