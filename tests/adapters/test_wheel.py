"""The wheel, installed where nothing of the source tree is: it starts, and has all that it needs.

The interpreter of the tests is tried by itself. ``MVM_TEST_PYTHONS`` names others, between colons, such as a Python
3.13, which Debian 12 does not have.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.local import free_port

ROOT = Path(__file__).parents[2]
SYSTEM = "/usr/sbin:/usr/bin:/sbin:/bin"
PYTHONS = [os.path.realpath(sys.executable), *filter(None, os.environ.get("MVM_TEST_PYTHONS", "").split(":"))]

pytestmark = [pytest.mark.redis, pytest.mark.timeout(600)]


class Installed:
    """A bare virtual environment with the wheel in it, and its commands."""

    def __init__(self, python: str, wheel: Path, place: Path) -> None:
        self._bin = place / "venv" / "bin"
        self._place = place
        self._env = {
            "PATH": f"{self._bin}:{SYSTEM}",
            "HOME": str(place),
            "MVM_STATE_DIR": str(place / "s"),
            "MVM_FLOWER_PORT": str(free_port()),
            "MVM_METRICS_PORT": str(free_port()),
            "MVM_AGENT_PORT": str(free_port()),
        }
        run([python, "-m", "venv", str(place / "venv")])
        pins = place / "pins.txt"
        pins.write_text("\n".join(re.findall(r"^[a-z].*?==[^ ;]+", (ROOT / "requirements.lock").read_text(), re.M)))
        run([str(self._bin / "pip"), "install", "-q", "--no-compile", "-c", str(pins), str(wheel)])

    def run(self, *words: str) -> str:
        """What a command that must succeed prints; nothing of the tree or of the tests' environment reaches it."""
        return run(words, cwd=self._place, env=self._env)


def run(words: Sequence[str], **options: Any) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False, **options)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return str(done.stdout)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("wheel")
    build = ["-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(place)]
    run([sys.executable, *build, str(ROOT)])
    (made,) = place.glob("mvm_fleet-*.whl")
    return made


@pytest.fixture(scope="module", params=PYTHONS)
def installed(request: pytest.FixtureRequest, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(request.param, wheel, tmp_path_factory.mktemp("bare"))


@pytest.fixture
def up(installed: Installed) -> Iterator[Installed]:
    try:
        installed.run("mvm", "up", "--driver", "fake", "--netns", "host", "--detach")
        yield installed
    finally:
        installed.run("mvm", "down")


def test_commands_that_need_no_stack(installed: Installed) -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", installed.run("mvm", "--version"))
    assert "instance" in installed.run("mvm", "--help")
    assert "state directory" in installed.run("mvm", "doctor")


def test_every_module_imports_and_the_guests_scripts_are_there(installed: Installed) -> None:
    walk = (
        "import importlib, pkgutil, mvm\n"
        "for found in pkgutil.walk_packages(mvm.__path__, 'mvm.'):\n"
        "    if not found.name.endswith('__main__'): importlib.import_module(found.name)\n"
        "from mvm import guest\n"
        "print(*[len(guest.script(name)) > 100 for name in guest.SCRIPTS])\n"
    )
    assert set(installed.run("python", "-c", walk).split()) == {"True"}


def test_a_stack_comes_up_and_works(up: Installed) -> None:
    assert "10.240.0.0/24" in up.run("mvm", "tenant", "create", "acme")
    up.run("mvm", "pool", "create", "acme/web", "--flake", "builtin:", "--profile", "minimal")
    up.run("mvm", "pool", "build", "acme/web")
    (ref,) = up.run("mvm", "instance", "create", "acme/web").split()
    assert ref in up.run("mvm", "instance", "start", ref)
    up.run("mvm", "down", "--instances")
