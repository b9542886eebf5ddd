"""Debian packages: found and fetched with apt, by sha256, and read without installing them."""

from __future__ import annotations

import errno
import gzip
import io
import lzma
import os
import posixpath
import re
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from mvm.drivers.builtin.tree import Tree
from mvm.drivers.files import closing_fd, take_turn
from mvm.errors import Cancelled, Failed, Fenced, MvmError, Overdue
from mvm.ports.shell import Shell

_URI = re.compile(r"'(?P<uri>[^']+)' (?P<file>\S+) (?P<size>\d+) SHA256:(?P<sha256>[0-9a-f]{64})")
_MERGED = re.compile(r"(?:bin|sbin|lib|lib64)(?=/|$)")  # what Debian 12 keeps below /usr
_ENV = {"LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
_HINT = "run apt-get update and see that the node reaches its Debian mirror"


Meanwhile = Callable[[], None]
"""Called about once a second while something is waited for; what it raises ends that."""


@dataclass(frozen=True, slots=True)
class Package:
    """A package's file as the archive has it."""

    name: str
    file: str
    size: int
    sha256: str


class Packages:
    """The archive apt is set up for, and a cache of package files named by their sha256."""

    def __init__(self, shell: Shell, cache: Path) -> None:
        self._shell = shell
        self._cache = cache

    def dependency(self, name: str, pattern: re.Pattern[str], meanwhile: Meanwhile) -> str:
        """The package that the metapackage `name` stands for."""
        output = self._apt(["apt-cache", "depends", "--important", name], meanwhile)
        for line in output.splitlines():
            kind, _, dependency = line.strip().partition(" ")
            if kind == "Depends:" and pattern.fullmatch(dependency):
                return dependency
        raise Failed("image.fetch_failed", f"the archive has no {name}", hint=_HINT, package=name)

    def resolve(self, names: Sequence[str], meanwhile: Meanwhile) -> Mapping[str, Package]:
        """The candidates of `names`; raises `Failed` (``image.fetch_failed``) naming what is missing."""
        output = self._apt(["apt-get", "download", "--print-uris", *names], meanwhile)
        found = {}
        for match in _URI.finditer(output):
            name = match["file"].partition("_")[0]
            found[name] = Package(name, match["file"], int(match["size"]), match["sha256"])
        missing = [name for name in names if name not in found]
        if missing:
            raise Failed("image.fetch_failed", f"the archive has no {', '.join(missing)}", hint=_HINT, package=missing)
        return found

    def missing(self, packages: Sequence[Package]) -> Sequence[Package]:
        """Those not in the cache."""
        return [package for package in packages if not self._path(package).exists()]

    def fetch(self, packages: Sequence[Package], meanwhile: Meanwhile) -> None:
        """Bring `packages` into the cache; each appears there complete and verified, or not at all.

        State directories may share a cache: they take turns, and what a killed one left behind is removed.
        """
        self._cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        with closing_fd(os.open(self._cache, os.O_RDONLY | os.O_CLOEXEC)) as turn:
            take_turn(turn, meanwhile)
            for left in self._cache.glob(".fetch-*"):
                shutil.rmtree(left)
            if missing := self.missing(packages):
                self._fetch(missing, meanwhile)

    def _fetch(self, packages: Sequence[Package], meanwhile: Meanwhile) -> None:
        with tempfile.TemporaryDirectory(dir=self._cache, prefix=".fetch-") as directory:
            names = [package.name for package in packages]
            self._apt(["apt-get", "download", "-q", *names], meanwhile, cwd=Path(directory), timeout_s=600)
            for package in packages:
                path = Path(directory, package.file)
                if not path.exists() or sha256(path.read_bytes()).hexdigest() != package.sha256:
                    raise Failed(
                        "image.fetch_failed", f"{package.file} is not what the archive's list says", hint=_HINT,
                        package=package.name,
                    )  # fmt: skip
                path.replace(self._path(package))

    def read(self, package: Package) -> Tree:
        """The files that a cached package installs."""
        data = self._path(package).read_bytes()
        if sha256(data).hexdigest() != package.sha256:
            self._path(package).unlink()
            raise Failed("image.fetch_failed", f"{package.file} was damaged in the cache", hint="build again")
        return read_deb(data)

    def _path(self, package: Package) -> Path:
        return self._cache / f"{package.sha256}.deb"

    def _apt(self, argv: Sequence[str], meanwhile: Meanwhile, *, cwd: Path | None = None, timeout_s: float = 60) -> str:
        try:
            return self._shell.run(argv, env=_ENV, cwd=cwd, timeout_s=timeout_s, meanwhile=meanwhile).stdout
        except (Cancelled, Fenced, Overdue):  # of whom it is done for
            raise
        except MvmError as error:
            words = f"{error.message} {error.fields.get('stderr', '')}"
            if "No space left" in words:
                raise OSError(errno.ENOSPC, "no space for packages") from None
            raise Failed("image.fetch_failed", f"apt: {_complaints(words)}", hint=_HINT, argv=list(argv)) from None


def read_deb(data: bytes) -> Tree:
    """The files that a package installs, their paths as on a merged-/usr system."""
    tree = Tree()
    with tarfile.open(fileobj=io.BytesIO(_member(data))) as tar:
        for member in tar:
            path = _normal(member.name)
            if path == ".":
                continue
            mode = member.mode & 0o7777
            if member.isdir():
                tree.directory(path, mode)
            elif member.issym():
                tree.link(path, member.linkname)
            elif member.islnk():
                tree.file(path, tree[_normal(member.linkname)].data, mode)
            elif (file := tar.extractfile(member)) is not None:
                tree.file(path, file.read(), mode)
            else:
                raise Failed("image.build_failed", f"a package holds the special file {path}")
    return tree


def _normal(path: str) -> str:
    path = posixpath.normpath(path).lstrip("/")
    return f"usr/{path}" if _MERGED.match(path) else path


def _member(data: bytes) -> bytes:
    """The unpacked data.tar in an ar archive."""
    offset = 8
    while data.startswith(b"!<arch>\n") and offset + 60 <= len(data):
        name = data[offset : offset + 16].decode("ascii", "replace").rstrip(" /")
        size = int(data[offset + 48 : offset + 58])
        body = data[offset + 60 : offset + 60 + size]
        match name:
            case "data.tar.xz":
                return lzma.decompress(body)
            case "data.tar.gz":
                return gzip.decompress(body)
            case "data.tar":
                return body
        offset += 60 + size + size % 2
    raise Failed("image.build_failed", "a package is not in a form that can be read")


def _complaints(words: str) -> str:
    errors = [line[3:] for line in words.splitlines() if line.startswith("E: ")]
    return "; ".join(errors)[:500] or words.strip()[-500:]
