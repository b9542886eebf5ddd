"""What the distribution says it needs is what its modules import."""

import ast
import importlib.util
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions, requires
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OWN = ("mvm", "workers", "beat")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def plain(requirement: str) -> str:
    """The distribution that a requirement names, as the index spells it."""
    name = re.split(r"[\s\[;<>=!~]", requirement, maxsplit=1)[0]
    return re.sub(r"[-_.]+", "-", name).lower()


def imported() -> set[str]:
    """Top-level modules of others that ours import, also lazily."""
    found: set[str] = set()
    for package in OWN:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    found.update(alias.name.partition(".")[0] for alias in node.names)
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - set(OWN)


def test_every_import_is_declared() -> None:
    declared = {plain(requirement) for requirement in PROJECT["dependencies"]}
    owners = packages_distributions()
    assert {name for name in imported() if not {plain(each) for each in owners[name]} & declared} == set()


def test_celery_comes_with_what_its_redis_transport_imports() -> None:
    """kombu imports `packaging` there, and names it only with its extra ``redis``."""
    assert any(requirement.startswith("celery[redis]") for requirement in PROJECT["dependencies"])
    assert any(plain(each) == "packaging" for each in requires("kombu") or ())


def test_the_distribution_is_not_called_as_somebody_elses() -> None:
    assert PROJECT["name"] == "mvm-fleet"
    assert set(PROJECT["scripts"]) == {"mvm"}


def test_setup_leaves_our_modules_compiled() -> None:
    """A command would compile all that it imports, each time, where bytecode is not written."""
    subprocess.run([ROOT / "scripts" / "setup"], check=True)
    modules = [path for package in OWN for path in (ROOT / package).rglob("*.py")]
    assert [path for path in modules if not Path(importlib.util.cache_from_source(str(path))).exists()] == []
