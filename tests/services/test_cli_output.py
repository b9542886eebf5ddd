"""Where the output goes is no business of ours: a full disk, a closed stream, a poor character set."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

FULL = "/dev/full"


def run(words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """The command line through a shell, as root's would be; exit code and what reached stderr."""
    command = f"{sys.executable} -m mvm {words}"
    return subprocess.run(
        command,
        shell=True,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "MVM_STATE_DIR": "/nonexistent/mvm", **env},
    )


@pytest.mark.parametrize("words", ["--help", "job --help", "--version", "status", "status -o json", "doctor -o yaml"])
def test_output_to_a_full_disk_is_told_as_such(words: str) -> None:
    done = run(f"{words} > {FULL}")
    assert done.returncode == 1, done
    assert done.stderr.startswith("error[disk.full]: ") or "\nerror[disk.full]: " in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize("words", ["--help", "status -o json", "nonsense"])
def test_with_no_room_for_the_error_either_the_exit_code_tells(words: str) -> None:
    assert run(f"{words} > {FULL} 2> {FULL}").returncode in (1, 2)


@pytest.mark.parametrize("words", ["--help >&-", "status >&-", "status -o json >&- 2>&-", "nonsense 2>&-"])
def test_a_closed_stream_is_no_defect(words: str) -> None:
    done = run(words)
    assert "internal" not in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode in (0, 2, 6), done


def test_a_poor_character_set_is_written_in_escapes() -> None:
    done = run("tenant info 'müller' -o yaml", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 2
    assert "tenant.invalid_id" in done.stdout
    assert "Traceback" not in done.stderr
