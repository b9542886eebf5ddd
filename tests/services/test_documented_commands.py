"""Every command in the documents is one that there is, with flags that it has; tests/e2e/test_documents runs them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from mvm.cli.main import cli
from mvm.errors import InvalidInput
from tests.support.documents import ROOT, examples

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_JOB = "j-01a20b5f1c19-d1fc307a6a"


def commands(document: Path) -> list[list[str]]:
    """The words that are typed after ``mvm``, also in blocks that cannot be run."""
    texts = (
        each.commands.replace("\\\n", " ").replace("$job", _JOB).replace("/backups/", "") for each in examples(document)
    )
    return [words for text in texts for line in text.splitlines() for words in _in_line(line)]


def _in_line(line: str) -> Iterator[list[str]]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.wordchars += ":,@$%"
    words = list(lexer)
    for at, word in enumerate(words):
        if word == "mvm" and (at == 0 or set(words[at - 1]) <= set("|;&(")):
            rest = words[at + 1 :]
            end = next((place for place, each in enumerate(rest) if set(each) <= set("|;&()<>")), len(rest))
            yield rest[:end]


def parse(words: list[str]) -> None:
    """Read a command line as click does, without doing it."""
    context = click.Context(cli, info_name="mvm")
    command: click.Command = cli
    while isinstance(command, click.Group):
        if words[:1] == ["--state-dir"]:
            words = words[2:]
        _, found, words = command.resolve_command(context, words)
        assert found is not None
        command = found
    command.make_context(command.name, list(words), parent=context)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_documented_command_is_understood(
    document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("fleet.json", "secrets.json", "node.backup"):
        (tmp_path / name).write_text("{}")
    for words in commands(document):
        try:
            parse(words)
        except (click.UsageError, InvalidInput) as error:
            pytest.fail(f"{document.name}: mvm {' '.join(words)}: {error}")
