"""The private Redis's files after a power cut: mended or set aside, and what is there is loaded."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from mvm.domain.instance import ProcessIdentity
from mvm.drivers import processes, redis_files
from mvm.drivers.redis_files import mend, served
from mvm.drivers.redis_link import RedisLink
from mvm.drivers.shell import LocalShell
from mvm.errors import Failed

pytestmark = pytest.mark.redis
SHELL = LocalShell()
KEYS = 200


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Half of the keys are in the base, the others in the file that grows."""
    path = tmp_path / "redis"
    path.mkdir()
    with served(path, SHELL) as link:
        link.pipeline([("SET", f"old{number}", "x" * 20) for number in range(KEYS)])
        link.command("BGREWRITEAOF")
        while b"aof_rewrite_in_progress:1" in link.command("INFO", "persistence"):
            link.command("PING")
        link.pipeline([("SET", f"new{number}", "y" * 20) for number in range(KEYS)])
    return path


def grown(directory: Path) -> Path:
    return next((directory / "appendonlydir").glob("*.incr.aof"))


def base(directory: Path) -> Path:
    return next((directory / "appendonlydir").glob("*.base.rdb"))


def zeros_at_end(directory: Path) -> None:
    with grown(directory).open("ab") as file:
        file.write(bytes(4096))


def cut_off(directory: Path) -> None:
    os.truncate(grown(directory), grown(directory).stat().st_size - 5)


def hole_in_the_middle(directory: Path) -> None:
    with grown(directory).open("r+b") as file:
        file.seek(grown(directory).stat().st_size // 2)
        file.write(bytes(64))


def base_overwritten(directory: Path) -> None:
    with base(directory).open("r+b") as file:
        file.seek(100)
        file.write(b"?" * 64)


def no_manifest(directory: Path) -> None:
    (directory / "appendonlydir" / "appendonly.aof.manifest").unlink()


def empty_manifest(directory: Path) -> None:
    os.truncate(directory / "appendonlydir" / "appendonly.aof.manifest", 0)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (directory / "appendonlydir").iterdir()}


@pytest.mark.parametrize(
    ("spoil", "least", "most"),
    [
        (zeros_at_end, 2 * KEYS, 2 * KEYS),
        (cut_off, 2 * KEYS - 1, 2 * KEYS - 1),
        (hole_in_the_middle, KEYS, 2 * KEYS - 1),
        (base_overwritten, 0, 0),
        (no_manifest, 0, 0),
        (empty_manifest, 0, 0),
    ],
)
def test_what_can_be_read_is_loaded_and_nothing_is_deleted(
    directory: Path, spoil: Callable[[Path], None], least: int, most: int
) -> None:
    spoil(directory)
    spoilt = contents(directory)
    said: list[str] = []
    assert mend(directory, SHELL, said.append)
    (aside,) = directory.parent.glob("redis.damaged-*")
    assert contents(aside) == spoilt
    assert len(said) == 1
    assert str(aside) in said[0]
    with served(directory, SHELL) as link:
        assert least <= link.command("DBSIZE") <= most
    assert mend(directory, SHELL, said.append), "whole as it is, it lacks something"
    assert str(aside) in said[1]
    redis_files.made_good(directory)
    assert not mend(directory, SHELL, said.append)


def test_what_is_whole_is_not_touched(directory: Path, tmp_path: Path) -> None:
    before = contents(directory)
    said: list[str] = []
    assert not mend(directory, SHELL, said.append)
    assert not mend(tmp_path / "none", SHELL, said.append)
    assert contents(directory) == before
    assert not said


def test_one_that_does_not_end_may_not_have_written_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_files, "_END_S", 0.1)

    def stopped(link: RedisLink) -> ProcessIdentity:
        pid = int(link.command("INFO", "server").split(b"process_id:")[1].split()[0])
        monkeypatch.setattr(link, "_timeout_s", 0.1)
        process = processes.identify(pid)
        os.kill(pid, signal.SIGSTOP)
        assert process is not None
        return process

    with pytest.raises(Failed) as caught, served(tmp_path, SHELL) as link:
        process = stopped(link)
    assert caught.value.code == "redis.not_ended"
    assert not processes.runs(process), "nothing is left at the files"


def test_one_that_ends_at_once_is_told_with_its_last_words(tmp_path: Path) -> None:
    (tmp_path / "appendonlydir").touch()  # where its directory would be
    with pytest.raises(Failed) as caught, served(tmp_path, SHELL):
        pytest.fail("it came up")
    assert caught.value.code == "redis.not_loaded"
    assert "appendonlydir" in caught.value.message
