"""A guest says what it likes: nothing but typed errors comes of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest

from mvm import guest
from mvm.domain.ids import InstanceRef
from mvm.drivers.guest_channel import UnixGuestChannel
from mvm.drivers.instance_sockets import listen
from mvm.errors import Failed

REF = InstanceRef.parse("acme/web/i-00000001")
Ask = Callable[[UnixGuestChannel, Path], object]


@contextmanager
def answering(directory: Path, port: str, answer: str) -> Iterator[None]:
    """A guest that answers one request; ``ID`` stands for the request's."""
    with listen(directory, port) as listener:

        def serve() -> None:
            with listener.accept()[0] as client:
                token = client.recv(65536).split()[0].decode()
                with suppress(BrokenPipeError, ConnectionResetError):  # it had heard enough
                    client.sendall(answer.replace("ID", token).encode())

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join()


@pytest.mark.parametrize(
    "words",
    [
        "1 evil 1 1 1 1", "nan idle 1 1 1 1", "inf idle 1 1 1 1", "1 idle x 1 1 1",
        "1 idle 1 1 1 1 more", f"1 idle 1 1 {10**400} 1",
    ],
)  # fmt: skip
def test_a_status_that_is_none(tmp_path: Path, words: str) -> None:
    with answering(tmp_path, guest.CONTROL, f"\nID 0 {words}\n"), pytest.raises(Failed) as caught:
        UnixGuestChannel().status(REF, tmp_path, deadline_s=5)
    assert caught.value.code == "guest.refused"


@pytest.mark.parametrize("words", ["soon", "nan", "1e300"])
def test_a_time_that_is_none(tmp_path: Path, words: str) -> None:
    with answering(tmp_path, guest.CONTROL, f"\nID 0 {words}\n"), pytest.raises(Failed) as caught:
        UnixGuestChannel().wake(REF, tmp_path, now=datetime.now(UTC), entropy=bytes(64), secrets=False, deadline_s=5)
    assert caught.value.code == "guest.refused"


@pytest.mark.parametrize("words", ["x 0 - -", "0 0 aaaaa -"])
def test_a_commands_end_that_is_none(tmp_path: Path, words: str) -> None:
    with answering(tmp_path, guest.EXEC[0], f"\nID {words}\n"), pytest.raises(Failed) as caught:
        UnixGuestChannel().execute(REF, tmp_path, "true", deadline_s=5)
    assert caught.value.code == "guest.refused"


def test_a_reply_without_end_is_not_kept(tmp_path: Path) -> None:
    with answering(tmp_path, guest.CONTROL, "ID 0 " + "x" * (6 << 20)), pytest.raises(Failed) as caught:
        UnixGuestChannel().ping(REF, tmp_path, deadline_s=20)
    assert caught.value.code == "guest.refused"
