"""The built-in profiles hold what their names promise, in real guests."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

from mvm.domain.pool import Profile
from mvm.drivers.builtin import recipe
from mvm.drivers.shell import LocalShell
from mvm.ports.vmm import BootSpec
from tests.support.microvm import QemuHost, qemu_host

LONG_S = 240.0  # Python without bytecode, on QEMU's translator, beside other tests
NOT_THERE = {
    # no display in a microVM, and Tk is 30 packages
    "_tkinter", "tkinter", "turtle", "turtledemo", "idlelib",
    # other systems'
    "_msi", "_overlapped", "_scproxy", "_winapi", "msilib", "msvcrt", "nt", "winreg", "winsound",
}  # fmt: skip

pytestmark = [pytest.mark.root, pytest.mark.guest, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QemuHost]:
    with qemu_host(tmp_path_factory.mktemp("host"), "python") as host:
        yield host


@pytest.fixture(scope="module")
def python(host: QemuHost) -> BootSpec:
    spec = host.spec(1, profile="python", mem_mib=256)
    host.running(spec)
    return spec


@pytest.fixture(scope="module")
def minimal(host: QemuHost) -> BootSpec:
    spec = host.spec(2)
    host.running(spec)
    return spec


def execute(host: QemuHost, spec: BootSpec, command: str) -> str:
    done = host.guest.execute(spec.ref, spec.directory, command, deadline_s=LONG_S)
    assert done.exit_code == 0, (command, done)
    return done.stdout.decode().strip()


def test_every_module_of_the_standard_library_imports(host: QemuHost, python: BootSpec) -> None:
    program = """
import importlib, sys, warnings
warnings.simplefilter("ignore")
for name in sorted(sys.stdlib_module_names - {"antigravity", "this"}):
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(name)
"""
    missing = execute(host, python, f"python3 - <<'END'\n{program}\nEND")
    assert set(missing.split()) == NOT_THERE & sys.stdlib_module_names


def test_what_hangs_on_libraries_and_files_works(host: QemuHost, python: BootSpec) -> None:
    program = """
import bz2, ctypes, curses, dbm.gnu, dbm.ndbm, hashlib, lzma, mimetypes, readline, sqlite3, ssl, uuid, zlib
print(sqlite3.connect(":memory:").execute("select 6 * 7").fetchone()[0])
print(ssl.create_default_context().cert_store_stats()["x509_ca"] > 100)
print(mimetypes.guess_type("a.webp")[0], uuid.uuid1().version, hashlib.new("ripemd160").name)
curses.setupterm("linux")
"""
    said = execute(host, python, f"python - <<'END'\n{program}\nEND")
    assert said.splitlines() == ["42", "True", "image/webp 1 ripemd160"]


def test_an_environment_can_be_made_without_a_network(host: QemuHost, python: BootSpec) -> None:
    told = execute(host, python, "command -v pip; python -c 'import pip; print(pip.__version__)'").split()
    assert (told[0], told[1].split(".")[0]) == ("/usr/bin/pip", "23")
    assert "pip 23" in execute(host, python, "python -m ensurepip --version")
    execute(host, python, "python -m venv --without-pip /tmp/bare")
    assert execute(host, python, "/tmp/bare/bin/python -c 'import sys; print(sys.prefix)'") == "/tmp/bare"


@pytest.mark.skipif(os.environ.get("MVM_TEST_VENV") != "whole", reason="takes minutes on QEMU's translator")
def test_an_environment_has_pip_which_installs(host: QemuHost, python: BootSpec) -> None:
    package = """
import zipfile
with zipfile.ZipFile("/tmp/own-1-py3-none-any.whl", "w") as wheel:
    wheel.writestr("own.py", "said = 'installed'")
    wheel.writestr("own-1.dist-info/METADATA", "Metadata-Version: 2.1\\nName: own\\nVersion: 1\\n")
    wheel.writestr("own-1.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
    wheel.writestr("own-1.dist-info/RECORD", "")
"""
    execute(host, python, f"python - <<'END'\n{package}\nEND")
    execute(host, python, "python -m venv /tmp/venv")
    execute(
        host, python, "/tmp/venv/bin/pip install -q --no-index --no-compile /tmp/own-1-py3-none-any.whl 2>/dev/null"
    )
    assert execute(host, python, "/tmp/venv/bin/python -c 'import own; print(own.said)'") == "installed"


@pytest.mark.parametrize("flags", ["-T 5 -q", "-q", "-q --timeout=5 --tries=1"])
def test_minimal_has_a_working_http_client(host: QemuHost, minimal: BootSpec, flags: str) -> None:
    serve = "mkdir -p /tmp/www && echo hello >/tmp/www/page && (httpd -p 127.0.0.1:80 -h /tmp/www || :)"
    assert execute(host, minimal, f"{serve}; wget {flags} -O - http://127.0.0.1/page") == "hello"


def test_minimal_knows_whom_to_trust(host: QemuHost, minimal: BootSpec) -> None:
    assert int(execute(host, minimal, "grep -c BEGIN /etc/ssl/certs/ca-certificates.crt")) > 100


@pytest.mark.parametrize("profile", [Profile.MINIMAL, Profile.PYTHON])
def test_a_profile_has_all_that_its_packages_need(profile: Profile) -> None:
    """Or says why not: a package whose library is missing is found by whoever calls it, in a guest."""
    has = set(recipe.PACKAGES[profile])
    text = LocalShell().run(["apt-cache", "depends", "--important", *sorted(has)]).stdout
    groups = alternatives(text)
    lacking = [sorted(group) for group in groups if not group & (has | set(recipe.LEFT_OUT))]
    assert lacking == []


def alternatives(listing: str) -> list[set[str]]:
    """Of each dependency in what `apt-cache depends` prints, the packages that would do."""
    groups: list[set[str]] = []
    again = virtual = False
    for line in listing.splitlines():
        word = line.strip()
        if word.removeprefix("|").startswith(("Depends:", "PreDepends:")):
            name = word.partition(": ")[2]
            if not again:
                groups.append(set())
            groups[-1].add(name.strip("<>").partition(":")[0])
            again, virtual = word.startswith("|"), name.startswith("<")
        elif virtual and line.startswith("    "):
            groups[-1].add(word)
        else:
            again = virtual = False
    return groups


def test_a_shell_finds_programs_by_path(host: QemuHost, minimal: BootSpec) -> None:
    """busybox's own shell would run its applet of that name."""
    own = "mkdir -p /usr/local/bin; cd /usr/local/bin; printf '#!/bin/sh\\necho mine\\n' >cal; chmod +x cal"
    assert execute(host, minimal, f"{own}; cal; sh -c cal") == "mine\nmine"
