"""Bringing the stack up and down, with a real Redis as its only part."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import cast

import pytest

from mvm.domain.layout import STATE_VERSION
from mvm.domain.tenant import Quota, Tenant
from mvm.drivers import isolation, netns, redis_files, registry_upkeep, state_dir
from mvm.drivers.qemu import cage
from mvm.drivers.redis_link import RedisLink
from mvm.drivers.redis_registry import RedisRegistry
from mvm.drivers.registry_migrations import VERSION_KEY
from mvm.drivers.shell import LocalShell
from mvm.drivers.sqlite_store import SqliteStore
from mvm.drivers.stack import Stack, connection, programs, running_settings
from mvm.drivers.supervisor import Program
from mvm.errors import Failed, Forbidden, InvalidInput, NotAllowed, Unreachable
from mvm.settings import Settings, load_settings
from mvm.wiring import open_client, open_ports
from tests.support.fleets import network
from tests.support.local import free_port
from tests.support.make import ACME, START
from tests.support.redis_server import RedisServer
from tests.support.waiting import until

pytestmark = pytest.mark.redis


class Killed(BaseException):
    """What a process does not survive."""


@pytest.fixture
def root() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="mvm-t-"))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def settings(root: Path) -> Settings:
    return load_settings(
        state_dir=root / "s", node_id="n1", netns="host", driver="fake", flower_port=free_port(),
        metrics_port=free_port(),
    )  # fmt: skip


def quiet(_text: str) -> None:
    """No progress."""


def redis_only(settings: Settings) -> Stack:
    return Stack(settings, LocalShell(), [p for p in programs(settings) if p.name == "redis"])


@pytest.fixture
def stack(settings: Settings) -> Iterator[Stack]:
    stack = redis_only(settings)
    yield stack
    stack.down(quiet)


def test_up_status_down_and_again(stack: Stack, settings: Settings) -> None:
    layout = settings.layout
    assert [part.answers for part in stack.status()] == [False]
    for _ in range(2):
        said: list[str] = []
        stack.up(said.append)
        assert "redis answers" in said
        facts = json.loads(layout.connection.read_text())
        assert facts["redis_url"] == f"unix://{layout.redis_socket}"
        assert facts["netns"] is None
        [part] = stack.status()
        assert (part.name, part.state, part.answers) == ("redis", "running", True)
        assert running_settings(load_settings(state_dir=layout.root)) == settings
        stack.down(quiet)
        assert not layout.connection.exists()
        assert not layout.redis_socket.exists()
        stack.down(quiet)


@pytest.mark.parametrize("name", ["a%b", "a%(x)s", "100%%", "a b", "a'b", 'a"b', "a\\b", "%s"])
def test_a_state_directory_may_be_called_anything(root: Path, settings: Settings, name: str) -> None:
    stack = redis_only(settings.model_copy(update={"state_dir": root / name}))
    try:
        stack.up(quiet)
        assert (root / name / "logs" / "redis.log").exists()
    finally:
        stack.down(quiet)


def test_everything_is_private(stack: Stack, settings: Settings) -> None:
    stack.prepare()
    for path in (settings.layout.ssh_key, settings.layout.flower_password, settings.layout.certs / "node.key"):
        assert path.stat().st_mode & 0o777 == 0o600
    assert settings.layout.root.stat().st_mode & 0o777 == 0o700
    password, key = settings.layout.flower_password.read_text(), settings.layout.ssh_key.read_text()
    stack.prepare()
    assert (settings.layout.flower_password.read_text(), settings.layout.ssh_key.read_text()) == (password, key)
    LocalShell().run(["ssh-keygen", "-y", "-f", str(settings.layout.ssh_key)])
    argv = " ".join(word for program in programs(settings) for word in program.argv)
    assert password.strip() not in argv


def test_a_second_up_is_refused(stack: Stack, settings: Settings) -> None:
    stack.up(quiet)
    with pytest.raises(NotAllowed) as caught:
        redis_only(settings).up(quiet)
    assert caught.value.code == "stack.already_up"
    assert stack.status()[0].answers


def test_what_a_killed_up_has_started_is_started_anew(stack: Stack, settings: Settings) -> None:
    """It was killed before commands could use it, and no command found a way out."""
    stack.up(quiet)
    before = stack.status()[0].pid
    settings.layout.connection.unlink()
    said: list[str] = []
    redis_only(settings).up(said.append)
    assert any("was killed before it was done" in line for line in said)
    part = stack.status()[0]
    assert part.answers
    assert part.pid != before
    assert settings.layout.connection.exists()


def test_two_at_once_are_refused(stack: Stack, settings: Settings) -> None:
    state_dir.prepare(settings.layout)
    with state_dir.held(settings.layout), pytest.raises(NotAllowed) as caught:
        stack.up(quiet)
    assert caught.value.code == "stack.busy"


def test_a_part_that_fails_is_named_with_its_words_and_all_is_taken_down(settings: Settings) -> None:
    redis = next(p for p in programs(settings) if p.name == "redis")
    bad = Program("agent", ["sh", "-c", "echo no such luck; exit 3"], 20)
    stack = Stack(settings, LocalShell(), [redis, bad])
    with pytest.raises(Failed) as caught:
        stack.up(quiet)
    assert caught.value.code == "stack.part_failed"
    assert caught.value.fields["part"] == "agent"
    assert "no such luck" in caught.value.message
    assert not settings.layout.connection.exists()
    assert {part.state for part in stack.status()} == {"stopped"}


def test_a_taken_port_names_the_flag(stack: Stack, settings: Settings) -> None:
    with socket.create_server(("127.0.0.1", settings.flower_port)), pytest.raises(NotAllowed) as caught:
        stack.up(quiet)
    assert caught.value.code == "stack.port_taken"
    assert "--flower-port" in caught.value.hint


def test_another_version_is_refused(stack: Stack, settings: Settings) -> None:
    settings.state_dir.mkdir()
    settings.layout.version.write_text("99\n")
    for act in (stack.up, stack.down):
        with pytest.raises(NotAllowed) as caught:
            act(quiet)
        assert caught.value.code == "state.version"
    settings.layout.version.write_text("1\n")


def test_a_directory_of_something_else_is_left_alone(stack: Stack, settings: Settings) -> None:
    settings.state_dir.mkdir(mode=0o755)
    (settings.state_dir / "thesis.txt").touch()
    with pytest.raises(NotAllowed) as caught:
        stack.up(quiet)
    assert caught.value.code == "state.foreign"
    assert settings.state_dir.stat().st_mode & 0o777 == 0o755
    (settings.state_dir / "thesis.txt").unlink()


def test_without_root_only_the_fake_driver_in_the_own_namespace(
    root: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for driver, name in (("qemu", "host"), ("qemu", ""), ("fake", "")):
        with pytest.raises(Forbidden) as caught:
            redis_only(load_settings(state_dir=root / "s", netns=name, driver=driver)).up(quiet)
        assert caught.value.code == "permission.root"


def test_a_path_too_long_for_sockets(root: Path) -> None:
    with pytest.raises(InvalidInput):
        redis_only(load_settings(state_dir=root / ("x" * 80)))


def test_an_external_redis_that_is_down_is_known_at_once(root: Path) -> None:
    settings = load_settings(
        state_dir=root / "s", netns="host", driver="fake", redis_url=f"unix://{root}/none.sock",
        flower_port=free_port(), metrics_port=free_port(),
    )  # fmt: skip
    with pytest.raises(Unreachable) as caught:
        Stack(settings, LocalShell(), []).up(quiet)
    assert caught.value.code == "registry.unreachable"


@pytest.mark.root
def test_an_external_redis_is_asked_from_the_namespace_made_for_the_stack(settings: Settings) -> None:
    redis = RedisServer()
    settings = load_settings(**{**settings.model_dump(), "netns": "", "redis_url": redis.url})
    stack = Stack(settings, LocalShell(), [])
    try:
        stack.up(quiet)
        assert [(part.name, part.state, part.answers) for part in stack.status()] == [("redis", "external", True)]
        stack.down(quiet)
        redis.kill()
        with pytest.raises(Unreachable):
            stack.up(quiet)
        assert settings.namespace is not None
        assert not netns.exists(settings.namespace), "a failed start leaves nothing"
    finally:
        redis.close()
        stack.down(quiet)


@pytest.mark.root
def test_a_namespace_of_somebody_else_is_used_and_kept(settings: Settings) -> None:
    shell, name = LocalShell(), f"mvm-t-{os.getpid()}"
    netns.create(shell, name)
    try:
        stack = redis_only(load_settings(**{**settings.model_dump(), "netns": name}))
        stack.up(quiet)
        stack.down(quiet)
        assert netns.exists(name)
    finally:
        netns.delete(shell, name)


# --- the registry's number
NUMBER = b"%d" % STATE_VERSION


def external(settings: Settings, redis: RedisServer) -> Settings:
    return load_settings(**{**settings.model_dump(), "redis_url": redis.url})


def number(url: str) -> bytes | None:
    with closing(RedisLink(url, code="x")) as link:
        return cast("bytes | None", link.command("GET", VERSION_KEY))


def set_number(url: str, value: int) -> None:
    with closing(RedisLink(url, code="x")) as link:
        link.command("SET", VERSION_KEY, value)


def test_a_new_registry_is_numbered(stack: Stack, settings: Settings, redis_server: RedisServer) -> None:
    stack.up(quiet)
    assert number(settings.redis) == NUMBER
    others = Stack(external(settings, redis_server), LocalShell(), [])
    stack.down(quiet)
    others.up(quiet)
    others.down(quiet)
    assert number(redis_server.url) == NUMBER


def test_a_new_registry_of_a_stack_that_others_start_is_numbered(settings: Settings, redis_server: RedisServer) -> None:
    redis_only(settings).prepare_alone(quiet)
    with redis_files.served(settings.layout.redis, LocalShell()) as link:
        assert link.command("GET", VERSION_KEY) == NUMBER
    Stack(external(settings, redis_server), LocalShell(), []).prepare_alone(quiet)
    assert number(redis_server.url) == NUMBER


@pytest.mark.usefixtures("stack")  # which is taken down whatever comes
def test_a_registry_that_a_newer_mvm_has_numbered_is_refused(settings: Settings, redis_server: RedisServer) -> None:
    shared = external(settings, redis_server)
    stack = Stack(shared, LocalShell(), [])
    stack.up(quiet)
    set_number(redis_server.url, STATE_VERSION + 1)
    for use in (open_ports(shared).registry, open_client(connection(shared), shared.layout).registry):
        with pytest.raises(NotAllowed) as caught:
            use.nodes()
        assert caught.value.code == "state.version"
    stack.down(quiet)
    for act in (stack.up, stack.prepare_alone):
        with pytest.raises(NotAllowed) as caught:
            act(quiet)
        assert caught.value.code == "state.version"
    assert [part.answers for part in stack.status()] == [False]
    assert number(redis_server.url) == b"%d" % (STATE_VERSION + 1)


# --- the private Redis's files
def cut_off(settings: Settings) -> bytes:
    """The private Redis has data, of which a power cut took the end; what is left of it."""
    with redis_files.served(settings.layout.redis, LocalShell()) as link:
        link.pipeline([("SET", f"key{number}", "x" * 20) for number in range(50)])
    grown = next(settings.layout.redis.rglob("*.incr.aof"))
    os.truncate(grown, grown.stat().st_size - 5)
    return grown.read_bytes()


def test_it_comes_up_though_a_power_cut_left_zeros(stack: Stack, settings: Settings) -> None:
    stack.prepare()
    cut_off(settings)
    with next(settings.layout.redis.rglob("*.incr.aof")).open("ab") as grown:
        grown.write(bytes(4096))
    said: list[str] = []
    stack.up(said.append)
    assert [part.answers for part in stack.status()] == [True]
    assert any("redis.damaged-" in text for text in said), "what was lost is told, with where all of it is kept"


@pytest.mark.parametrize("step", ["upgrade", "rebuild"])
def test_what_was_lost_is_put_back_though_the_first_attempt_was_killed(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """The files are whole after the first attempt: nothing about them tells that the registry lacks something."""

    def die(*_: object) -> None:
        raise Killed

    stack = redis_only(settings)
    stack.prepare_alone(quiet)
    acme = Tenant(ACME, network(1), Quota(), START)
    with closing(SqliteStore(settings.layout.database)) as store:
        store.put_tenant(acme)
    cut_off(settings)
    with monkeypatch.context() as patch:
        patch.setattr(registry_upkeep, step, die)
        with pytest.raises(Killed):
            stack.prepare_alone(quiet)
    said: list[str] = []
    stack.prepare_alone(said.append)
    with redis_files.served(settings.layout.redis, LocalShell()) as link:
        assert RedisRegistry(link).tenant(ACME) == acme
    assert any("is put back" in text for text in said)
    said.clear()
    stack.prepare_alone(said.append)
    assert not said, "once is enough"


def test_files_that_a_redis_still_loads_are_left_alone(settings: Settings) -> None:
    """As in Compose, where others start it."""
    stack = redis_only(settings)
    stack.prepare_alone(quiet)
    before = cut_off(settings)
    slow = [*redis_files.server(settings.layout.redis, settings.layout.redis_socket), "--key-load-delay", "60000000"]
    redis = subprocess.Popen(slow, stdout=subprocess.DEVNULL)
    try:
        until(settings.layout.redis_socket.exists, 60, "it listens")
        said: list[str] = []
        stack.prepare_alone(said.append)
        assert not said
        assert next(settings.layout.redis.rglob("*.incr.aof")).read_bytes() == before
        with pytest.raises(NotAllowed) as caught:
            stack.up(quiet)
        assert caught.value.code == "stack.already_up"
    finally:
        redis.kill()
        redis.wait()


# --- isolation
def test_up_is_loud_about_what_the_host_lacks_or_refuses(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = {"pids": "no cgroup hierarchy has it", "cage": "unshare its namespaces: Operation not permitted"}
    monkeypatch.setattr(isolation, "lacking", lambda *_: lacking)
    real = settings.model_copy(update={"driver": "qemu"})
    said: list[str] = []
    redis_only(real)._check_isolation(said.append)
    assert len(said) == 2
    assert all(line.startswith("WARNING: ") for line in said)
    assert "no pids limit: no cgroup hierarchy has it" in said[0]
    strict = redis_only(real.model_copy(update={"require_isolation": True}))
    with pytest.raises(Failed, match="pids") as caught:
        strict.up(said.append)
    assert caught.value.code == "cage.incomplete"
    assert [part.answers for part in strict.status()] == [False]
    redis_only(settings)._check_isolation(said.append)  # a fake host lacks nothing
    assert len(said) == 2


@pytest.mark.root
def test_this_host_can_cage_a_vmm_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isolation.trial(LocalShell()) is None
    monkeypatch.setattr(cage, "_LIBRARIES", ())
    assert isolation.trial(LocalShell()) is not None
