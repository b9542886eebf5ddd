from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from mvm.drivers import netns
from mvm.drivers.shell import LocalShell
from mvm.errors import Failed, InvalidInput, NotFound
from tests.support.namespace import unique_name

FORWARD = Path("/proc/sys/net/ipv4/ip_forward")
shell = LocalShell()


def here() -> str:
    return str(Path("/proc/thread-self/ns/net").readlink())


@pytest.fixture
def name() -> Iterator[str]:
    chosen = unique_name()
    yield chosen
    netns.delete(shell, chosen)


@pytest.mark.parametrize("bad", ["", ".", "..", "../x", "a/b", "-n", "a b", "x" * 65, "a\n"])
def test_a_name_that_is_no_file_name_is_refused(bad: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        netns.exists(bad)
    assert refused.value.code == "netns.invalid_name"


@pytest.mark.root
def test_a_namespace_is_made_and_deleted_however_often(name: str) -> None:
    assert not netns.exists(name)
    assert [netns.create(shell, name), netns.create(shell, name)] == [True, False]
    assert netns.exists(name)
    for _ in range(2):
        netns.delete(shell, name)
        assert not netns.exists(name)
    assert not netns.path_of(name).exists()


@pytest.mark.root
def test_in_one_we_made_loopback_is_up_and_nothing_is_forwarded(name: str) -> None:
    netns.create(shell, name)
    with netns.entered(netns.path_of(name)):
        assert FORWARD.read_text() == "0\n"
        assert "state UNKNOWN" in shell.run(["ip", "link", "show", "up", "dev", "lo"]).stdout


@pytest.mark.root
def test_anothers_keeps_its_forwarding(name: str) -> None:
    shell.run(["ip", "netns", "add", name])
    with netns.entered(netns.path_of(name)):
        FORWARD.write_text("1")
    assert not netns.create(shell, name)
    with netns.entered(netns.path_of(name)):
        assert FORWARD.read_text() == "1\n"


@pytest.mark.root
def test_what_a_crash_left_is_no_namespace_and_is_replaced(name: str) -> None:
    netns.path_of(name).parent.mkdir(exist_ok=True)
    netns.path_of(name).touch()
    assert not netns.exists(name)
    assert netns.create(shell, name)
    assert netns.exists(name)


@pytest.mark.root
def test_a_thread_visits_and_comes_back(name: str) -> None:
    netns.create(shell, name)
    home = here()
    with netns.entered(netns.path_of(name)):
        inside = here()
        assert inside != home
        assert shell.run(["readlink", "/proc/self/ns/net"]).stdout.strip() == inside, "programs started there are there"
    assert here() == home
    with pytest.raises(ZeroDivisionError), netns.entered(netns.path_of(name)):
        _ = 1 / 0
    assert here() == home


@pytest.mark.root
def test_other_threads_stay_where_they_are(name: str) -> None:
    netns.create(shell, name)
    home, both_there = here(), Barrier(2)

    def visit() -> str:
        with netns.entered(netns.path_of(name)):
            both_there.wait(30)
            return here()

    def stay() -> str:
        both_there.wait(30)
        return here()

    with ThreadPoolExecutor(2) as pool:
        visitor, resident = pool.submit(visit), pool.submit(stay)
        assert visitor.result() != home
        assert resident.result() == home


@pytest.mark.root
def test_what_is_no_namespace_is_not_entered(tmp_path: Path) -> None:
    home = here()
    with pytest.raises(NotFound) as missing, netns.entered(tmp_path / "x"):
        pytest.fail("entered nothing")
    assert missing.value.code == "netns.not_found"
    (tmp_path / "x").touch()
    with pytest.raises(Failed) as wrong, netns.entered(tmp_path / "x"):
        pytest.fail("entered a file")
    assert wrong.value.code == "netns.failed"
    assert here() == home
