"""``mvm up``, ``down``, ``status`` and ``doctor`` as scripts see them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from mvm.cli import stack
from mvm.drivers import doctor
from mvm.drivers.doctor import Check
from mvm.errors import InvalidInput, NotAllowed

PARTS = ["redis", "worker", "urgent", "beat", "agent", "metadata", "flower", "metrics"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CliRunner]:
    monkeypatch.setenv("MVM_STATE_DIR", str(tmp_path / "s"))
    umask = os.umask(0o022)
    yield CliRunner()
    os.umask(umask)


def test_status_when_nothing_runs(run: CliRunner) -> None:
    result = run.invoke(stack.status, ["-o", "json"])
    rows = json.loads(result.stdout)
    assert [row["name"] for row in rows] == PARTS
    assert all(row["state"] == "stopped" and not row["answers"] and row["note"] == "not running" for row in rows)
    assert result.exit_code == 6
    assert "not running" in result.stderr
    table = run.invoke(stack.status).stdout.splitlines()
    assert table[0].split() == ["NAME", "STATE", "PID", "SINCE", "ANSWERS", "NOTE"]
    assert len(table) == 1 + len(PARTS)


@pytest.mark.parametrize("flags", [[], ["--instances"]])
def test_down_when_nothing_runs_is_fine(run: CliRunner, flags: list[str], tmp_path: Path) -> None:
    result = run.invoke(stack.down, ["-o", "yaml", *flags])
    assert (result.exit_code, result.stdout) == (0, "state: down\n")
    assert not (tmp_path / "s").exists()


def test_up_refuses_another_version(run: CliRunner, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "VERSION").write_text("7\n")
    result = run.invoke(stack.up, ["--detach", "--driver", "fake", "--netns", "host"])
    assert isinstance(result.exception, NotAllowed)
    assert result.exception.code == "state.version"


def test_up_refuses_a_log_filter_that_no_part_could_read(run: CliRunner, tmp_path: Path) -> None:
    result = run.invoke(stack.up, ["--detach", "--driver", "fake", "--netns", "host"], env={"MVM_LOG": "loud"})
    assert isinstance(result.exception, InvalidInput)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("text", "code"),
    [("flower = 1", "settings.unknown"), ("flower_port = 0", "settings.invalid"), ("=", "settings.unreadable")],
)
def test_up_refuses_a_wrong_config(run: CliRunner, tmp_path: Path, text: str, code: str) -> None:
    (tmp_path / "mvm.toml").write_text(text)
    error = run.invoke(stack.up, env={"MVM_CONFIG": str(tmp_path / "mvm.toml")}).exception
    assert isinstance(error, InvalidInput)
    assert error.code == code
    assert "MVM_CONFIG" in error.hint


@pytest.mark.redis
def test_prepare_makes_the_state_directory_and_starts_nothing(run: CliRunner, tmp_path: Path) -> None:
    assert run.invoke(stack.up, ["--prepare"]).exit_code == 0
    assert (tmp_path / "s" / "certs" / "node.pem").exists()
    assert not (tmp_path / "s" / "run" / "supervisord.conf").exists()


def test_doctor_fails_only_for_what_is_missing(run: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Check("root", "ok", "yes"), Check("accelerator", "warn", "tcg", "slow")]
    monkeypatch.setattr(doctor, "examine", lambda _settings: found)
    result = run.invoke(stack.doctor, ["-o", "json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)[1] == {"name": "accelerator", "result": "warn", "detail": "tcg", "hint": "slow"}
    found.append(Check("tun", "fail", "missing", "modprobe tun"))
    assert run.invoke(stack.doctor).exit_code == 1


def test_a_reader_that_stops_reading_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_args: object, **_more: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("click.echo", broken)
    stack._say("progress")
