from __future__ import annotations

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvm.domain.commands import ExecEnd, ExecOutput, ExecPart, ExecResult, as_line, collected

outputs = st.builds(ExecOutput, st.binary(max_size=9), st.binary(max_size=9))
words = st.binary(max_size=9).map(lambda word: word.replace(b"\0", b""))


@given(st.lists(outputs), st.integers(0, 20))
def test_the_beginning_of_each_stream_is_kept(parts: list[ExecOutput], limit: int) -> None:
    out, err = b"".join(part.stdout for part in parts), b"".join(part.stderr for part in parts)
    told: list[ExecPart] = [*parts, ExecEnd(3)]
    more = len(out) > limit or len(err) > limit
    assert collected(told, limit=limit) == ExecResult(3, out[:limit], err[:limit], more)


@pytest.mark.parametrize("end", [ExecEnd(0, truncated=True), ExecEnd(124, timed_out=True)])
def test_what_the_guest_tells_of_the_end_stays(end: ExecEnd) -> None:
    assert collected([end]) == ExecResult(end.exit_code, b"", b"", end.truncated, end.timed_out)


@given(st.lists(words, min_size=1))
def test_a_shell_gives_back_exactly_the_words(argv: list[bytes]) -> None:
    line = as_line(argv).decode("utf-8", "surrogateescape")
    assert [word.encode("utf-8", "surrogateescape") for word in shlex.split(line)] == argv
