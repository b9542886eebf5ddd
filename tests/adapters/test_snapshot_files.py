"""drivers/snapshot_files.py, where the disk itself is at fault."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mvm.drivers import files as plain
from mvm.drivers import snapshot_files as files
from mvm.errors import Failed


def test_a_snapshot_is_there_at_any_time_while_another_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    into, contents = tmp_path / "snapshot", []

    def removed(path: Path, **_: object) -> None:
        real(path, ignore_errors=True)
        contents.append((into / "memory").read_text() if into.exists() else "nothing")

    real = shutil.rmtree
    for word in ("old", "new"):
        with files.appearing(into) as half:
            files.write(half, "memory", word.encode())
        monkeypatch.setattr(shutil, "rmtree", removed)
    assert (into / "memory").read_text() == "new"
    assert "nothing" not in contents, "a crash here would have left neither"
    assert [path.name for path in tmp_path.iterdir()] == ["snapshot"]


def test_a_file_system_that_cannot_exchange_still_replaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(_one: Path, _other: Path) -> None:
        raise OSError(errno.EINVAL, "cannot")

    monkeypatch.setattr(plain, "exchange", cannot)
    (tmp_path / "there.former" / "older").mkdir(parents=True)  # somebody was killed here before
    for word in ("old", "new"):
        (tmp_path / "draft").mkdir()
        (tmp_path / "draft" / word).touch()
        if word == "old":
            (tmp_path / "draft").rename(tmp_path / "there")
        else:
            plain.take_place(tmp_path / "draft", tmp_path / "there")
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["new"]
    assert [path.name for path in (tmp_path / "draft").iterdir()] == ["old"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["draft", "there"]


@pytest.mark.parametrize("read", [files.manifest, lambda directory: files.read(directory, files.MANIFEST, {})])
def test_what_cannot_be_read_is_refused_as_damaged(tmp_path: Path, read: Callable[[Path], object]) -> None:
    (tmp_path / files.MANIFEST).mkdir()  # reading it fails by another error than that it is missing
    with pytest.raises(Failed) as refused:
        read(tmp_path)
    assert refused.value.code == "snapshot.damaged"
    assert "cannot be read" in refused.value.message
