"""Every example in the documents does what it says, on a real stack with real guests.

Blocks of ``sh`` and ``console`` are run in their order. One that cannot be has ``<!-- not run: REASON -->`` above it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.support.documents import ROOT, Example, Reader, examples, own_name
from tests.support.stack import Stack, running_stack

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WITH_EXAMPLES = [path for path in DOCUMENTS if any(not example.excuse for example in examples(path))]

pytestmark = [pytest.mark.root, pytest.mark.guest, pytest.mark.redis, pytest.mark.timeout(1200)]


def every_line_is_an_object(stack: Stack) -> None:
    """As the documents say of all logs."""
    logs = [path for path in stack.layout.logs.iterdir() if path.suffix != ".out"]
    assert {"redis", "worker", "urgent", "beat", "agent", "flower", "supervisord"} <= {path.stem for path in logs}
    for path in logs:
        for line in path.read_text().splitlines():
            assert {"event", "logger", "level", "timestamp"} <= json.loads(line).keys(), (path.name, line)


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """For examples that need one and bring none up."""
    with running_stack(MVM_NODE_ID=own_name()) as stack:
        yield stack


@pytest.mark.parametrize("document", WITH_EXAMPLES, ids=lambda path: path.name)
def test_every_example_works(document: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    todo = [example for example in examples(document) if not example.excuse]
    if not any("mvm up" in example.commands for example in todo):
        every_example_works(request.getfixturevalue("stack"), todo, tmp_path)
        return
    with running_stack(up=False, MVM_NODE_ID=own_name()) as own:
        every_example_works(own, todo, tmp_path)
        if own.vmms() and own.run("status").returncode:
            own.mvm("up", "--detach")  # who else would stop them


def every_example_works(stack: Stack, todo: Sequence[Example], tmp_path: Path) -> None:
    reader = Reader(stack, tmp_path)
    for example in todo:
        reader.type(example)
    every_line_is_an_object(stack)


def test_the_example_scripts_work(stack: Stack, tmp_path: Path) -> None:
    reader = Reader(stack, tmp_path)
    for script in sorted((ROOT / "docs" / "examples").glob("*.sh")):
        pages = reader.run(str(script), "shop")
        assert pages.count("hello from i-") == 3


def test_the_readme_shows_what_the_demo_does() -> None:
    demo = (ROOT / "scripts" / "demo").read_text()
    (block,) = {example.place for example in examples(ROOT / "README.md") if "scripts/demo" in example.excuse}
    shown = [each.commands for each in examples(ROOT / "README.md") if each.place == block]
    verbs = [" ".join(command.split()[1:3]) for command in shown]
    assert [verb for verb in verbs if verb not in demo] == []
    assert len(verbs) > 5
