from __future__ import annotations

import json

import pytest

from mvm.domain.secrets import MAX_BYTES, MAX_COUNT, parse
from mvm.errors import InvalidInput


@pytest.mark.parametrize(
    ("content", "values"),
    [
        ('{"A": "1", "b-c.d": "two\\nlines\\u0000"}', {"A": "1", "b-c.d": "two\nlines\0"}),
        (' \n{"Ä": "x"}'.replace("Ä", "A"), {"A": "x"}),
        ("A=1\nB=x=y \n\n# comment\n  # another\nC=' quoted '\r\n", {"A": "1", "B": "x=y ", "C": "' quoted '"}),
        ("PLAIN=wörld", {"PLAIN": "wörld"}),
    ],
)
def test_both_forms(content: str, values: dict[str, str]) -> None:
    assert parse(content.encode()) == values


@pytest.mark.parametrize(
    ("content", "code", "tells"),
    [
        (b"", "secrets.empty", "no secret"),
        (b"# nothing\n\n", "secrets.empty", "no secret"),
        (b"{}", "secrets.empty", "no secret"),
        (b"A=1\nB=\xff", "secrets.invalid", "line 2"),
        (b"A=1\nhush", "secrets.invalid", "line 2"),
        (b"A=1\n\n../hush=x", "secrets.invalid", "line 3"),
        (b"=hush", "secrets.invalid", "line 1"),
        (b"export A=hush", "secrets.invalid", "line 1"),
        (b"A=1\nA=hush", "secrets.invalid", "secret A is there twice"),
        (b"A=", "secrets.invalid", "secret A is empty"),
        (b'{"A": "hush",\n}', "secrets.invalid", "line 2, column 1"),
        (b'{"A": 12345}', "secrets.invalid", "secret A is no text"),
        (b'{"A": {"B": "hush"}}', "secrets.invalid", "secret A is no text"),
        (b'{"A": "hush", "A": "x"}', "secrets.invalid", "secret A is there twice"),
        (b'{"a/b": "hush"}', "secrets.invalid", "secret 1"),
        (b'{"A": "x", ".": "hush"}', "secrets.invalid", "secret 2"),
        (b'{"-n": "hush"}', "secrets.invalid", "secret 1"),
        (b'{"A\\nB": "hush"}', "secrets.invalid", "secret 1"),
        (b'{"A": "\\ud800"}', "secrets.invalid", "secret A has half a character"),
        (b'{"A": ' + b"[" * 100_000, "secrets.invalid", "no JSON object"),
        (b"A=" + b"x" * MAX_BYTES, "secrets.too_large", str(MAX_BYTES + 2)),
        ("".join(f"A{n}=x\n" for n in range(MAX_COUNT + 1)).encode(), "secrets.invalid", str(MAX_COUNT + 1)),
        (json.dumps({"x" * 129: "hush"}).encode(), "secrets.invalid", "secret 1"),
    ],
)
def test_what_is_off_is_named_and_no_value_told(content: bytes, code: str, tells: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        parse(content)
    assert refused.value.code == code
    assert tells in refused.value.message
    assert refused.value.fields["field"] == "from_file"
    assert "hush" not in json.dumps(refused.value.to_dict())
