"""Where another program's words begin."""

from __future__ import annotations

import pytest

from mvm.cli.words import with_dashes

VALUED = {"--timeout", "-o", "--output"}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("R ls -l", "R -- ls -l"),
        ("R -- ls -l", "R -- ls -l"),
        ("R ls -- -l", "R -- ls -- -l"),
        ("R -- ls -- -l", "R -- ls -- -l"),
        ("R --timeout 5 ls --timeout 6", "R --timeout 5 -- ls --timeout 6"),
        ("--timeout 5 R -o json ls -o x", "--timeout 5 R -o json -- ls -o x"),
        ("--timeout=5 R --debug ls --debug", "--timeout=5 R --debug -- ls --debug"),
        ("-ojson R ls", "-ojson R -- ls"),
        ("R - -l", "R -- - -l"),
        ("R", "R"),
        ("R -l", "R -l"),
        ("", ""),
    ],
)
def test_from_the_first_word_on_nothing_is_ours(line: str, expected: str) -> None:
    assert with_dashes(line.split(), VALUED) == expected.split()
