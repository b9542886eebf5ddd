"""The examples of a document, and running them as a reader would."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.stack import Stack

ROOT = Path(__file__).parents[2]
LONGEST_S = 300.0
_FENCE = re.compile(r"^```(?P<kind>\w*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
_EXCUSE = re.compile(r"<!-- not run: (?P<reason>[^>]+) -->\n\Z")
_ERROR = re.compile(r"^error\[(?P<code>[\w.]+)\]", re.MULTILINE)
_INSTANCE = re.compile(r"(?P<pool>[a-z0-9-]+/[a-z0-9-]+)/(?P<id>i-[0-9a-f]{8})")
_JOB = re.compile(r"j-[0-9a-f]{12}-[0-9a-f]{10}")
_KILL = re.compile(r"^kill -9 \d+$")


@dataclass(frozen=True)
class Example:
    """Commands that a document shows, and the code of the error that it shows them to end with.

    `excuse` says why they are not run.
    """

    place: str
    commands: str
    error: str = ""
    excuse: str = ""


def examples(document: Path) -> list[Example]:
    """What `document` tells its reader to type, in its order.

    Blocks of ``sh`` are whole scripts. In blocks of ``console`` each ``$`` begins a command, and what follows is shown.
    """
    found: list[Example] = []
    text = document.read_text()
    for fence in _FENCE.finditer(text):
        place = f"{document.name}:{text[: fence.start()].count(chr(10)) + 1}"
        excuse = _EXCUSE.search(text[: fence.start()])
        reason = excuse["reason"] if excuse else ""
        if fence["kind"] == "sh":
            found.append(Example(place, fence["body"], excuse=reason))
        elif fence["kind"] == "console":
            found += [Example(place, command, code, reason) for command, code in _commands(fence["body"].splitlines())]
    return found


def _commands(lines: Sequence[str]) -> Iterator[tuple[str, str]]:
    starts = [at for at, line in enumerate(lines) if line.startswith("$ ")]
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        last = start
        while lines[last].endswith("\\"):
            last += 1
        shown = _ERROR.search("\n".join(lines[last + 1 : end]))
        yield "\n".join(lines[start : last + 1])[2:], shown["code"] if shown else ""


class Reader:
    """Types what documents show, on a stack and in a directory of its own. Ids of theirs stand for those there are."""

    def __init__(self, stack: Stack, place: Path) -> None:
        self._stack = stack
        self._place = place
        self._known: dict[str, str] = {}
        self._job = ""
        for name in ("docs", "scripts", ".venv", "README.md"):
            (place / name).symlink_to(ROOT / name)
        (place / "backups").mkdir()
        self._env = stack.env | {"PATH": f"{self._commands()}:{stack.env['PATH']}"}

    def _commands(self) -> Path:
        """`mvm`, and interrupting what would follow for ever as a reader would, and for it to read nothing."""
        directory = self._place / "bin"
        directory.mkdir()
        real = ROOT / ".venv" / "bin" / "mvm"
        command = directory / "mvm"
        command.write_text(
            f"""#!/bin/sh
case " $* " in
*" -f "*) timeout -s INT 5 {real} "$@"; [ $? = 124 ] || [ $? = 130 ] ;;
*) exec {real} "$@" ;;
esac
"""
        )
        command.chmod(0o755)
        return directory

    def type(self, example: Example) -> None:
        """One example, which must end as it is shown to."""
        text = self._here(example.commands)
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text.replace("export PATH=$PWD/.venv/bin:$PATH", ":")],
            cwd=self._place, env=self._env, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=LONGEST_S, check=False,
        )  # fmt: skip
        told = f"{example.place}: {text}\nended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        if example.error:
            assert f"error[{example.error}]" in done.stderr, told
            assert done.returncode, told
        else:
            assert done.returncode == 0, told
        if jobs := _JOB.findall(done.stdout):
            self._job = jobs[-1]

    def run(self, *words: str) -> str:
        """What a script that must succeed prints."""
        done = subprocess.run(words, cwd=self._place, env=self._env, capture_output=True, text=True, timeout=LONGEST_S)
        assert done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def _here(self, text: str) -> str:
        """`text` as a reader would type it on this stack."""
        text = _INSTANCE.sub(lambda found: f"{found['pool']}/{self._instance(found['pool'], found['id'])}", text)
        text = _JOB.sub(lambda _: self._job, text)
        if _KILL.match(text.strip()):
            text = f"kill -9 {self._stack.vmms()[0]}"
        here = {
            "scripts/setup": f"{ROOT}/scripts/setup",  # it finds its tree by its own path
            "/var/lib/mvm": str(self._stack.layout.root),
            "/srv/mvm": f"{self._place}/restored",
            "/backups": f"{self._place}/backups",
            "127.0.0.1:4433": f"127.0.0.1:{self._stack.env['MVM_AGENT_PORT']}",
        }
        for shown, real in here.items():
            text = text.replace(shown, real)
        return text

    def _instance(self, pool: str, shown: str) -> str:
        if shown not in self._known:
            refs = [row["ref"] for row in self._stack.json("instance", "list", "--pool", pool)]
            ids = [ref.split("/")[2] for ref in refs]
            self._known[shown] = next(each for each in ids if each not in self._known.values())
        return self._known[shown]


def own_name() -> str:
    """What this machine's node is called when nobody names it."""
    return os.environ.get("MVM_NODE_ID") or socket.gethostname().partition(".")[0].lower()
