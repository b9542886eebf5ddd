"""A path that cannot be is refused before anything is done, with the part of it that is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import gettempdir

import pytest

from tests.support.command_line import CommandLine


@pytest.mark.parametrize("line", ["backup create {}", "net verify --active --report {}"])
@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("no/such/x", "{}/no/such: there is no such directory"),
        ("file/x", "{}/file: is not a directory"),
        ("file/below/x", "{}/file: is not a directory"),
        ("directory", "{}/directory' is a directory"),
    ],
)
def test_a_file_to_be_written_needs_its_directory(
    mvm: CommandLine, tmp_path: Path, line: str, where: str, says: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "directory").mkdir()
    told = mvm.fails(2, "usage", *line.format(tmp_path / where).split())
    assert says.format(tmp_path) in told.stderr
    assert "try again" not in told.stderr


def test_a_file_to_be_written_may_be_named_without_a_directory(
    mvm: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mvm.fails(3, "backup.no_state", "--state-dir", "state", "backup", "create", "x")


def test_nothing_is_written_where_one_may_not(tmp_path: Path) -> None:
    """As somebody who is not root: root may write anywhere."""
    place = tmp_path / "others"
    place.mkdir(mode=0o755)
    for folder in (tmp_path, *tmp_path.parents):
        if Path(gettempdir()) in folder.parents:
            folder.chmod(0o755)
    program = "import os; os.setuid(65534); from mvm.cli.main import main; main()"
    argv = [sys.executable, "-c", program, "--state-dir", str(tmp_path / "state"), "backup", "create", str(place / "x")]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"{place}: may not be written to" in done.stderr


@pytest.mark.parametrize(
    "line", ["status", "up --detach", "down", "tenant list", "backup create x", "agent certs init"]
)
def test_a_state_directory_below_a_file_is_refused(mvm: CommandLine, tmp_path: Path, line: str) -> None:
    (tmp_path / "file").touch()
    told = mvm.fails(2, "usage", "--state-dir", str(tmp_path / "file" / "state"), *line.split())
    assert f"{tmp_path}/file: is not a directory" in told.stderr
