"""The cage around real VMMs: what the kernel says of them, and limits that bite."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from mvm.domain.identity import id_of_path, mark_of
from mvm.domain.ids import InstanceRef
from mvm.domain.pool import SeccompPolicy
from mvm.drivers import processes
from mvm.drivers.cgroups import LinuxCgroups
from mvm.drivers.qemu import cage
from mvm.drivers.qemu.driver import QemuDriver
from mvm.errors import Failed, MvmError, Unreachable
from mvm.ports.cgroup import GroupLimits
from mvm.ports.vmm import BootSpec
from tests.support.make import instance_ref
from tests.support.microvm import ANSWER_S, BOOT_S, REVISION, QemuHost, qemu_host
from tests.support.waiting import until

ONE = instance_ref(1)
FIGURES = Path(__file__).parents[2] / "build" / "limits.txt"
LIMIT_MIB = 128


@pytest.fixture(scope="module", autouse=True)
def umask() -> Iterator[None]:
    """A stack's."""
    former = os.umask(0o077)
    yield
    os.umask(former)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QemuHost]:
    with qemu_host(tmp_path_factory.mktemp("host")) as host:
        yield host


@pytest.fixture
def own(host: QemuHost) -> Iterator[BootSpec]:
    spec = host.spec(1)
    yield spec
    host.vmm.kill(spec.ref, None)


def status(pid: int) -> dict[str, list[str]]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.split() for name, _, value in (line.partition(":") for line in lines)}


# --- what a VMM is
@pytest.mark.root
@pytest.mark.guest
@pytest.mark.parametrize("policy", SeccompPolicy)
def test_a_vmm_is_alone_and_has_no_rights(host: QemuHost, own: BootSpec, policy: SeccompPolicy) -> None:
    process = host.vmm.boot(replace(own, seccomp=policy))
    host.guest.hello(own.ref, own.directory, deadline_s=BOOT_S)
    says = status(process.pid)
    assert says["Uid"] == says["Gid"] == [str(own.uid)] * 4
    assert says["Groups"] == []
    assert {says[f"Cap{each}"][0] for each in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
    assert (says["NoNewPrivs"], says["Seccomp"], says["Seccomp_filters"]) == (["1"], ["2"], ["2"])
    assert says["NSpid"][-1] == "1"
    for kind in ("mnt", "net", "ipc", "uts", "pid", "cgroup"):
        assert Path(f"/proc/{process.pid}/ns/{kind}").readlink() != Path(f"/proc/self/ns/{kind}").readlink(), kind
    links = Path(f"/proc/{process.pid}/net/dev").read_text().splitlines()[2:]
    assert [line.split(":")[0].strip() for line in links] == ["lo"]
    limits = Path(f"/proc/{process.pid}/limits").read_text()
    for line in ("Max core file size        0 ", "Max open files            256 ", "Max locked memory         0 "):
        assert line in limits
    assert not [line for line in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0") if line]


@pytest.mark.root
@pytest.mark.guest
def test_a_vmm_sees_and_holds_only_what_it_needs(host: QemuHost, own: BootSpec) -> None:
    host.vmm.boot(host.spec(2))
    try:
        process = host.vmm.boot(own)
        host.guest.hello(own.ref, own.directory, deadline_s=BOOT_S)
        root = Path(f"/proc/{process.pid}/root")
        assert {path.name for path in root.iterdir()} == {
            "dev", "etc", "initramfs", "kernel", "lib", "lib64", "proc", "usr",
        }  # fmt: skip
        assert {path.name for path in (root / "etc").iterdir()} == {"ld.so.cache"}
        assert [path.name for path in (root / "dev").iterdir()] == ["null"]
        assert [path.name for path in (root / "proc").iterdir() if path.name.isdecimal()] == ["1"]
        mounts = [line.split()[4:6] for line in Path(f"/proc/{process.pid}/mountinfo").read_text().splitlines()]
        assert all("ro" in options.split(",") for at, options in mounts if at != "/proc")
        assert all("nosuid" in options.split(",") for _, options in mounts)
        opened = set()
        for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed meanwhile
                opened.add(str(descriptor.readlink()))
        files = {path for path in opened if path.startswith("/") and not path.startswith(("/dev/", "/memfd:"))}
        logs = {own.directory / name for name in ("console.log", "events.log", "vmm.log")}
        allowed = {own.rootfs, own.overlay, *logs}
        assert {Path(path).resolve() for path in files} == {path.resolve() for path in allowed}
        words = " ".join(processes.arguments(process.pid))
        assert str(host.layout.root) not in words
    finally:
        host.vmm.kill(instance_ref(2), None)


@pytest.mark.root
@pytest.mark.guest
def test_the_image_is_open_for_reading_only(host: QemuHost, own: BootSpec) -> None:
    process = host.vmm.boot(own)
    host.guest.hello(own.ref, own.directory, deadline_s=BOOT_S)
    host.vmm.pause(own.ref, process)
    modes = []
    for path in Path(f"/proc/{process.pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            if path.readlink().resolve() == own.rootfs.resolve():
                flags = Path(f"/proc/{process.pid}/fdinfo/{path.name}").read_text().split("flags:")[1].split()[0]
                modes.append(int(flags, 8) & os.O_ACCMODE)
    assert set(modes) == {os.O_RDONLY}


@pytest.mark.root
@pytest.mark.guest
def test_what_the_launcher_could_not_do_is_told(host: QemuHost, own: BootSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cage, "_LIBRARIES", (Path("/nowhere"),))
    with pytest.raises(Failed, match="show /nowhere: No such file or directory") as caught:
        host.vmm.boot(own)
    assert caught.value.code == "cage.failed"
    assert host.vmm.processes() == {}
    assert own.ref not in host.cgroups.groups()


# --- limits
@pytest.mark.root
@pytest.mark.guest
def test_a_vmm_that_wants_more_memory_than_it_may_have_is_ended(
    host: QemuHost, own: BootSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = host.template(host.template_spec(90))
    monkeypatch.setattr(cage, "limits", lambda mem_mib, vcpus: GroupLimits(LIMIT_MIB, vcpus + 0.5, 64))
    process = host.vmm.clone(template, own, revision=REVISION)
    host.vmm.resume(own.ref, process)
    assert host.cgroups.out_of_memory(own.ref) == 0
    with pytest.raises(MvmError):
        host.guest.execute(own.ref, own.directory, "head -c 150m /dev/zero >/dev/shm/x", deadline_s=BOOT_S)
    assert host.vmm.wait_gone(process, deadline_s=ANSWER_S)
    assert host.cgroups.out_of_memory(own.ref) == 1
    record(f"memory: a guest that wrote 150 MiB was ended, since its VMM may have {LIMIT_MIB} MiB")
    host.vmm.kill(own.ref, process)
    assert host.cgroups.out_of_memory(own.ref) == 0


@pytest.fixture
def cgroups(tmp_path: Path) -> Iterator[LinuxCgroups]:
    made = LinuxCgroups(mark_of(id_of_path(tmp_path)))
    yield made
    for ref in made.groups():
        made.remove(ref)
    made.close()


@contextmanager
def run_in(
    cgroups: LinuxCgroups, ref: InstanceRef, limits: GroupLimits, script: str
) -> Iterator[subprocess.Popen[str]]:
    """A shell in a group, which is gone at the end of the block."""
    with cgroups.joining(ref, limits) as files:
        joins = "".join(f"echo 0 >/proc/self/fd/{fd};" for fd in files)
        made = subprocess.Popen(
            ["sh", "-c", f"{joins} {script}"], pass_fds=list(files), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip
    with made:
        try:
            yield made
        finally:
            cgroups.remove(ref)


def record(line: str) -> None:
    """A figure, for people: in ``build/limits.txt``."""
    FIGURES.parent.mkdir(exist_ok=True)
    what = line.partition(":")[0]
    kept = (
        [old for old in FIGURES.read_text().splitlines() if not old.startswith(f"{what}:")] if FIGURES.exists() else []
    )
    FIGURES.write_text("\n".join(sorted([*kept, line])) + "\n")


@pytest.mark.root
def test_the_cpu_limit_bites(cgroups: LinuxCgroups) -> None:
    script = "while :; do :; done & while :; do :; done"
    with run_in(cgroups, ONE, GroupLimits(64, 0.25, 20), script) as busy:
        until(lambda: _cpu_s(busy.pid) > 0, 60, "it is busy")
        began, used = time.monotonic(), _cpu_s(busy.pid)
        until(lambda: time.monotonic() - began > 2, 60, "two seconds have passed")
        share = (_cpu_s(busy.pid) - used) / (time.monotonic() - began)
    record(f"cpu: two busy loops in a group of 0.25 CPUs used {share:.3f} CPUs")
    assert share < 0.3


def _cpu_s(leader: int) -> float:
    ticks = 0
    for pid in processes.pids():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if leader in (pid, int(fields[1])):
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


@pytest.mark.root
def test_the_pids_limit_bites(cgroups: LinuxCgroups) -> None:
    script = "for n in $(seq 40); do sleep 30 >/dev/null 2>&1 & echo $n; done"
    with run_in(cgroups, ONE, GroupLimits(64, 1, 10), script) as bomb:
        assert bomb.stdout is not None
        *started, last = iter(bomb.stdout.readline, "") if bomb.wait(60) else [""]
    record(f"pids: in a group of 10 processes the shell started {len(started)} more: {last.strip()}")
    assert len(started) < 10
    assert "fork" in last


@pytest.mark.root
def test_removing_a_group_kills_all_of_it(cgroups: LinuxCgroups) -> None:
    script = "sleep 60 & sleep 60 & sleep 60 & echo ready; wait"
    with run_in(cgroups, ONE, GroupLimits(64, 1, 20), script) as several:
        assert several.stdout is not None
        assert several.stdout.readline() == "ready\n"
        with pytest.raises(Failed) as caught, cgroups.joining(ONE, GroupLimits(64, 1, 20)):
            pass
        assert caught.value.code == "cgroup.failed"
        cgroups.remove(ONE)
        assert several.wait(60) != 0
        assert several.stdout.read() == ""  # nobody has it open any more


@pytest.mark.root
@pytest.mark.guest
def test_without_a_cage_only_to_compare(host: QemuHost, own: BootSpec) -> None:
    bare = QemuDriver(host.layout, host.shell, caged=False)
    process = bare.boot(own)
    assert status(process.pid)["Uid"][0] == "0"
    bare.kill(own.ref, process)
    with pytest.raises(Unreachable):
        host.guest.ping(own.ref, own.directory, deadline_s=1)
