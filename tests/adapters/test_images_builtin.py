"""The built-in image builder, with Debian's real packages."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import cache
from hashlib import sha256
from itertools import groupby
from pathlib import Path

import pytest

from mvm.domain.ids import Revision
from mvm.domain.layout import StateLayout
from mvm.domain.pool import ImageSource
from mvm.drivers import processes
from mvm.drivers.builtin import debs, recipe
from mvm.drivers.builtin.debs import Package, Packages
from mvm.drivers.images_builtin import BuiltinImages
from mvm.drivers.revisions import BUILD_LOCK
from mvm.drivers.shell import LocalShell
from mvm.errors import Cancelled, Failed
from mvm.ports.images import ProgressReport
from tests.support.microvm import fresh_layout
from tests.support.waiting import until

FILES = {"vmlinux", "initramfs.cpio", "rootfs.ext4", "manifest.json"}
MINIMAL = ImageSource("builtin:", "minimal")
ROOT = Path(__file__).parents[2]
KEPT_MIB = 60  # of the 150 that a build of the smallest image takes


def build(layout: StateLayout, profile: str = "minimal") -> tuple[Revision, list[str]]:
    steps: list[str] = []
    revision = BuiltinImages(layout, LocalShell()).build(ImageSource("builtin:", profile), steps.append)
    return revision, [step for step, _ in groupby(steps)]  # told again each second


def rootfs(layout: StateLayout, revision: Revision, command: str) -> str:
    image = layout.revision(revision) / "rootfs.ext4"
    return subprocess.run(["debugfs", "-R", command, str(image)], capture_output=True, text=True, check=True).stdout


def digests(directory: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


@pytest.fixture(scope="module", autouse=True)
def read_once() -> Iterator[None]:
    """Unpacking is most of a build's work: each package is unpacked once for all of them."""
    known = cache(debs.read_deb)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(debs, "read_deb", lambda data: deepcopy(known(data)))
        yield


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> StateLayout:
    return fresh_layout(tmp_path_factory.mktemp("images") / "state")


@pytest.fixture(scope="module")
def minimal(layout: StateLayout) -> tuple[Revision, list[str]]:
    return build(layout)


@pytest.fixture(scope="module")
def python(layout: StateLayout) -> Revision:
    return build(layout, "python")[0]


def test_a_revision_is_complete_read_only_and_named_by_its_manifest(
    layout: StateLayout, minimal: tuple[Revision, list[str]]
) -> None:
    directory = layout.revision(minimal[0])
    assert set(digests(directory)) == FILES
    assert {stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()} == {0o400}
    text = (directory / "manifest.json").read_bytes()
    assert sha256(text).hexdigest() == minimal[0]
    manifest = json.loads(text)
    assert set(manifest) == {"format", "profile", "kernel_release", "files", "inputs"}
    for name, listed in manifest["files"].items():
        assert listed == {"sha256": digests(directory)[name], "size": (directory / name).stat().st_size}
    assert {"busybox-static", "dropbear-bin", "linux-image-cloud-amd64", "guest/agent"} <= set(manifest["inputs"])


def test_nothing_else_is_left_and_progress_is_told(layout: StateLayout, minimal: tuple[Revision, list[str]]) -> None:
    assert {path.name for path in layout.images.iterdir() if len(path.name) != len(minimal[0])} == {".lock"}
    assert [step for step in minimal[1] if not step.startswith("download")] == [
        "find packages", "unpack kernel", "make initramfs", "make root file system", "record",
    ]  # fmt: skip


def test_built_again_elsewhere_it_is_the_same_to_the_byte(
    layout: StateLayout, python: Revision, tmp_path: Path
) -> None:
    elsewhere = fresh_layout(tmp_path / "elsewhere")
    umask = os.umask(0o077)
    try:
        revision = build(elsewhere, "python")[0]
    finally:
        os.umask(umask)
    assert revision == python
    assert digests(elsewhere.revision(revision)) == digests(layout.revision(revision))


_WORKER = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.adapters.test_images_builtin import StateLayout, build


def resident_mib() -> int:
    (line,) = (each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith("VmRSS:"))
    return int(line.split()[1]) >> 10


before = resident_mib()
with ThreadPoolExecutor(1) as threads:  # which stays, as a worker's do
    revision, _ = threads.submit(build, StateLayout(Path(sys.argv[1]))).result()
    print(revision, resident_mib() - before)
"""


def test_another_worker_builds_the_same_and_keeps_none_of_what_it_took(
    layout: StateLayout, minimal: tuple[Revision, list[str]], tmp_path: Path
) -> None:
    elsewhere = fresh_layout(tmp_path / "elsewhere")
    argv = [sys.executable, "-c", _WORKER, str(elsewhere.root)]
    told = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True, umask=0o077).stdout.split()
    assert told[0] == minimal[0]
    assert digests(elsewhere.revision(minimal[0])) == digests(layout.revision(minimal[0]))
    assert int(told[1]) < KEPT_MIB


def test_what_exists_is_kept(layout: StateLayout, minimal: tuple[Revision, list[str]]) -> None:
    before = (layout.revision(minimal[0]) / "rootfs.ext4").stat()
    again, steps = build(layout, "baseline")  # minimal by its older name
    assert (again, steps) == (minimal[0], ["find packages", "already built"])
    assert (layout.revision(again) / "rootfs.ext4").stat() == before


def test_what_is_damaged_or_left_behind_is_mended(
    layout: StateLayout, minimal: tuple[Revision, list[str]], tmp_path: Path
) -> None:
    revision, built = minimal[0], layout.revision(minimal[0])
    layout = fresh_layout(tmp_path / "state")
    shutil.copytree(built, layout.revision(revision))
    image = layout.revision(revision) / "rootfs.ext4"
    whole = digests(image.parent)
    image.chmod(0o600)
    with image.open("r+b") as file:
        file.seek(1 << 20)
        file.write(b"damage")
    (layout.images / ".build-killed").mkdir()
    (layout.images / ".build-killed" / "rootfs.ext4").write_bytes(b"x")
    assert build(layout)[0] == revision
    assert digests(image.parent) == whole
    assert {path.name for path in layout.images.iterdir()} == {".lock", revision}


def test_the_root_file_system_is_sound_roomy_and_sparse(
    layout: StateLayout, minimal: tuple[Revision, list[str]], tmp_path: Path
) -> None:
    image = layout.revision(minimal[0]) / "rootfs.ext4"
    subprocess.run(["e2fsck", "-fn", str(image)], check=True, capture_output=True)
    header = dict(line.split(":", 1) for line in rootfs(layout, minimal[0], "stats -h").splitlines() if ":" in line)
    free = int(header["Free blocks"]) * int(header["Block size"]) / (1 << 20)
    assert 60 <= free <= 72
    assert image.stat().st_blocks * 512 < image.stat().st_size / 3


def test_the_root_file_system_holds_no_key_and_belongs_to_root(
    layout: StateLayout, minimal: tuple[Revision, list[str]]
) -> None:
    def listing(path: str) -> dict[str, list[str]]:
        lines = (line.split("/") for line in rootfs(layout, minimal[0], f"ls -p {path}").splitlines() if "/" in line)
        return {fields[5]: fields[2:5] for fields in lines}

    assert listing("/")["root"] == ["040700", "0", "0"]
    assert listing("/")["tmp"] == ["041777", "0", "0"]
    assert listing("/etc")["shadow"] == ["100600", "0", "0"]
    assert listing("/usr/lib/mvm")["agent"] == ["100755", "0", "0"]
    assert not [name for name in listing("/etc") if "dropbear" in name or "ssh" in name]
    assert "/run/mvm/ssh" in rootfs(layout, minimal[0], "stat /root/.ssh")


def test_the_python_profile_has_python(layout: StateLayout, python: Revision) -> None:
    assert "python3.11" in rootfs(layout, python, "ls /usr/bin")
    assert "python3" in rootfs(layout, python, "stat /usr/bin/python3")


def test_a_build_that_waits_for_apt_is_cancelled(tmp_path: Path) -> None:
    """And apt ends with it, and all that it has started."""
    shell, asked = Apt(f"sleep 100 & echo $! >{tmp_path}/pid; wait"), 0

    def report(step: str) -> None:
        nonlocal asked
        asked += 1
        if asked > 2:
            raise Cancelled("job.cancelled", "cancelled on request")

    with pytest.raises(Cancelled):
        BuiltinImages(fresh_layout(tmp_path / "state"), shell).build(MINIMAL, report)
    pid = int((tmp_path / "pid").read_text())
    until(lambda: processes.identify(pid) is None, 10, "what apt has started is gone")


def test_a_build_that_waits_for_another_is_cancelled(tmp_path: Path) -> None:
    layout = fresh_layout(tmp_path / "state")
    layout.images.mkdir(parents=True)

    def report(step: str) -> None:
        assert step == "wait for another build"
        raise Cancelled("job.cancelled", "cancelled on request")

    with (layout.images / BUILD_LOCK).open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(Cancelled):
            BuiltinImages(layout, LocalShell()).build(MINIMAL, report)


# --- bad luck
class Apt(LocalShell):
    """A shell in which apt does something else."""

    def __init__(self, script: str) -> None:
        super().__init__()
        self.script = script

    def run(self, argv, **options):  # type: ignore[no-untyped-def]
        if argv[0].startswith("apt"):
            argv = ["sh", "-c", self.script, *argv]
        return super().run(argv, **options)


def failure(layout: StateLayout, shell: LocalShell, report: ProgressReport = lambda step: None) -> Failed:
    with pytest.raises(Failed) as caught:
        BuiltinImages(layout, shell).build(MINIMAL, report)
    assert {path.name for path in layout.images.iterdir()} <= {".lock"}
    return caught.value


def test_without_package_lists_it_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    config = tmp_path / "apt.conf"
    config.write_text(f'Dir::State::lists "{tmp_path}/lists";\nDir::Cache "{tmp_path}";\n')
    error = failure(fresh_layout(tmp_path / "state"), Apt(f'APT_CONFIG={config} exec "$0" "$@"'))
    assert error.code == "image.fetch_failed"
    assert "apt-get update" in error.hint


def test_an_unknown_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "BUSYBOX", "no-such-package")
    error = failure(fresh_layout(tmp_path / "state"), LocalShell())
    assert error.code == "image.fetch_failed"
    assert "no-such-package" in error.message


class NoNetwork(LocalShell):
    """apt as it is without a network."""

    def run(self, argv, **options):  # type: ignore[no-untyped-def]
        if argv[0] == "apt-get" and "--print-uris" not in argv:
            argv = [argv[0], "-o", "Acquire::http::Proxy=http://127.0.0.1:9", "-o", "Acquire::Retries=0", *argv[1:]]
        return super().run(argv, **options)


def test_without_network_it_says_so(tmp_path: Path) -> None:
    error = failure(StateLayout(tmp_path), NoNetwork())
    assert error.code == "image.fetch_failed"
    assert "127.0.0.1" in error.message
    assert not list(StateLayout(tmp_path).package_cache.iterdir())


def test_a_package_that_is_not_what_the_list_says_is_refused(tmp_path: Path) -> None:
    script = """case "$0 $*" in *print-uris* | apt-cache*) exec "$0" "$@" ;; esac; echo x >busybox_1_amd64.deb"""
    error = failure(StateLayout(tmp_path), Apt(script))
    assert error.code == "image.fetch_failed"


def test_a_damaged_cached_package_is_refused_once(
    layout: StateLayout, minimal: tuple[Revision, list[str]], tmp_path: Path
) -> None:
    inputs = json.loads((layout.revision(minimal[0]) / "manifest.json").read_bytes())["inputs"]
    shared, own = layout.package_cache.resolve(), StateLayout(tmp_path / "other")
    own.package_cache.mkdir(parents=True)
    for deb in shared.glob("*.deb"):
        (own.package_cache / deb.name).symlink_to(deb)
    victim = own.package_cache / f"{inputs['dropbear-bin']}.deb"
    victim.unlink()
    victim.write_bytes(b"damaged")
    assert failure(own, LocalShell()).code == "image.fetch_failed"
    assert not victim.exists()
    assert build(own)[0]


def test_those_who_share_a_cache_take_turns(tmp_path: Path) -> None:
    (tmp_path / ".fetch-killed").mkdir()
    package = Package("p", "p_1_all.deb", 1, sha256(b"x").hexdigest())
    shell = Apt(f'echo "$@" >>{tmp_path}/asked; printf x >p_1_all.deb')
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: Packages(shell, tmp_path).fetch([package], lambda: None), range(3)))
    assert (tmp_path / "asked").read_text() == "download -q p\n"
    assert {path.name for path in tmp_path.iterdir()} == {"asked", f"{package.sha256}.deb"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of the test's own."""
    at = tmp_path / "small"
    at.mkdir()
    yield at
    subprocess.run(["umount", str(at)], check=False, capture_output=True)


@pytest.mark.root
@pytest.mark.parametrize(
    ("step", "left_kib"),
    [
        ("unpack kernel", 100),
        ("unpack kernel", 30_000),
        ("make initramfs", 100),
        ("make root file system", 100),
        ("make root file system", 6_000),
        ("make root file system", 12_000),
        ("record", 0),
    ],
)
def test_a_full_disk_is_told_wherever_it_strikes(small_disk: Path, step: str, left_kib: int) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "none", str(small_disk)], check=True)
    filler = small_disk / "filler"

    def report(now: str) -> None:
        if now == step:
            with filler.open("wb") as file:
                free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
                os.posix_fallocate(file.fileno(), 0, free - left_kib * 1024)

    assert failure(fresh_layout(small_disk / "state"), LocalShell(), report).code == "disk.full"


@pytest.mark.root
def test_a_full_disk_is_told_while_packages_come(small_disk: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(small_disk)], check=True)
    assert failure(StateLayout(small_disk / "state"), LocalShell()).code == "disk.full"
