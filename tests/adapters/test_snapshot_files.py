"""drivers/snapshot_files.py, where the disk itself is at fault."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mvm.drivers import snapshot_files as files
from mvm.errors import Failed


@pytest.mark.parametrize("read", [files.manifest, lambda directory: files.read(directory, files.MANIFEST, {})])
def test_what_cannot_be_read_is_refused_as_damaged(tmp_path: Path, read: Callable[[Path], object]) -> None:
    (tmp_path / files.MANIFEST).mkdir()  # reading it fails by another error than that it is missing
    with pytest.raises(Failed) as refused:
        read(tmp_path)
    assert refused.value.code == "snapshot.damaged"
    assert "cannot be read" in refused.value.message
