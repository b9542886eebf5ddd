"""ports/host.py: the fake and the real one."""

from __future__ import annotations

from pathlib import Path

import pytest

from mvm.drivers.fake import FakeHost
from mvm.drivers.host_memory import ProcMemory
from mvm.errors import Failed
from mvm.ports.host import HostMemory


@pytest.mark.parametrize("memory", [FakeHost().memory, ProcMemory()], ids=["fake", "proc"])
def test_some_of_the_memory_is_available(memory: HostMemory) -> None:
    left = memory.left()
    assert 0 < left.available_mib < left.total_mib


@pytest.mark.parametrize(
    "text", [None, "", "MemTotal: 1024 kB\n", "MemTotal: many kB\nMemAvailable: 5 kB\n", "MemTotal:"]
)
def test_what_cannot_be_read_is_an_error(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "meminfo"
    if text is not None:
        path.write_text(text)
    with pytest.raises(Failed) as failed:
        ProcMemory(path).left()
    assert failed.value.code == "host.unreadable"


def test_the_kernels_kib_are_told_in_mib(tmp_path: Path) -> None:
    path = tmp_path / "meminfo"
    path.write_text(
        "MemTotal:       2097152 kB\nMemFree:  3 kB\nMemAvailable:    524288 kB\nHugePages_Total:       0\n"
    )
    left = ProcMemory(path).left()
    assert (left.total_mib, left.available_mib) == (2048, 512)
