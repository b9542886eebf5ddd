"""The documents say what the code says."""

import ast
import re
import tomllib
from pathlib import Path
from typing import get_args

import pytest
from annotated_types import Ge, Gt, Le
from pydantic.fields import FieldInfo

from mvm.domain.ids import InstanceId, JobId, NodeId, PoolId, Revision, TenantId
from mvm.domain.lifecycle import TRANSITIONS
from mvm.errors import MvmError
from mvm.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
SOURCES = [path for package in ("mvm", "workers", "beat") for path in sorted((ROOT / package).rglob("*.py"))]
CODE = re.compile(r"[a-z]+\.[a-z_]+|aborted|internal|usage")


def rows(document: str, heading: str = "") -> list[list[str]]:
    """The cells of every table row in a document that begins with a word in backquotes, below `heading`."""
    text = (DOCS / document).read_text().partition(heading)[2] if heading else (DOCS / document).read_text()
    lines = (re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("| `"))
    return [[cell.strip() for cell in line] for line in lines]


def first_words(document: str, heading: str = "") -> list[str]:
    return [row[0].strip("`") for row in rows(document, heading)]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_architecture_names_every_module_once() -> None:
    named = [name for name in first_words("architecture.md") if re.fullmatch(r"(mvm|workers|beat)(\.\w+)*", name)]
    assert sorted(named) == sorted(module_name(path) for path in SOURCES)


def test_architecture_shows_the_layers() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    (block,) = re.findall(r"^```\n(beat .*?)^```$", (DOCS / "architecture.md").read_text(), re.MULTILINE | re.DOTALL)
    assert [line.strip().removeprefix("-> ") for line in block.splitlines()] == layers


def test_architecture_draws_the_transitions() -> None:
    text = (DOCS / "architecture.md").read_text()
    drawn = re.findall(r"^ +(\w+) --> (\w+): (\w+)$", text, re.MULTILINE)
    assert len(drawn) == len(set(drawn))
    assert {(source, verb): to for source, to, verb in drawn} == {
        (status.value, verb.value): to.value for (status, verb), to in TRANSITIONS.items()
    }


def constants() -> set[str]:
    """Every text in the source, also within Lua and f-strings."""
    found: set[str] = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
                found.update(re.findall(r"code = '([\w.]+)'", node.value))
    return found


def made_of_parts() -> set[str]:
    """Codes that are put together: of an id's kind, and of what was not found."""
    ids = {f"{kind.what}.invalid_id" for kind in (TenantId, PoolId, NodeId, InstanceId, JobId, Revision)}
    return ids | {f"{what}.not_found" for what in ("tenant", "pool", "instance")}


def _kinds(kind: type[MvmError]) -> set[type[MvmError]]:
    return {kind}.union(*map(_kinds, kind.__subclasses__()))


def raised() -> set[str]:
    """Codes written where an error is made."""
    kinds = {kind.__name__ for kind in _kinds(MvmError)}
    found: set[str] = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in kinds and node.args:
                inside = (part.value for part in ast.walk(node.args[0]) if isinstance(part, ast.Constant))
                found.update(text for text in inside if isinstance(text, str) and CODE.fullmatch(text))
    return found


def test_troubleshooting_knows_every_code_and_no_other() -> None:
    told = first_words("troubleshooting.md")
    assert len(told) == len(set(told))
    assert (raised() | made_of_parts()) - set(told) == set()
    assert set(told) - constants() - made_of_parts() == set()


def allowed(field: FieldInfo) -> str:
    """The values a setting takes, as the table writes them."""
    bounds = {type(bound): bound for bound in field.metadata}
    low = f"above {bounds[Gt].gt}" if Gt in bounds else f"{bounds[Ge].ge}" if Ge in bounds else ""
    return f"{low} to {bounds[Le].le}" if low else " or ".join(map(str, get_args(field.annotation)))


@pytest.mark.parametrize("name", Settings.model_fields)
def test_operations_lists_the_setting(name: str) -> None:
    field = Settings.model_fields[name]
    (row,) = [r for r in rows("operations.md", "## Settings") if r[0] == f"`MVM_{name.upper()}`"]
    _, default, values, meaning = row
    assert meaning
    assert values == allowed(field)
    if field.default_factory or field.default == "":  # found out at run time, and so told in words
        assert re.fullmatch(r"\(.+\)", default)
    else:
        assert default == f"`{field.default}`"


def test_operations_lists_no_other_setting() -> None:
    named = {word for word in first_words("operations.md", "## Settings") if word.startswith("MVM_")}
    assert named - {"MVM_CONFIG"} == {f"MVM_{name.upper()}" for name in Settings.model_fields}


def test_decisions_are_listed_once_in_their_order_by_their_headings() -> None:
    folder = DOCS / "adr"
    listed = re.findall(r"^- \[(\d{4})\]\(([^)]+)\) (.+)$", (folder / "README.md").read_text(), re.M)
    decisions = sorted(path for path in folder.glob("*.md") if path.name != "README.md")
    assert [name for _, name, _ in listed] == [path.name for path in decisions]
    for number, name, title in listed:
        assert name.startswith(f"{number}-")
        assert (folder / name).read_text().startswith(f"# {int(number)}. {title}\n"), name


@pytest.mark.parametrize("document", [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))], ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text()):
        assert (document.parent / target).exists(), target
