"""A guest says what it likes: nothing but typed errors comes of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest

from mvm import guest
from mvm.domain.commands import ExecResult
from mvm.domain.ids import InstanceRef
from mvm.drivers.guest_channel import UnixGuestChannel
from mvm.drivers.instance_sockets import listen
from mvm.errors import Failed, TimedOut, Unreachable

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


@contextmanager
def keeping_time(directory: Path, *answers: bytes) -> Iterator[list[bytes]]:
    """A guest's ``moment`` that gives one answer to each request; ``ID`` stands for the request's. Yields them."""
    requests: list[bytes] = []
    with listen(directory, guest.CLOCK) as listener:

        def serve() -> None:
            with listener.accept()[0] as client:
                for answer in answers:
                    requests.append(client.recv(65536))
                    with suppress(BrokenPipeError, ConnectionResetError):  # it had heard enough
                        client.sendall(answer.replace(b"ID", requests[-1][-guest.MOMENT_ID_BYTES :]))

        thread = threading.Thread(target=serve)
        thread.start()
        yield requests
        thread.join()


def wake(directory: Path, now: datetime) -> None:
    UnixGuestChannel().wake(REF, directory, now=now, entropy=bytes(range(64)), secrets=False, deadline_s=20)


def test_what_others_were_told_is_not_our_answer(tmp_path: Path) -> None:
    now = datetime(2026, 1, 2, 3, 4, 5, 678901, UTC)
    with keeping_time(tmp_path, *[b"\n\nanother10\nanother21\nID0\n"] * 4) as requests:  # a slow host asks again
        wake(tmp_path, now)
    entropy, seconds, nanoseconds, _ = guest.MOMENT.unpack(requests[0])
    assert entropy == bytes(range(32))
    assert now.timestamp() <= seconds + nanoseconds / 1e9 < now.timestamp() + 20


@pytest.mark.parametrize("answer", [b"ID3\n", b"IDx\n", b"ID\n"])
def test_a_moment_that_was_not_taken(tmp_path: Path, answer: bytes) -> None:
    with keeping_time(tmp_path, answer), pytest.raises(Failed) as caught:
        wake(tmp_path, datetime.now(UTC))
    assert (caught.value.code, caught.value.fields["missing"]) == ("guest.refused", ["moment"])


@pytest.mark.parametrize("answer", [b"ID", b"I", b""])
def test_half_an_answer_is_none(tmp_path: Path, answer: bytes) -> None:
    with keeping_time(tmp_path, answer), pytest.raises(Unreachable) as caught:
        wake(tmp_path, datetime.now(UTC))
    assert caught.value.code == "guest.gone"


def test_an_answer_without_end_is_not_kept(tmp_path: Path) -> None:
    with keeping_time(tmp_path, b"x" * (6 << 20)), pytest.raises(Failed) as caught:
        wake(tmp_path, datetime.now(UTC))
    assert caught.value.code == "guest.refused"


FRAMES = {
    "no kind": guest.FRAME.pack(b"IDIDIDID", b"?", 0),
    "without end": guest.FRAME.pack(b"IDIDIDID", guest.STDOUT, guest.FRAME_LIMIT),
    "nothing, again and again": guest.FRAME.pack(b"IDIDIDID", guest.STDOUT, 0),
    "half a status": guest.FRAME.pack(b"IDIDIDID", guest.ENDED, 2) + b"12",
    "another's frame in between": guest.FRAME.pack(b"IDIDIDID", guest.BEGUN, 0) + guest.FRAME.pack(b"x" * 8, b"o", 0),
    "no process": guest.FRAME.pack(b"IDIDIDID", guest.FAILED, 4) + guest.STATUS.pack(12),
    "noise": b"x" * (6 << 20),
}


@pytest.mark.parametrize("name", FRAMES)
def test_a_command_that_goes_as_none_can(tmp_path: Path, name: str) -> None:
    with saying(tmp_path, guest.EXEC[0], FRAMES[name]), pytest.raises(Failed) as caught:
        UnixGuestChannel().execute(REF, tmp_path, "true", deadline_s=20)
    assert caught.value.code == "guest.refused"


def test_what_another_command_left_is_not_this_ones(tmp_path: Path) -> None:
    own = guest.FRAME.pack(b"IDIDIDID", guest.BEGUN, 0) + guest.FRAME.pack(b"IDIDIDID", guest.STDOUT, 2) + b"hi"
    end = guest.FRAME.pack(b"IDIDIDID", guest.ENDED, 4) + guest.STATUS.pack(7 << 8)
    with saying(tmp_path, guest.EXEC[0], b"\n" + guest.FRAME.pack(b"another1", guest.STDERR, 99) + b"e" + own + end):
        assert UnixGuestChannel().execute(REF, tmp_path, "true", deadline_s=20) == ExecResult(7, b"hi", b"")


@pytest.mark.parametrize("words", ["x 0 - -", "0 0 aaaaa -", "0 0 -"])
def test_an_older_guests_end_that_is_none(tmp_path: Path, words: str) -> None:
    with (
        saying(tmp_path, guest.EXEC[0], b"\nIDIDIDID 127 unknown request\n", f"\nIDIDIDID {words}\n".encode()),
        pytest.raises(Failed) as caught,
    ):
        UnixGuestChannel().execute(REF, tmp_path, "true", deadline_s=5)
    assert caught.value.code == "guest.refused"


@contextmanager
def saying(directory: Path, port: str, *answers: bytes) -> Iterator[None]:
    """A guest that gives these answers, one a request; ``IDIDIDID`` stands for the request's id."""
    with listen(directory, port) as listener:

        def serve() -> None:
            with listener.accept()[0] as client:
                for answer in answers:
                    token = client.recv(65536).split()[0]
                    with suppress(BrokenPipeError, ConnectionResetError):  # it had heard enough
                        client.sendall(answer.replace(b"IDIDIDID", token))

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join()


def test_a_reply_without_end_is_not_kept(tmp_path: Path) -> None:
    with answering(tmp_path, guest.CONTROL, "ID 0 " + "x" * (6 << 20)), pytest.raises(Failed) as caught:
        UnixGuestChannel().ping(REF, tmp_path, deadline_s=20)
    assert caught.value.code == "guest.refused"


def test_a_command_begins_once(tmp_path: Path) -> None:
    begun = guest.FRAME.pack(b"IDIDIDID", guest.BEGUN, 0)
    with saying(tmp_path, guest.EXEC[0], begun * 2), pytest.raises(Failed) as caught:
        UnixGuestChannel().execute(REF, tmp_path, "true", deadline_s=20)
    assert caught.value.code == "guest.refused"


@pytest.mark.parametrize("words", ["0 0 - -" + " -" * 2_000_000, "\n" * 5000])
def test_an_older_guests_words_are_counted(tmp_path: Path, words: str) -> None:
    with (
        saying(tmp_path, guest.EXEC[0], b"\nIDIDIDID 127 unknown request\n", f"\nIDIDIDID {words}\n".encode()),
        pytest.raises(Failed) as caught,
    ):
        UnixGuestChannel().execute(REF, tmp_path, "true", deadline_s=20)
    assert caught.value.code == "guest.refused"


BEGUN = guest.FRAME.pack(b"IDIDIDID", guest.BEGUN, 0)
CRUMB, OTHER = (guest.FRAME.pack(b"IDIDIDID", kind, 1) + b"x" for kind in (guest.STDOUT, guest.STDERR))
FLOODS = {
    "it begins again and again": (BEGUN, BEGUN * 64),
    "output, a byte a frame": (BEGUN, CRUMB * 4096),
    "output, a byte a read": (BEGUN, CRUMB),
    "both streams in turn": (BEGUN, (CRUMB + OTHER) * 64),
    "noise of others": (b"", b"another0"),
    "an older one's newlines": (b"\nIDIDIDID 127 unknown request\n", b"\n"),
}
HEARD_S = 2.0


@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_costs_a_share_of_a_core_and_who_goes_is_noticed(tmp_path: Path, name: str) -> None:
    with flooding(tmp_path, guest.EXEC[0], *FLOODS[name]):
        parts = UnixGuestChannel().run(REF, tmp_path, b"yes", deadline_s=HEARD_S)
        began, used, told = time.monotonic(), time.thread_time(), 0
        with suppress(Failed, TimedOut):
            for _ in parts:
                told += 1
        passed = time.monotonic() - began
    assert time.thread_time() - used < 0.2 + passed / 2
    assert told >= int(passed), "a part each second, at least"


@pytest.mark.parametrize("piece", [b"\n", b"\n" * 64, b"\n" * 65536], ids=["one by one", "some", "many"])
def test_newlines_without_end_cost_nobody_a_core(tmp_path: Path, piece: bytes) -> None:
    with flooding(tmp_path, guest.CONTROL, b"", piece):
        began, used = time.monotonic(), time.thread_time()
        with pytest.raises((Failed, TimedOut)):
            UnixGuestChannel().ping(REF, tmp_path, deadline_s=HEARD_S)
        passed = time.monotonic() - began
    assert time.thread_time() - used < 0.2 + passed / 2


@contextmanager
def flooding(directory: Path, port: str, begun: bytes, piece: bytes) -> Iterator[None]:
    """A guest that says `begun`, and then `piece` until it is not heard any more."""
    with listen(directory, port) as listener:

        def serve() -> None:
            with listener.accept()[0] as client, suppress(BrokenPipeError, ConnectionResetError):
                token = client.recv(65536).split()[0]
                client.sendall(begun.replace(b"IDIDIDID", token))
                again = piece.replace(b"IDIDIDID", token)
                while again:
                    client.sendall(again)
                client.recv(1)

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join()
