"""What goes wrong on the command line: code, message, hint and exit code, and never a traceback."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from mvm.cli import following, params
from mvm.cli.errors import report
from mvm.cli.main import cli
from mvm.domain.ids import JobId
from mvm.domain.job import Job, JobVerb
from mvm.drivers.memory_registry import MemoryRegistry
from mvm.errors import (
    Cancelled,
    Failed,
    Forbidden,
    InvalidInput,
    MvmError,
    NotAllowed,
    NotFound,
    QuotaExceeded,
    TimedOut,
    Unreachable,
)
from tests.services.conftest import Node
from tests.support.command_line import ADDRESS, DEAD, CommandLine

REF = "acme/web/i-7f2c91ab"
JOB_ID = "j-0193583f6c2a-9f3b7c21d4"


@pytest.mark.parametrize(
    ("exit_code", "code", "line"),
    [
        (2, "tenant.invalid_id", "tenant info Acme"),
        (2, "tenant.invalid_id", "tenant create a--b"),
        (2, "tenant.invalid_net_id", "tenant create acme --net-id 4096"),
        (2, "tenant.invalid_subnet", "tenant create acme --subnet 192.168.0.0/24"),
        (2, "tenant.invalid_quota", "tenant create acme --max-vcpus -1"),
        (2, "tenant.nothing_to_update", "tenant update acme"),
        (2, "pool.invalid_ref", "pool info acme"),
        (2, "pool.unsupported_flake", "pool create acme/web --flake github:x --profile minimal"),
        (2, "pool.unknown_profile", "pool create acme/web --flake builtin: --profile huge"),
        (2, "pool.invalid_resources", "pool create acme/web --flake builtin: --profile minimal --cpus 0"),
        (2, "pool.invalid_resources", "pool create acme/web --flake builtin: --profile minimal --mem 1"),
        (2, "pool.nothing_to_scale", "pool scale acme/web"),
        (2, "pool.invalid_count", "pool scale acme/web --running -1"),
        (2, "instance.invalid_ref", "instance info acme/web"),
        (2, "instance.invalid_id", "instance start acme/web/7f2c91ab"),
        (2, "instance.invalid_ref", "instance start acme/web"),
        (2, "instance.invalid_ref", f"instance start {REF} --all"),
        (2, "instance.invalid_count", "instance create acme/web --count 0"),
        (2, "job.invalid_parallel", f"instance start {REF} --parallel 0"),
        (2, "job.invalid_id", "job show 17"),
        (2, "job.invalid_limit", "job list --limit 0"),
        (2, "pool.invalid_id", "job list --subject acme/Web"),
        (2, "usage", "instance list --status tired"),
        (2, "usage", "instance list --tenant other --pool acme/web"),
        (2, "usage", "instance start"),
        (2, "usage", "tenant create acme --bogus"),
        (2, "usage", "nonsense"),
        (2, "usage", "tenant create acme --timeout nan"),
        (2, "confirm.required", "tenant destroy acme"),
        (2, "confirm.required", "pool destroy acme/web"),
        (2, "confirm.required", f"instance destroy {REF}"),
        (3, "tenant.not_found", "tenant info ghost"),
        (3, "tenant.not_found", "tenant update ghost --max-mem 1"),
        (3, "tenant.not_found", "tenant destroy ghost -y"),
        (3, "tenant.not_found", "pool create ghost/web --flake builtin: --profile minimal"),
        (3, "tenant.not_found", "pool build ghost/web"),
        (3, "tenant.not_found", "instance list --tenant ghost"),
        (3, "tenant.not_found", "instance start ghost --all"),
        (3, "pool.not_found", "pool info acme/ghost"),
        (3, "pool.not_found", "pool build acme/ghost"),
        (3, "pool.not_found", "instance create acme/ghost"),
        (3, "pool.not_found", "instance stop acme/ghost --all"),
        (3, "pool.not_found", "instance list --pool acme/ghost"),
        (3, "instance.not_found", f"instance info {REF}"),
        (3, "instance.not_found", f"instance start {REF}"),
        (3, "instance.not_found", f"instance ssh {REF}"),
        (3, "instance.not_found", f"instance logs {REF}"),
        (3, "instance.not_found", f"instance exec {REF} -- true"),
        (3, "job.not_found", f"job show {JOB_ID}"),
        (3, "job.not_found", f"job wait {JOB_ID}"),
        (3, "job.not_found", f"job cancel {JOB_ID}"),
        (3, "node.not_found", "pool create acme/new --flake builtin: --profile minimal --node n9"),
        (4, "tenant.exists", "tenant create acme"),
        (4, "pool.exists", "pool create acme/web --flake builtin: --profile minimal"),
        (4, "tenant.not_empty", "tenant destroy acme -y"),
        (6, "agent.unreachable", f"coordinator status --node {DEAD}"),
        (6, "agent.unreachable", f"coordinator list-instances --node {DEAD} --tenant acme"),
    ],
)
def test_each_has_its_code_and_exit_code(mvm: CommandLine, node: Node, exit_code: int, code: str, line: str) -> None:
    node.pool()
    mvm.fails(exit_code, code, *line.split())


def test_a_job_that_failed_ends_with_its_own_error(mvm: CommandLine, node: Node) -> None:
    node.pool()
    (ref,) = node.create()
    mvm.fails(4, "instance.invalid_transition", "instance", "stop", ref)
    result = mvm("instance", "stop", ref)
    assert result.stdout == ""
    assert f"error[instance.invalid_transition]: {ref} is ready and cannot stop\n" in result.stderr
    assert "hint: allowed now: start, destroy\n" in result.stderr
    node.ok(JobVerb.TENANT_UPDATE, "acme", quota={"max_running": 0})
    failed = mvm.fails(5, "quota.exceeded", "instance", "start", ref)
    job_id = json.loads(failed.stdout)["error"]["fields"]["job_id"]
    mvm.fails(5, "quota.exceeded", "job", "wait", job_id)
    assert "[quota.exceeded]" in mvm.ok("job", "show", job_id)


def test_a_bulk_job_exits_with_what_its_failures_have_in_common(mvm: CommandLine, node: Node) -> None:
    node.pool()
    one, two = node.create(2)
    node.ok(JobVerb.INSTANCE_START, one)
    again = mvm("instance", "start", one, two, "-o", "json")
    assert again.exit_code == 4
    assert [child["state"] for child in json.loads(again.stdout)["children"]] == ["failed", "succeeded"]
    assert json.loads(again.stdout)["error"]["code"] == "bulk.failed"
    mixed = mvm("instance", "start", one, "acme/web/i-00000000")
    assert mixed.exit_code == 1
    assert "error[instance.invalid_transition]" in mixed.stderr
    assert "error[instance.not_found]" in mixed.stderr
    assert "error[bulk.failed]: acme/web: 2 of 2 failed" in mixed.stderr


@pytest.mark.parametrize(
    ("kind", "exit_code"),
    [(MvmError, 1), (InvalidInput, 2), (NotFound, 3), (NotAllowed, 4), (QuotaExceeded, 5), (Unreachable, 6),
     (TimedOut, 6), (Forbidden, 7), (Failed, 1), (Cancelled, 1)],
)  # fmt: skip
def test_every_kind_has_its_exit_code(kind: type[MvmError], exit_code: int, capsys: pytest.CaptureFixture[str]) -> None:
    error = kind("x.y", "what", hint="do", field="f")
    assert report(error, output="json", debug=False) == exit_code
    shown = capsys.readouterr()
    assert shown.err == "error[x.y]: what\nhint: do\n"
    assert json.loads(shown.out) == {
        "error": {"code": "x.y", "message": "what", "hint": "do", "fields": {"field": "f"}}
    }


def test_a_bug_is_one_line_and_with_debug_a_traceback(mvm: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_args: object, **_kwargs: object) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(mvm.client.agents, "call", broken)
    mvm.fails(1, "internal", "node", "list")
    result = CliRunner().invoke(cli, ["node", "list", "--debug"], obj=mvm.fleet)
    assert result.exit_code == 1
    assert "Traceback (most recent call last)" in result.stderr
    assert "error[internal]: ZeroDivisionError: oh" in result.stderr


def test_without_a_stack_the_hint_is_how_to_start_it(tmp_path: Path) -> None:
    for line in ("tenant list", "job list", "instance create acme/web", "node list"):
        result = CliRunner().invoke(cli, ["--state-dir", str(tmp_path), "-o", "json", *line.split()])
        assert result.exit_code == 6, result.output
        assert json.loads(result.stdout)["error"]["code"] == "stack.down"
        assert "hint: start it: mvm up --detach" in result.stderr


def test_a_damaged_connection_file_is_a_stack_that_is_down(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for text in ("", "[]", "{}"):
        (tmp_path / "run" / "connection.json").write_text(text)
        result = CliRunner().invoke(cli, ["tenant", "list"], env={"MVM_STATE_DIR": str(tmp_path)})
        assert result.exit_code == 6
        assert "error[stack.down]" in result.stderr


def test_without_root_the_hint_is_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path, *_args: object) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", denied)
    result = CliRunner().invoke(cli, ["--state-dir", str(tmp_path), "tenant", "list"])
    assert result.exit_code == 7
    assert result.stderr.startswith("error[permission.denied]: ")
    assert "hint: run it as root" in result.stderr


def test_a_missing_node_is_named_and_the_others_are_listed(mvm: CommandLine, node: Node) -> None:
    node.pool()
    node.create(2)
    mvm.fleet.addresses = (ADDRESS, DEAD)
    for line, count in (("instance list", 2), ("pool list", 1), ("tenant list", 1), ("node list", 1)):
        result = mvm(*line.split(), "-o", "json")
        assert result.exit_code == 6
        assert len(json.loads(result.stdout)) == count
        assert "error[agent.unreachable]" in result.stderr
        assert DEAD in result.stderr
        assert "hint: is its stack up?" in result.stderr
    assert mvm("tenant", "info", "acme").exit_code == 0, "found without the missing one"
    mvm.fails(6, "agent.unreachable", "tenant", "info", "ghost")
    mvm.fails(6, "agent.unreachable", "instance", "destroy", "acme", "--all", "-y")
    mvm.fleet.addresses = (DEAD,)
    mvm.fails(6, "agent.unreachable", "instance", "list")


def test_a_dead_registry_and_a_dead_broker_are_told(
    mvm: CommandLine, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.queue.down = True
    mvm.fails(6, "broker.unreachable", "tenant", "create", "acme")

    def dead(*_args: object, **_kwargs: object) -> None:
        raise Unreachable("registry.unreachable", "Redis does not answer", hint="see: mvm status")

    monkeypatch.setattr(MemoryRegistry, "record", dead)
    mvm.fails(6, "registry.unreachable", "tenant", "create", "other")


def test_a_registry_that_restarts_is_waited_for(mvm: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = mvm.client.jobs
    healthy = jobs.follow

    def restarting(ids: Sequence[JobId], *, deadline_s: float | None = None) -> Iterator[Job]:
        monkeypatch.setattr(jobs, "follow", healthy)
        yield jobs.job(ids[0])
        raise Unreachable("registry.unreachable", "Redis does not answer", hint="see: mvm status")

    monkeypatch.setattr(jobs, "follow", restarting)
    result = mvm("tenant", "create", "acme")
    assert result.exit_code == 0, result.output
    assert "note: Redis does not answer; waiting for it" in result.stderr


def test_a_registry_that_stays_away_leaves_the_jobs_named(mvm: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_args: object, **_kwargs: object) -> None:
        raise Unreachable("registry.unreachable", "Redis does not answer", hint="see: mvm status")

    monkeypatch.setattr(mvm.client.jobs, "follow", gone)
    error = json.loads(mvm.fails(6, "registry.unreachable", "tenant", "create", "acme").stdout)["error"]
    assert f"mvm job wait {error['fields']['jobs'][0]}" in error["hint"]


def test_ctrl_c_stops_the_waiting_and_not_the_job(mvm: CommandLine, node: Node) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    mvm.client.jobs.work = interrupted
    result = mvm("tenant", "create", "acme")
    assert result.exit_code == 130
    job_id = mvm.json("job", "list")[0]["job_id"]
    assert f"stopped waiting; the job goes on: {job_id}\n" in result.stderr
    assert f"mvm job cancel {job_id}\n" in result.stderr
    assert mvm.json("job", "show", job_id)["state"] == "queued"


def test_a_wait_may_end_before_the_job_and_says_why_nothing_happens(
    mvm: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "_DIAGNOSE_S", 0.01)
    mvm.client.jobs.work = lambda: None
    failed = mvm.fails(6, "job.wait_timeout", "tenant", "create", "acme", "--timeout", "0.1")
    job_id = mvm.json("job", "list")[0]["job_id"]
    assert failed.stderr.count("note: no worker has taken it: node n1 has never been seen") == 1
    assert f"hint: mvm job wait {job_id}" in failed.stderr
    assert "note" in mvm.json("job", "show", job_id)
    mvm.fails(6, "job.wait_timeout", "job", "wait", job_id, "--timeout", "0.001")


def test_a_bulk_job_says_why_none_of_its_children_begins(
    mvm: CommandLine, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.pool()
    refs = node.create(2)
    monkeypatch.setattr(following, "_DIAGNOSE_S", 0.01)
    mvm.client.jobs.work = lambda: None
    failed = mvm.fails(6, "job.wait_timeout", "instance", "start", *refs, "--timeout", "0.1")
    assert failed.stderr.count("note: no worker has taken it") == 1


def test_destroying_asks_on_a_terminal(mvm: CommandLine, node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.ok(JobVerb.TENANT_CREATE, "acme")
    monkeypatch.setattr(params, "is_terminal", lambda: True)
    refused = mvm("tenant", "destroy", "acme", stdin="n\n")
    assert refused.exit_code == 1
    assert "Really destroy tenant acme?" in refused.stderr
    assert "error[aborted]: nothing was done" in refused.stderr
    assert mvm("tenant", "destroy", "acme", stdin="y\n").exit_code == 0
    assert mvm.json("tenant", "list") == []


def test_help_is_no_failure() -> None:
    assert CliRunner().invoke(cli, ["--help"]).exit_code == 0
    assert CliRunner().invoke(cli, ["instance", "start", "--help"]).exit_code == 0
    nothing = CliRunner().invoke(cli, [])
    assert nothing.exit_code == 2
    assert "Commands:" in nothing.stderr


def test_every_command_has_help_and_the_common_options() -> None:
    def walk(command: click.Command, path: list[str]) -> None:
        context = click.Context(command, info_name=path[-1])
        flags = {flag for parameter in command.params for flag in parameter.opts}
        assert "--output" in flags, path
        assert command.help, path
        if isinstance(command, click.Group):
            for name in command.list_commands(context):
                found = command.get_command(context, name)
                assert found is not None, name
                walk(found, [*path, name])

    walk(cli, ["mvm"])


def test_a_file_that_may_not_be_read_is_a_matter_of_root(mvm: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_args: object, **_kwargs: object) -> None:
        raise PermissionError(13, "Permission denied", "/some/key.pem")

    monkeypatch.setattr(mvm.client.agents, "call", denied)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    mvm.fails(7, "permission.denied", "node", "list")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    mvm.fails(1, "io.failed", "node", "list")


def test_another_users_state_directory_is_no_matter_of_usage(
    mvm: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it may be read shows when it is: then as ``permission.denied``."""
    monkeypatch.setattr(os, "access", lambda *_args, **_kwargs: False)
    mvm.ok("--state-dir", str(tmp_path), "node", "list")
