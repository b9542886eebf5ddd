"""Every command that a hint, a remark or an error names is understood as it stands there."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from mvm.errors import InvalidInput
from tests.services.test_documented_commands import parse
from tests.support.command_line import CommandLine
from tests.support.told_commands import told_commands

_ASKS_THE_FLEET = {"audit", "disk", "instance", "job", "net", "node", "pool", "tenant"}


def refusal(mvm: CommandLine, words: list[str]) -> str | None:
    """Why the line is no use as it stands, whatever there is; None when it would be done or only asks first."""
    try:
        parse(words)
    except (click.UsageError, click.exceptions.Exit, InvalidInput) as error:
        return str(error) if "--help" not in words else None
    if words[0] not in _ASKS_THE_FLEET or "--help" in words:
        return None
    result = mvm(*words)
    asks = "confirm.required" in result.output
    return result.output if result.exit_code == InvalidInput.exit_code and not asks else None


def test_every_command_that_a_text_names_is_understood_as_typed(
    mvm: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f.json").write_text('{"TOKEN": "x"}')
    told = told_commands()
    assert len(told) > 60
    refused = []
    for each in told:
        why = [refusal(mvm, words) for words in each.filled]
        if None not in why:
            refused.append(f"{each}\n    {why[0]}")
    assert not refused, "\n".join(refused)
