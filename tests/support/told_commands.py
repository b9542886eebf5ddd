"""The commands that the program's own texts tell people to type: in errors, hints, remarks and help."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from mvm.cli.main import cli

ROOT = Path(__file__).parents[2]
_SOURCES = ("mvm", "workers", "beat")
_HOLE = "\0"
_NOUNS = "|".join(cli.list_commands(None))  # type: ignore[arg-type, attr-defined]
_COMMAND = re.compile(rf"(?<![\w@/.-])mvm (?:{_NOUNS})(?![\w-])[^;,()'`]*")
_ENDS = re.compile(r": |:$|\.( |$)|\n")
_FORMAT = re.compile(r"(?<!\{)\{\w+\}(?!\})")
_LUA_HOLE = re.compile(r"' \.\. \w+(\[\d+\])?")

CANDIDATES = (
    "acme/web/i-7f2c91ab", "acme/web", "acme", "j-01a20b5f1c19-d1fc307a6a", "--running 1", "start", "max-running",
)  # fmt: skip
_STANDS_FOR = {
    "N": "1",
    "F": "f.json",
    "FILE": "f.json",
    "DIR": "dir",
    "NODE": "n1",
    "REF": "acme/web/i-7f2c91ab",
    "T/P": "acme/web",
    "T": "acme",
}


@dataclass(frozen=True, order=True)
class Told:
    """Where a text is, and a command in it, with a mark where something is filled in."""

    place: str
    command: str

    @property
    def filled(self) -> Iterator[list[str]]:
        """The words after ``mvm``, with one thing after another in the place of each that is filled in."""
        for values in product(CANDIDATES, repeat=self.command.count(_HOLE)):
            parts = self.command.split(_HOLE)
            text = parts[0] + "".join(value + part for value, part in zip(values, parts[1:], strict=True))
            yield [_STANDS_FOR.get(word, word) for word in shlex.split(text)[1:]]

    def __str__(self) -> str:
        return f"{self.place}: {self.command.replace(_HOLE, '...')}"


def told_commands() -> list[Told]:
    """All of them, each once for each file."""
    paths = [path for source in _SOURCES for path in sorted((ROOT / source).rglob("*.py"))]
    return sorted({Told(str(path.relative_to(ROOT)), command) for path in paths for command in _in_file(path)})


def _in_file(path: Path) -> Iterator[str]:
    for text in _texts(ast.parse(path.read_text())):
        text = _LUA_HOLE.sub(_HOLE, _FORMAT.sub(_HOLE, text))
        for found in _COMMAND.finditer(text):
            yield _ENDS.split(found[0])[0].strip()


def _texts(node: ast.AST) -> Iterator[str]:
    """The texts in a tree, but docstrings."""
    if (text := _text(node)) is not None:
        yield text
        return
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
            continue
        yield from _texts(child)


def _text(node: ast.AST) -> str | None:
    """What a node is as a text, with a mark for each part that is not known before; None when it is no text."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) or _HOLE for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _text(node.left), _text(node.right)
        return None if left is right is None else (left or _HOLE) + (right or _HOLE)
    return None
