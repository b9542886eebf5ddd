"""Images from Debian's packages, built without root, mounts or Nix."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

from mvm import guest
from mvm.domain.ids import Revision
from mvm.domain.layout import StateLayout
from mvm.domain.pool import ImageSource, Profile
from mvm.drivers import heap
from mvm.drivers.builtin import cpio, ext4, kernel, recipe
from mvm.drivers.builtin.debs import Meanwhile, Package, Packages
from mvm.drivers.files import sync, take_place, take_turn
from mvm.drivers.revisions import BUILD_LOCK
from mvm.errors import Failed
from mvm.ports.images import Admission, ProgressReport, admitted
from mvm.ports.shell import Shell

_FORMAT = 1
_KERNEL, _INITRAMFS, _ROOTFS, _MANIFEST = "vmlinux", "initramfs.cpio", "rootfs.ext4", "manifest.json"
_FILES = (_KERNEL, _INITRAMFS, _ROOTFS)


class BuiltinImages:
    """`ImageBuilder` for ``builtin:`` sources, one build at a time on a node; packages come through `fetch`."""

    def __init__(self, layout: StateLayout, shell: Shell, fetch: Shell | None = None) -> None:
        self._layout = layout
        self._shell = shell
        self._packages = Packages(fetch or shell, layout.package_cache)

    def build(self, source: ImageSource, report: ProgressReport, admit: Admission = admitted) -> Revision:
        """Build; see the port."""
        with _errors(), heap.given_back(), self._turn(partial(report, "wait for another build")) as images:
            report("find packages")
            profile = recipe.canonical(source.profile)
            packages = self._resolve(profile, partial(report, "find packages"))
            inputs = {name: package.sha256 for name, package in packages.items()} | _own_inputs()
            existing = self._existing(profile, inputs)
            if existing:
                report("already built")
                return existing
            admit()
            missing = self._packages.missing(list(packages.values()))
            if missing:
                download = f"download {sum(package.size for package in missing) / 1e6:.0f} MB of packages"
                report(download)
                self._packages.fetch(missing, partial(report, download))
            with tempfile.TemporaryDirectory(dir=images, prefix=".build-") as directory:
                work = Path(directory, "image")  # renamed away, so that the rest goes with the directory
                work.mkdir(mode=0o700)
                release = self._make(profile, packages, work, report)
                report("record")
                return self._publish(work, profile, release, inputs)

    def _resolve(self, profile: Profile, meanwhile: Meanwhile) -> dict[str, Package]:
        image = self._packages.dependency(recipe.KERNEL, recipe.KERNEL_NAME, meanwhile)
        names = (recipe.PACKAGES[profile], (recipe.BUSYBOX, image))
        found = dict(self._packages.resolve([name for group in names for name in group], meanwhile))
        found[recipe.KERNEL] = found.pop(image)
        return found

    def _make(self, profile: Profile, packages: dict[str, Package], work: Path, report: ProgressReport) -> str:
        """Write the image's files into `work`; returns the kernel's release."""
        report("unpack kernel")
        linux = self._packages.read(packages[recipe.KERNEL])
        release = kernel.release(linux)
        kernel.extract(linux[f"boot/vmlinuz-{release}"].data, work / _KERNEL, self._shell)

        report("make initramfs")
        busybox = self._packages.read(packages[recipe.BUSYBOX])[recipe.BUSYBOX_PATH].data
        modules = kernel.modules(linux, recipe.drivers())
        (work / _INITRAMFS).write_bytes(cpio.archive(recipe.initramfs(busybox, modules)))

        report("make root file system")
        trees = {name: self._packages.read(packages[name]) for name in recipe.PACKAGES[profile]}
        ext4.write(
            recipe.rootfs(trees, busybox, self._applets(busybox, work)), work / _ROOTFS, free_mib=recipe.FREE_MIB,
            shell=self._shell,
        )  # fmt: skip
        return release

    def _applets(self, busybox: bytes, work: Path) -> list[str]:
        program = work / "busybox"
        program.write_bytes(busybox)
        program.chmod(0o700)
        try:
            return [name for name in self._shell.run([str(program), "--list"]).stdout.split() if name != "busybox"]
        finally:
            program.unlink()

    def _publish(self, work: Path, profile: Profile, release: str, inputs: dict[str, str]) -> Revision:
        files = {name: {"sha256": _digest(work / name), "size": (work / name).stat().st_size} for name in _FILES}
        manifest = {
            "format": _FORMAT, "profile": profile.value, "kernel_release": release, "files": files, "inputs": inputs,
        }  # fmt: skip
        text = canonical_json(manifest)
        (work / _MANIFEST).write_bytes(text)
        for name in (*_FILES, _MANIFEST):
            (work / name).chmod(0o400)
            sync(work / name)
        sync(work)
        revision = Revision(sha256(text).hexdigest())
        target = self._layout.revision(revision)
        take_place(work, target)  # one that is there was found damaged; a VM that runs keeps the files it has open
        sync(target.parent)
        return revision

    def _existing(self, profile: Profile, inputs: dict[str, str]) -> Revision | None:
        """The intact revision already built from `inputs`."""
        for path in self._layout.images.glob(f"[0-9a-f]*/{_MANIFEST}"):
            try:
                text = path.read_bytes()
                manifest = json.loads(text)
                if (manifest["format"], manifest["profile"], manifest["inputs"]) == (_FORMAT, profile, inputs) and (
                    _intact(path.parent, text, manifest)
                ):
                    return Revision(path.parent.name)
            except (ValueError, KeyError, TypeError, FileNotFoundError):
                continue  # damaged: built again
        return None

    @contextmanager
    def _turn(self, meanwhile: Meanwhile) -> Iterator[Path]:
        """Hold the node's turn to build; whatever a killed builder left behind is removed."""
        images = self._layout.images
        images.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(images / BUILD_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            take_turn(lock, meanwhile)
            for left in images.glob(".build-*"):
                shutil.rmtree(left)
            yield images
        finally:
            os.close(lock)


def canonical_json(manifest: dict[str, Any]) -> bytes:
    """The one form of a manifest whose sha256 is its revision."""
    return json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def _own_inputs() -> dict[str, str]:
    """What of mvm itself shapes an image: the guest's scripts and the builder's code."""
    code = sha256()
    for path in sorted([Path(__file__), *Path(recipe.__file__).parent.glob("*.py")]):
        code.update(path.read_bytes())
    scripts = {f"guest/{name}": sha256(guest.script(name)).hexdigest() for name in guest.SCRIPTS}
    return scripts | {"builder": code.hexdigest()}


def _intact(directory: Path, text: bytes, manifest: dict[str, Any]) -> bool:
    return sha256(text).hexdigest() == directory.name and all(
        _digest(directory / name) == manifest["files"][name]["sha256"] for name in _FILES
    )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


@contextmanager
def _errors() -> Iterator[None]:
    """Failures in the port's words: ``disk.full`` wherever space ran out, ``image.build_failed`` for a tool's."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _full() from None
        raise Failed("image.build_failed", f"the image could not be built: {error}") from error
    except Failed as error:
        words = f"{error.message} {error.fields.get('stderr', '')}"
        if "No space left" in words or "Write error" in words:  # lz4 does not say why it could not write
            raise _full() from None
        if error.code.startswith("shell."):
            raise Failed("image.build_failed", error.message, hint=error.hint, **error.fields) from None
        raise


def _full() -> Failed:
    return Failed(
        "disk.full", "there is no space left to build the image",
        hint="an image needs about 500 MB while it is built; make space below the state directory",
    )  # fmt: skip
