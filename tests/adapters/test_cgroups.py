"""Which control groups are used, and what is written to them: decisions over texts of the kernel's."""

from __future__ import annotations

from pathlib import Path

import pytest

from mvm.drivers import isolation
from mvm.drivers.cgroups import Hierarchy, LinuxCgroups, choose, settings
from mvm.errors import Failed
from mvm.ports.cgroup import GroupLimits

LIMITS = GroupLimits(memory_mib=256, cpus=1.5, pids=97)
ONE = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
39 31 0:36 / /sys/fs/cgroup/pids rw,relatime - cgroup cgroup rw,pids
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
"""
TWO = "24 23 0:28 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot\n"
SYS = Path("/sys/fs/cgroup")


def test_version_1_where_version_2_has_no_controllers() -> None:
    assert choose(ONE, {SYS / "unified": ["hugetlb"]}) == {
        "cpu": Hierarchy(1, SYS / "cpu,cpuacct"), "memory": Hierarchy(1, SYS / "memory"),
        "pids": Hierarchy(1, SYS / "pids"),
    }  # fmt: skip


def test_version_2_alone() -> None:
    found = choose(TWO, {SYS: ["cpuset", "cpu", "io", "memory", "pids"]})
    assert found == dict.fromkeys(("cpu", "memory", "pids"), Hierarchy(2, SYS))


def test_some_of_each() -> None:
    found = choose(ONE, {SYS / "unified": ["pids"]})
    assert found["pids"] == Hierarchy(2, SYS / "unified")
    assert found["memory"].version == 1


def test_none_at_all_is_told(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text("22 1 254:0 / / rw - ext4 /dev/vda rw\n")
    cgroups = LinuxCgroups("mvm-test", mountinfo=mounts)
    assert set(cgroups.missing()) == {"memory", "cpu", "pids"}
    assert cgroups.groups() == frozenset()
    with pytest.raises(Failed, match=r"lacks: memory .*cpu .*pids") as caught:
        isolation.check(cgroups.missing())
    assert caught.value.code == "cage.incomplete"
    assert caught.value.fields["missing"] == ["cpu", "memory", "pids"]


def test_a_mount_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(r"35 31 0:32 / /no\040where rw - cgroup cgroup rw,memory" + "\n")
    missing = LinuxCgroups("mvm-test", mountinfo=mounts).missing()
    assert missing["memory"] == "/no where: No such file or directory"


def test_nothing_missing_is_fine() -> None:
    isolation.check({})


def test_what_is_written() -> None:
    assert settings(1, "memory", LIMITS) == {
        "memory.limit_in_bytes": "268435456", "memory.memsw.limit_in_bytes?": "268435456",
    }  # fmt: skip
    assert settings(1, "cpu", LIMITS) == {
        "cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "150000", "cpu.shares": "1024",
    }  # fmt: skip
    assert settings(2, "memory", LIMITS) == {
        "memory.max": "268435456", "memory.swap.max?": "0", "memory.oom.group": "1",
    }  # fmt: skip
    assert settings(2, "cpu", LIMITS) == {"cpu.max": "150000 100000", "cpu.weight": "100"}
    assert settings(1, "pids", LIMITS) == settings(2, "pids", LIMITS) == {"pids.max": "97"}
