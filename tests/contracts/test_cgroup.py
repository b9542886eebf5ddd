"""ports/cgroup.py: the fake and the real one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mvm.domain.identity import id_of_path, mark_of
from mvm.drivers.cgroups import LinuxCgroups
from mvm.drivers.fake import FakeHost
from mvm.ports.cgroup import Cgroups, GroupLimits
from tests.support.make import instance_ref

ONE, TWO = instance_ref(1), instance_ref(2)
LIMITS = GroupLimits(memory_mib=64, cpus=1.5, pids=20)


@pytest.fixture(params=["fake", pytest.param("linux", marks=pytest.mark.root)])
def cgroups(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cgroups]:
    if request.param == "fake":
        yield FakeHost().cgroups
        return
    real = LinuxCgroups(mark_of(id_of_path(tmp_path)))
    yield real
    for ref in real.groups():
        real.remove(ref)
    real.close()


def make(cgroups: Cgroups, *refs: object) -> None:
    for ref in refs:
        with cgroups.joining(ref, LIMITS):  # type: ignore[arg-type]
            pass


def test_there_are_no_groups_at_first(cgroups: Cgroups) -> None:
    assert cgroups.groups() == frozenset()
    assert cgroups.out_of_memory(ONE) == 0
    assert set(cgroups.missing()) <= {"memory", "cpu", "pids"}


def test_a_group_per_instance_until_it_is_removed(cgroups: Cgroups) -> None:
    make(cgroups, ONE, TWO)
    assert cgroups.groups() == {ONE, TWO}
    cgroups.remove(ONE)
    cgroups.remove(ONE)
    assert cgroups.groups() == {TWO}


def test_an_empty_group_is_made_anew(cgroups: Cgroups) -> None:
    make(cgroups, ONE, ONE)
    assert cgroups.groups() == {ONE}
    assert cgroups.out_of_memory(ONE) == 0


def test_what_is_open_for_joining_is_closed_behind(cgroups: Cgroups) -> None:
    with cgroups.joining(ONE, LIMITS) as files:
        assert all(os.fstat(fd) for fd in files)
    for fd in files:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
