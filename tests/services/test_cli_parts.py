"""Pieces of the command line: progress, tables, ssh's words, certificates, what is imported when."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner

from mvm.cli import render
from mvm.cli.guest import ssh_argv
from mvm.cli.main import cli
from mvm.cli.params import actor
from mvm.cli.progress import Progress, job_line
from mvm.domain.ids import InstanceRef
from mvm.domain.job import JobState, JobVerb
from mvm.domain.job import Progress as Done
from mvm.drivers.file_storage import FileStorage
from mvm.drivers.shell import LocalShell
from tests.services.conftest import Node
from tests.support import make
from tests.support.command_line import CommandLine


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_a_line_per_change_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    job = make.job(subject="acme/web/i-7f2c91ab")
    running = job.with_(state=JobState.RUNNING, step="boot", progress=Done(3, 5))
    with Progress([job.job_id]) as progress:
        for each in (job, job, running, running, make.ended(running)):
            progress.show(each)
    shown = capsys.readouterr()
    assert shown.out == ""
    *lines, last = shown.err.splitlines()
    what = "instance.start acme/web/i-7f2c91ab:"
    assert lines == [f"{what} queued", f"{what} boot (4/5)"]
    assert last.startswith(f"{what} succeeded after ")


def test_progress_redraws_one_line_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("COLUMNS", "40")
    job = make.job()
    with Progress([job.job_id]) as progress:
        progress.show(job)
        progress.note("nobody is there")
        progress.show(make.ended(job))
    text = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert text.count("\r\x1b[K") == 2
    assert text.endswith("\n")
    assert "\nnote: nobody is there\n" in text
    assert max(len(line) for line in text.replace("\r\x1b[K", "").splitlines()) < 40


def test_a_bulk_job_has_a_bar() -> None:
    parent, _ = make.bulk(4)
    half = parent.with_(progress=Done(2, 4, 1), params={"verb": "instance.stop"})
    assert job_line(half) == "instance.stop acme/web: [############............] 2/4, 1 failed"
    failed = half.with_(state=JobState.FAILED, finished_at=make.START + timedelta(seconds=2))
    assert job_line(failed) == "instance.stop acme/web: failed (1 of 4) after 2.0 s"


def test_several_jobs_share_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    one, two = make.job(), make.job(verb=JobVerb.TENANT_CREATE)
    with Progress([one.job_id, two.job_id]) as progress:
        progress.show(make.ended(one))
        progress.show(make.ended(two, JobState.FAILED))
    assert capsys.readouterr().err.splitlines()[-1].endswith("] 2/2, 1 failed")


def test_colour_is_for_terminals_without_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    rows = [{"state": "running"}]
    assert "\x1b" not in "".join(render.table(rows, {"state": "state"}))
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert "\x1b[32mrunning\x1b[0m" in render.table(rows, {"state": "state"})
    monkeypatch.setenv("NO_COLOR", "1")
    assert render.table(rows, {"state": "state"}) == ["STATE", "running"]


def test_tables_are_aligned_and_hold_no_control_characters() -> None:
    rows = [{"a": "x\x1b[31m", "b": None}, {"a": "longer", "b": {"ready": 2}}]
    assert render.table(rows, {"a": "a", "b": "b"}) == ["A       B", "x?[31m  -", "longer  ready=2"]


def test_ssh_runs_in_the_namespace_and_knows_the_host_key(
    mvm: CommandLine, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.pool()
    (name,) = node.create()
    ref = InstanceRef.parse(name)
    mvm.fails(4, "instance.not_running", "instance", "ssh", name)
    node.ok(JobVerb.INSTANCE_START, name)
    storage = FileStorage(mvm.fleet.layout, LocalShell())
    storage.prepare(ref, data_disk_mib=0)
    ran: list[list[str]] = []
    monkeypatch.setattr(os, "execvp", lambda _file, argv: ran.append(argv))
    mvm.ok("instance", "ssh", name, "--", "echo", "a  b")
    assert ran == [ssh_argv(mvm.fleet, ref, "10.240.0.3", ["echo", "a  b"])]
    assert ran[0][:5] == ["ip", "netns", "exec", "mvm-test", "ssh"]
    assert ran[0][-2:] == ["root@10.240.0.3", "echo 'a  b'"]
    assert {"StrictHostKeyChecking=yes", f"HostKeyAlias={ref.instance}"} <= set(ran[0])
    known = mvm.fleet.layout.instance(ref) / "known_hosts"
    assert known.read_text() == f"{ref.instance} {storage.keys(ref).host_public}\n"
    assert known.stat().st_mode & 0o777 == 0o600

    def missing(file: str, _argv: list[str]) -> None:
        raise FileNotFoundError(file)

    monkeypatch.setattr(os, "execvp", missing)
    mvm.fails(1, "shell.missing", "instance", "ssh", name)


def test_certificates_are_made_and_looked_at(tmp_path: Path) -> None:
    def run(*words: str) -> tuple[int, list[dict[str, object]]]:
        result = CliRunner().invoke(cli, ["--state-dir", str(tmp_path), "agent", "certs", *words, "-o", "json"])
        return result.exit_code, json.loads(result.stdout)

    code, rows = run("status")
    assert code == 1
    assert not any(row["ok"] for row in rows)
    code, rows = run("init")
    assert code == 0
    assert [row["name"] for row in rows] == ["ca", "node", "coordinator"]
    assert all(row["ok"] for row in rows)
    assert run("status") == (0, rows)


def test_serving_replaces_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MVM_STATE_DIR", "/elsewhere")
    ran: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _file, argv: ran.append(argv))
    assert CliRunner().invoke(cli, ["--state-dir", str(tmp_path), "agent", "serve"]).exit_code == 0
    assert ran == [[sys.executable, "-m", "mvm.agent"]]
    assert os.environ["MVM_STATE_DIR"] == str(tmp_path)


def test_the_actor_is_the_user_also_behind_sudo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUDO_USER", "mia")
    assert actor() == "mia"
    monkeypatch.delenv("SUDO_USER")
    assert actor()


def _imported(modules: str) -> set[str]:
    """The top packages that importing `modules` brings in."""
    code = f"import sys; old = set(sys.modules); import {modules}; print(*set(sys.modules) - old)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_help_waits_for_nothing_but_click() -> None:
    assert _imported("mvm.cli.main") - sys.stdlib_module_names == {"click", "mvm"}


def test_a_list_waits_for_no_heavy_library() -> None:
    heavy = {"redis", "hiredis", "celery", "pydantic", "aioquic", "cryptography", "asyncio", "yaml", "structlog"}
    assert not heavy & _imported("mvm.cli.instance, mvm.wiring")
