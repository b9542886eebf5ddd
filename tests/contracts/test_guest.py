"""ports/guest.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from mvm import guest
from mvm.errors import Unreachable
from mvm.ports.guest import ExecResult, GuestChannel
from mvm.ports.vmm import BootSpec, VmmDriver
from tests.contracts.test_vmm import ONE, TWO, Side, open_side
from tests.support.microvm import ANSWER_S, BOOT_S, identity

KINDS = ["fake", pytest.param("qemu", marks=[pytest.mark.root, pytest.mark.guest])]


@dataclass
class Started:
    """A guest that has been started, and its channel."""

    vmm: VmmDriver
    guest: GuestChannel
    spec: BootSpec

    @classmethod
    def on(cls, side: Side) -> Started:
        spec = side.spec(1)
        side.vmm.boot(spec)
        return cls(side.vmm, side.guest, spec)

    def execute(self, command: str) -> ExecResult:
        return self.guest.execute(ONE, self.spec.directory, command, deadline_s=ANSWER_S)


@pytest.fixture(params=KINDS, scope="module")
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    """One guest for all tests that leave it running."""
    with ExitStack() as stack:
        yield Started.on(open_side(request.param, tmp_path_factory.mktemp("host"), stack))


@pytest.fixture(params=KINDS)
def own(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Started]:
    """A guest of the test's own."""
    with ExitStack() as stack:
        yield Started.on(open_side(request.param, tmp_path, stack))


def test_hello_may_be_repeated(shared: Started) -> None:
    first = shared.guest.hello(ONE, shared.spec.directory, deadline_s=BOOT_S)
    second = shared.guest.hello(ONE, shared.spec.directory, deadline_s=ANSWER_S)
    assert first.version == second.version == guest.PROTOCOL_VERSION
    assert first.kernel == second.kernel
    assert first.uptime_s <= second.uptime_s


def test_ping_tells_the_uptime(shared: Started) -> None:
    hello = shared.guest.hello(ONE, shared.spec.directory, deadline_s=BOOT_S)
    assert shared.guest.ping(ONE, shared.spec.directory, deadline_s=ANSWER_S) >= hello.uptime_s


def test_a_guest_becomes_what_configure_says_and_may_be_told_again(shared: Started) -> None:
    for name in ("i-00000001", "i-0000000a"):
        shared.guest.configure(ONE, shared.spec.directory, identity(name), deadline_s=BOOT_S)
        assert shared.execute("hostname").stdout == f"{name}\n".encode()
        assert shared.execute("cat /etc/hostname").stdout == f"{name}\n".encode()


def test_exec_keeps_streams_apart_and_tells_the_exit_code(shared: Started) -> None:
    assert shared.execute("echo out; echo err >&2; exit 3") == ExecResult(3, b"out\n", b"err\n")
    assert shared.execute("true") == ExecResult(0, b"", b"")
    assert shared.execute("false") == ExecResult(1, b"", b"")
    assert shared.execute("no-such-program").exit_code == 127


def test_a_guest_that_was_never_started_is_gone(shared: Started, tmp_path: Path) -> None:
    with pytest.raises(Unreachable) as caught:
        shared.guest.hello(TWO, tmp_path / "none", deadline_s=ANSWER_S)
    assert caught.value.code == "guest.gone"


def test_after_shutdown_the_vmm_ends(own: Started) -> None:
    own.guest.hello(ONE, own.spec.directory, deadline_s=BOOT_S)
    (process,) = own.vmm.processes()[ONE]
    own.guest.shutdown(ONE, own.spec.directory, deadline_s=ANSWER_S)
    assert own.vmm.wait_gone(process, deadline_s=ANSWER_S)
    assert "Power down" in own.vmm.console_tail(own.spec.directory, lines=3)


def test_a_guest_whose_vmm_was_killed_is_gone(own: Started) -> None:
    own.vmm.kill(ONE, None)
    calls = (
        lambda: own.guest.hello(ONE, own.spec.directory, deadline_s=ANSWER_S),
        lambda: own.guest.configure(ONE, own.spec.directory, identity(), deadline_s=ANSWER_S),
        lambda: own.guest.ping(ONE, own.spec.directory, deadline_s=ANSWER_S),
        lambda: own.execute("true"),
        lambda: own.guest.shutdown(ONE, own.spec.directory, deadline_s=ANSWER_S),
    )
    for call in calls:
        with pytest.raises(Unreachable) as caught:
            call()
        assert caught.value.code == "guest.gone"
