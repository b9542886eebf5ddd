"""Control groups of version 2, on a kernel that has them: a guest's, since this host may have version 1 only.

The driver itself runs in the guest. It limits processes there, and tells what came of it.
"""

from __future__ import annotations

import io
import json
import zipfile
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import mvm
from tests.support.microvm import BOOT_S, QemuHost, built_image, identity, qemu_host

pytestmark = [pytest.mark.root, pytest.mark.guest]

SOURCES = ("__init__", "errors", "domain/__init__", "domain/ids", "drivers/__init__", "drivers/files",
           "drivers/cgroups", "ports/__init__", "ports/cgroup")  # fmt: skip
AT_ONCE = 50_000  # characters of a command

SCRIPT = r"""
import json, os, subprocess, sys, time
sys.path.insert(0, "/dev/shm/mvm.zip")
from mvm.domain.ids import InstanceRef
from mvm.drivers.cgroups import LinuxCgroups
from mvm.errors import Failed
from mvm.ports.cgroup import GroupLimits

REF, told = InstanceRef.parse("acme/web/i-00000001"), {}
cgroups = LinuxCgroups("mvm-test")
told["missing"], told["kinds"] = dict(cgroups.missing()), dict(cgroups.kinds())

def start(limits, script):
    with cgroups.joining(REF, limits) as files:
        joins = "".join(f"echo 0 >/proc/self/fd/{fd};" for fd in files)
        return subprocess.Popen(["sh", "-c", joins + script], pass_fds=list(files), stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True)

eater = start(GroupLimits(24, 1, 20), "exec python3 -c 'x = bytearray(64 << 20); print(len(x))'")
told["eater"] = [eater.wait(), eater.stdout.read()]
told["ooms"] = cgroups.out_of_memory(REF)

busy = start(GroupLimits(24, 0.25, 20), "while :; do :; done")
def used():
    return int(open("/sys/fs/cgroup/mvm-test/acme.web.i-00000001/cpu.stat").read().split()[1]) / 1e6
while not used():
    pass
began, before = time.monotonic(), used()
while time.monotonic() - began < 2:
    os.sched_yield()
told["cpu"] = (used() - before) / (time.monotonic() - began)
try:
    with cgroups.joining(REF, GroupLimits(24, 1, 20)):
        pass
except Failed as error:
    told["busy"] = error.code
told["groups"] = [str(ref) for ref in cgroups.groups()]
cgroups.remove(REF)
told["killed"] = busy.wait()
told["afterwards"] = cgroups.out_of_memory(REF)

bomb = start(GroupLimits(24, 1, 10), "for n in $(seq 40); do sleep 30 >/dev/null 2>&1 & echo $n; done")
told["pids"] = bomb.stdout.readlines()
cgroups.remove(REF)
bomb.wait()
cgroups.close()
told["left"] = os.path.exists("/sys/fs/cgroup/mvm-test")
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QemuHost]:
    built_image("python")
    with qemu_host(tmp_path_factory.mktemp("host")) as host:
        yield host


def sources() -> str:
    packed, root = io.BytesIO(), Path(mvm.__file__).parent
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in SOURCES:
            archive.writestr(f"mvm/{name}.py", (root / f"{name}.py").read_text())
    return b64encode(packed.getvalue()).decode()


def test_limits_of_version_2_bite_too(host: QemuHost) -> None:
    image = built_image("python")
    spec = replace(
        host.spec(1, mem_mib=256), kernel=image / "vmlinux", initramfs=image / "initramfs.cpio",
        rootfs=image / "rootfs.ext4",
    )  # fmt: skip
    size = str(spec.rootfs.stat().st_size)
    host.shell.run(["qemu-img", "create", "-q", "-f", "qcow2", str(spec.overlay), size])
    host.running(spec)
    host.guest.configure(spec.ref, spec.directory, identity(), deadline_s=BOOT_S)

    def execute(command: str) -> str:
        result = host.guest.execute(spec.ref, spec.directory, command, deadline_s=BOOT_S)
        assert result.exit_code == 0, result
        return result.stdout.decode()

    for name, text in (("mvm.zip", sources()), ("script", b64encode(SCRIPT.encode()).decode())):
        for at in range(0, len(text), AT_ONCE):
            execute(f"printf %s {text[at : at + AT_ONCE]} >>/dev/shm/{name}.b64")
        execute(f"base64 -d </dev/shm/{name}.b64 >/dev/shm/{name}")
    execute("grep -q ' /sys/fs/cgroup cgroup2 ' /proc/mounts || mount -t cgroup2 none /sys/fs/cgroup")
    told = json.loads(execute("python3 /dev/shm/script"))
    assert told["missing"] == {}
    assert set(told["kinds"].values()) == {"version 2 at /sys/fs/cgroup"}
    assert told["eater"] == [-9, ""]
    assert told["ooms"] >= 1
    assert told["cpu"] < 0.3
    assert told["busy"] == "cgroup.failed"
    assert told["groups"] == ["acme/web/i-00000001"]
    assert (told["killed"], told["afterwards"]) == (-9, 0)
    assert len(told["pids"]) <= 10
    assert told["left"] is False
