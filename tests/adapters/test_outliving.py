"""What a stack that goes down leaves alone, since an instance runs on; and who its state directory is."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest

from mvm.domain.addressing import TenantNetwork, parse_subnet
from mvm.domain.identity import id_of_path
from mvm.domain.ids import NodeId
from mvm.domain.instance import Instance
from mvm.domain.layout import StateLayout
from mvm.domain.lifecycle import Status
from mvm.domain.pool import ImageSource, InstanceResources, WorkerPool
from mvm.domain.tenant import Quota, Tenant
from mvm.drivers import claims, identity, netns, processes, sqlite_store, state_dir, store_glance, tap
from mvm.drivers.files import closing_fd
from mvm.drivers.linux_network import LinuxNetwork
from mvm.drivers.qemu.argv import BINARY
from mvm.drivers.shell import LocalShell
from mvm.drivers.sqlite_store import SqliteStore
from mvm.drivers.stack import Stack, programs, running_settings
from mvm.errors import Failed, MvmError, NotAllowed
from mvm.settings import Settings, load_settings, remembered
from tests.support import old_state
from tests.support.local import free_port, running
from tests.support.make import ACME, START, WEB, instance_ref
from tests.support.namespace import unique_name
from tests.support.waiting import until

pytestmark = [pytest.mark.root, pytest.mark.redis]

NETWORK = TenantNetwork(1, parse_subnet("10.240.1.0/24"))


@pytest.fixture
def root() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="mvm-t-"))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def settings(root: Path) -> Settings:
    return load_settings(state_dir=root / "s", flower_port=free_port(), metrics_port=free_port())


def quiet(_text: str) -> None:
    """No progress."""


def redis_only(settings: Settings, **changes: str) -> Stack:
    changed = load_settings(**{**settings.model_dump(), **changes}) if changes else settings
    return Stack(changed, LocalShell(), [p for p in programs(changed) if p.name == "redis"])


# --- signs of an instance
@contextmanager
def pretended(mark: str) -> Iterator[int]:
    """A process that is named as a VMM is, in a network namespace of its own as every one in its cage."""
    words = [BINARY, "-c", "read x", "-name", f"guest={mark}:{instance_ref(1)}"]
    with running(["unshare", "--net", "bash", "-c", 'exec -a "$0" sh "$@"', *words], stdin=subprocess.PIPE) as vmm:
        until(lambda: processes.arguments(vmm.pid) == words, 10, "it runs")
        yield vmm.pid


@contextmanager
def marked(stack: Stack) -> Iterator[None]:
    """The store knows nothing of it."""
    with pretended(identity.mark(stack.settings.layout)):
        yield


@contextmanager
def recorded(stack: Stack) -> Iterator[None]:
    """Its command line says nothing, but the store does."""
    database, ref = stack.settings.layout.database, instance_ref(1)
    with running(["unshare", "--net", "sleep", "300"]) as vmm, closing(SqliteStore(database)) as store:
        process = processes.identify(vmm.pid)
        made = Instance(ref, stack.settings.node, 3, Status.WARM, datetime.now(UTC), process=process)
        store.insert_instance(made)
        yield
        store.delete_instance(ref)


@contextmanager
def held_tap(stack: Stack) -> Iterator[None]:
    """All that is known is that somebody has a guest's TAP open."""
    assert stack.settings.namespace is not None
    with netns.entered(netns.path_of(stack.settings.namespace)):
        LinuxNetwork(LocalShell()).ensure_tap(NETWORK, 3)
        card = tap.attach(NETWORK.tap(3))
    with closing_fd(card):
        yield


Sign = Callable[[Stack], AbstractContextManager[None]]


@pytest.mark.parametrize("sign", [marked, recorded, held_tap])
def test_the_namespace_stays_while_an_instance_runs(settings: Settings, sign: Sign) -> None:
    name = settings.namespace
    assert name is not None
    stack = redis_only(settings)
    stack.up(quiet)
    try:
        inside = netns.path_of(name).stat().st_ino
        assert Path(f"/proc/{stack.status()[0].pid}/ns/net").stat().st_ino == inside
        with sign(stack):
            for _ in range(2):
                said: list[str] = []
                stack.down(said.append)
                assert netns.path_of(name).stat().st_ino == inside
                assert f"instances run on; network namespace {name} stays" in said
                assert stack.remaining()
                stack.up(quiet)
                assert netns.path_of(name).stat().st_ino == inside
    finally:
        stack.down(quiet)
    assert not netns.exists(name)
    assert not stack.remaining()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"netns": "mvm-t-other"}, "stack.other_netns"),
        ({"netns": "host"}, "stack.other_netns"),
        ({"driver": "fake"}, "stack.other_driver"),
    ],
)
def test_what_runs_on_stays_within_reach(settings: Settings, change: dict[str, str], code: str) -> None:
    stack = redis_only(settings)
    stack.up(quiet)
    try:
        with marked(stack):
            stack.down(quiet)
            with pytest.raises(NotAllowed) as caught:
                redis_only(settings, **change).up(quiet)
            assert caught.value.code == code
            assert settings.namespace is not None
            assert netns.exists(settings.namespace)
        other = redis_only(settings, **change)
        other.up(quiet)  # now that nothing runs on
        other.down(quiet)
        assert claims.holder(None) is None, "a stack that has gone claims nothing"
    finally:
        stack.down(quiet)


def test_the_namespace_goes_though_somebody_looks_into_it(settings: Settings) -> None:
    name = settings.namespace
    assert name is not None
    stack = redis_only(settings)
    stack.up(quiet)
    with running(["nsenter", f"--net={netns.path_of(name)}", "sleep", "300"]):
        stack.down(quiet)
        assert not netns.exists(name)


# --- who the directory is
def test_it_is_the_same_by_every_path(settings: Settings, root: Path) -> None:
    stack = redis_only(settings)
    stack.prepare()
    known = identity.mark(settings.layout)
    (root / "link").symlink_to(root / "s")
    (root / "way").mkdir()
    (root / "bound").mkdir()
    LocalShell().run(["mount", "--bind", str(root / "s"), str(root / "bound")])
    try:
        for spelling in (root / "link", f"{root}//s", root / "way/../s", root / "bound", root / "way/../link/"):
            same = load_settings(state_dir=spelling)
            assert identity.mark(same.layout) == known, spelling
            assert same.namespace == settings.namespace, spelling
            assert identity.settle(same).mark == known, spelling
    finally:
        LocalShell().run(["umount", str(root / "bound")])


@pytest.mark.parametrize("started_by", ["s", "bound"])
def test_a_stack_is_taken_down_by_another_path(settings: Settings, root: Path, started_by: str) -> None:
    redis_only(settings).prepare()
    (root / "bound").mkdir()
    LocalShell().run(["mount", "--bind", str(root / "s"), str(root / "bound")])
    try:
        first, second = (root / started_by, root / ({"s", "bound"} - {started_by}).pop())
        stack = redis_only(settings, state_dir=str(first))
        stack.up(quiet)
        pids = [part.pid for part in stack.status()]
        redis_only(settings, state_dir=str(second)).down(quiet)
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 30, "it is gone, and reaped")
        stack.up(quiet)
        stack.down(quiet)
    finally:
        LocalShell().run(["umount", str(root / "bound")])


def test_two_directories_that_lay_at_one_path_are_two(settings: Settings, root: Path) -> None:
    redis_only(settings).prepare()
    first = identity.mark(settings.layout)
    (root / "s").rename(root / "moved")
    assert identity.mark(StateLayout(root / "moved")) == first
    redis_only(settings).prepare()
    assert identity.mark(settings.layout) != first


def test_a_copy_is_another(settings: Settings, root: Path) -> None:
    redis_only(settings).prepare()
    with pretended(identity.mark(settings.layout)) as pid:
        LocalShell().run(["cp", "-a", str(root / "s"), str(root / "copy")])
        copy = load_settings(state_dir=root / "copy")
        for _ in range(2):
            assert identity.mark(copy.layout) != identity.mark(settings.layout)
            assert copy.namespace != settings.namespace
            assert not redis_only(copy).remaining(), pid
            redis_only(copy).prepare()
        assert redis_only(settings).remaining()


@pytest.mark.parametrize("spelled", ["s", "link", "way/../s"])
def test_what_a_former_version_started_is_found(settings: Settings, root: Path, spelled: str) -> None:
    """It marked its VMMs, and named its namespace, by the path of the state directory as it was spelled."""
    (root / "link").symlink_to(root / "s")
    (root / "way").mkdir()
    layout = settings.layout
    state_dir.prepare(layout)
    former = settings.model_dump(mode="json") | {"state_dir": f"{root}/{spelled}", "netns": "", "node_id": ""}
    layout.settings.write_text(json.dumps(former))
    namespace = StateLayout(Path(former["state_dir"])).default_netns
    netns.create(LocalShell(), namespace)
    (layout.run / "netns").write_text(namespace)
    with pretended(f"mvm-{id_of_path(Path(former['state_dir']))}"):
        assert Stack(running_settings(settings), LocalShell(), []).remaining(), "also for a down by this version"
        stack = redis_only(load_settings(state_dir=root / "s"))
        stack.up(quiet)
        try:
            assert stack.settings.namespace == namespace
            assert stack.remaining()
        finally:
            stack.down(quiet)
        assert netns.exists(namespace)
    stack.down(quiet)
    assert not netns.exists(namespace)


def test_a_damaged_identity_is_no_reason_to_guess(settings: Settings) -> None:
    redis_only(settings).prepare()
    settings.layout.identity.write_text("{")
    with pytest.raises(Failed) as caught:
        load_settings(state_dir=settings.state_dir)
    assert caught.value.code == "state.damaged"


# --- whose the directory is
def test_a_node_keeps_its_name(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    redis_only(settings).prepare()
    named = settings.node
    monkeypatch.setattr("socket.gethostname", lambda: "quite-another.example")
    again = load_settings(state_dir=settings.state_dir)
    assert again.node == named
    redis_only(again).prepare()
    certificate = (settings.layout.certs / "node.pem").read_bytes()
    with pytest.raises(NotAllowed) as caught:
        redis_only(load_settings(state_dir=settings.state_dir, node_id="renamed")).prepare()
    assert caught.value.code == "node.renamed"
    assert (settings.layout.certs / "node.pem").read_bytes() == certificate


def test_a_former_versions_node_is_known_by_its_pools(settings: Settings) -> None:
    state_dir.prepare(settings.layout)
    node = NodeId("old-name")
    with closing(SqliteStore(settings.layout.database)) as store:
        store.put_pool(WorkerPool(WEB, ImageSource("builtin:", "minimal"), InstanceResources(), node, START))
    with pytest.raises(NotAllowed) as caught:
        redis_only(settings, node_id="renamed").prepare()
    assert caught.value.code == "node.renamed"
    assert "old-name" in caught.value.hint
    stack = Stack(settings, LocalShell())
    stack.prepare()  # whatever the host's name is
    assert stack.settings.node == node
    assert any(f"main@{node}" in program.argv for program in stack._programs)
    known = remembered(settings.layout)
    assert known is not None
    assert known.node_id == node


# --- a store that cannot be read is no empty one
@contextmanager
def locked(database: Path) -> Iterator[None]:
    """Another program has it for itself."""
    with closing(sqlite3.connect(database, isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        other.execute("INSERT OR REPLACE INTO net_ids VALUES (4095)")
        yield


@contextmanager
def damaged(database: Path) -> Iterator[None]:
    """A disk returns something else."""
    former = {path: path.read_bytes() for path in database.parent.glob(f"{database.name}*")}
    for path in former:
        path.write_bytes(b"no database at all" * 1000)
    yield
    for path, content in former.items():
        path.write_bytes(content)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_glance, "_BUSY_S", 0.1)


Trouble = Callable[[Path], AbstractContextManager[None]]


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(("trouble", "code"), [(locked, "store.busy"), (damaged, "store.damaged")])
def test_a_former_versions_node_is_not_guessed_while_its_store_cannot_be_read(
    root: Path, monkeypatch: pytest.MonkeyPatch, trouble: Trouble, code: str
) -> None:
    """The wrong name would be written down for good, and its pools be stranded."""
    old_state.unpack(root / "s")
    monkeypatch.setattr("socket.gethostname", lambda: "quite-another.example")
    settings = load_settings(state_dir=root / "s", driver="fake", netns="host")
    with trouble(settings.layout.database), pytest.raises(MvmError) as caught:
        Stack(settings, LocalShell()).prepare()
    assert caught.value.code == code
    assert remembered(settings.layout) is None
    stack = Stack(settings, LocalShell())
    stack.prepare()
    assert store_glance.nodes(settings.layout.database) == {stack.settings.node}


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("trouble", [locked, damaged])
def test_what_instances_need_stays_while_the_store_cannot_be_read(settings: Settings, trouble: Trouble) -> None:
    stack = redis_only(settings)
    stack.up(quiet)
    namespace = stack.settings.namespace
    assert namespace is not None
    SqliteStore(settings.layout.database).close()
    said: list[str] = []
    with trouble(settings.layout.database):
        stack.down(said.append)
        assert [part.answers for part in stack.status()] == [False], "the stack is down all the same"
        assert netns.exists(namespace)
        assert "cannot be told whether instances run on" in said[-1]
    stack.down(quiet)
    assert not netns.exists(namespace)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("trouble", [locked, damaged])
def test_a_stack_that_answers_stays_up_though_its_uplink_cannot_be_looked_at(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, trouble: Trouble
) -> None:
    monkeypatch.setattr(sqlite_store, "_BUSY_MS", 100)
    stack = redis_only(settings)
    stack.prepare()
    SqliteStore(settings.layout.database).close()
    said: list[str] = []
    with trouble(settings.layout.database):
        stack.up(said.append)
    assert [part.answers for part in stack.status()] == [True]
    assert "cannot be told whether pools that reach outside have their uplink" in said[-1]
    stack.down(quiet)


def test_damaged_settings_of_a_former_version_are_no_reason_to_guess(settings: Settings) -> None:
    """By the path in them its VMMs are marked."""
    state_dir.prepare(settings.layout)
    settings.layout.settings.write_text("")
    with pytest.raises(Failed) as caught:
        identity.mark(settings.layout)
    assert caught.value.code == "state.damaged"


def test_a_store_that_was_only_begun_is_an_empty_one(settings: Settings) -> None:
    state_dir.prepare(settings.layout)
    settings.layout.database.touch()
    assert not store_glance.instances(settings.layout.database)


# --- whose a network namespace is
@pytest.fixture
def shared() -> Iterator[str]:
    """A namespace that no stack has made."""
    name = unique_name()
    netns.create(LocalShell(), name)
    yield name
    netns.delete(LocalShell(), name)


def fresh(root: Path, name: str) -> Settings:
    return load_settings(state_dir=root, netns=name, flower_port=free_port(), metrics_port=free_port())


def refused(stack: Stack) -> NotAllowed:
    with pytest.raises(NotAllowed) as caught:
        stack.up(quiet)
    return caught.value


def test_a_namespace_is_one_state_directorys(root: Path, shared: str) -> None:
    """Also while its stack is down and its guests run on; then it is whoever's comes next."""
    first = redis_only(fresh(root / "one", shared))
    second = redis_only(fresh(root / "two", shared))
    first.up(quiet)
    try:
        error = refused(second)
        assert (error.code, error.exit_code) == ("stack.netns_claimed", 4)
        assert error.fields["state_dir"] == str(root / "one")
        with marked(first):
            first.down(quiet)
            assert refused(second).code == "stack.netns_claimed"
            first.up(quiet)
        first.down(quiet)
        second.up(quiet)
        assert refused(first).fields["state_dir"] == str(root / "two")
        second.down(quiet)
        with netns.entered(netns.path_of(shared)):  # and so for a stack without a namespace of its own
            host = fresh(root / "two", "host")
            redis_only(host).up(quiet)
            claim = claims.holder(shared)
            assert claim is not None
            assert claims.holder(None) == claim
            assert refused(first).code == "stack.netns_claimed"
            redis_only(host).down(quiet)
            assert claims.holder(None) is None
    finally:
        second.down(quiet)
        first.down(quiet)


def test_guests_of_an_older_mvm_that_claims_nothing_are_let_be(root: Path, shared: str) -> None:
    first = redis_only(fresh(root / "one", shared))
    first.prepare()
    with held_tap(first):
        error = refused(redis_only(fresh(root / "two", shared)))
        assert error.code == "stack.netns_claimed"
        assert NETWORK.tap(3) in error.message
        with marked(first):  # they are its own
            first.up(quiet)
            first.down(quiet)
            assert claims.holder(shared) is not None
    first.down(quiet)
    assert claims.holder(shared) is None


@pytest.mark.parametrize("claimed", [True, False], ids=["claimed", "of an older mvm"])
def test_a_copy_has_nothing_of_its_originals(settings: Settings, root: Path, claimed: bool) -> None:
    """With a guest that runs, is recorded, and has its TAP. The copy comes up and goes, and all of that stays."""
    stack = redis_only(settings)
    stack.up(quiet)
    name = stack.settings.namespace
    assert name is not None
    if not claimed:
        claims.release(name, identity.mark(settings.layout))
    try:
        with held_tap(stack), pretended(identity.mark(settings.layout)) as pid:
            with closing(SqliteStore(settings.layout.database)) as store:
                store.insert_instance(
                    Instance(
                        instance_ref(1), stack.settings.node, 3, Status.RUNNING, START, process=processes.identify(pid)
                    )
                )
            LocalShell().run(["cp", "-a", str(root / "s"), str(root / "copy")])
            redis_only(running_settings(load_settings(state_dir=root / "copy"))).down(quiet)
            assert netns.exists(name), "before it has ever come up, too"
            copy = redis_only(load_settings(state_dir=root / "copy", flower_port=free_port(), metrics_port=free_port()))
            copy.up(quiet)
            assert copy.settings.namespace != name
            assert not copy.remaining()
            assert refused(redis_only(copy.settings, netns=name)).code in {"stack.netns_claimed", "stack.already_up"}
            copy.down(quiet)
            assert not netns.exists(str(copy.settings.namespace))
            assert refused(redis_only(copy.settings, netns=name)).code == "stack.netns_claimed"
            assert netns.exists(name)
            assert stack.status()[0].answers
            assert stack.remaining()
            with closing(SqliteStore(settings.layout.database)) as store:
                store.delete_instance(instance_ref(1))
    finally:
        stack.down(quiet)
    assert not netns.exists(name)


def test_who_has_lost_the_network_is_told_by_up(settings: Settings) -> None:
    stack = redis_only(settings)
    stack.up(quiet)
    name = str(stack.settings.namespace)
    with closing(SqliteStore(settings.layout.database)) as store, pretended(identity.mark(settings.layout)) as pid:
        store.put_tenant(Tenant(ACME, NETWORK, Quota(), START))
        made = Instance(instance_ref(1), stack.settings.node, 3, Status.RUNNING, START, process=processes.identify(pid))
        store.insert_instance(made)
        with held_tap(stack):
            stack.down(quiet)
            said: list[str] = []
            stack.up(said.append)
            assert not [line for line in said if "lost its network" in line]
        stack.down(quiet)
        netns.delete(LocalShell(), name)
        stack.up(said.append)
        [told] = [line for line in said if "lost its network" in line]
        assert told.endswith(f"mvm instance stop {instance_ref(1)}; then: mvm instance start {instance_ref(1)}")
        store.delete_instance(instance_ref(1))
    stack.down(quiet)
