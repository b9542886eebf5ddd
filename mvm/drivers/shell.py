"""Running other programs; the only importer of subprocess."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from mvm.domain.instance import ProcessIdentity
from mvm.errors import Failed, TimedOut
from mvm.ports.shell import Completed


class LocalShell:
    """See ports/shell.py; on this machine."""

    def __init__(self) -> None:
        self._children: list[subprocess.Popen[bytes]] = []

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: str = "",
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout_s: float = 60.0,
    ) -> Completed:
        """See ports/shell.py."""
        try:
            done = subprocess.run(
                argv, input=stdin.encode(), env=env, cwd=cwd, timeout=timeout_s, capture_output=True, check=False
            )
        except FileNotFoundError:
            raise Failed("shell.missing", f"there is no program {argv[0]}", hint="run: mvm doctor") from None
        except subprocess.TimeoutExpired:
            raise TimedOut("shell.timeout", f"{argv[0]} took longer than {timeout_s:g} s") from None
        stdout, stderr = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
        if done.returncode:
            raise Failed("shell.failed", f"{argv[0]} ended with {done.returncode}: {stderr.strip()[-500:]}",
                         exit_code=done.returncode)  # fmt: skip
        return Completed(stdout, stderr)

    def spawn(self, argv: Sequence[str], *, log: Path, pass_fds: Sequence[int] = ()) -> ProcessIdentity:
        """See ports/shell.py."""
        try:
            with log.open("ab") as out:
                child = subprocess.Popen(
                    argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True, pass_fds=pass_fds
                )
        except FileNotFoundError:
            raise Failed("shell.missing", f"there is no program {argv[0]}", hint="run: mvm doctor") from None
        self._children.append(child)
        stat = Path(f"/proc/{child.pid}/stat").read_text()
        return ProcessIdentity(child.pid, int(stat.rpartition(")")[2].split()[19]))
