"""Every line of a log is a JSON object."""

import json
from datetime import UTC, datetime

from mvm.domain.loglines import LONGEST, Lines

NOW = datetime(2026, 1, 2, tzinfo=UTC)


def objects(*pieces: bytes) -> list[dict[str, str]]:
    lines = Lines("redis")
    text = b"".join(lines.take(piece, NOW) for piece in pieces) + lines.end(NOW)
    return [json.loads(line) for line in text.splitlines()]


def test_objects_stay_as_they_are_and_all_else_becomes_one() -> None:
    own, foreign, number = objects(b'{"event": "made", "n": 1}\n1:M * Ready\n\n17\n')
    assert own == {"event": "made", "n": 1}
    assert foreign == {
        "event": "1:M * Ready", "logger": "redis", "level": "info", "timestamp": "2026-01-02T00:00:00Z",
    }  # fmt: skip
    assert number["event"] == "17"


def test_lines_come_in_pieces_and_the_last_may_lack_its_end() -> None:
    assert [each["event"] for each in objects(b"one tw", b"o\nthr", b"ee")] == ["one two", "three"]


def test_what_looks_like_an_object_and_is_none_becomes_one() -> None:
    assert [each["event"] for each in objects(b'{"half": \n{]\n\xff\n')] == ['{"half": ', "{]", "\ufffd"]


def test_levels_are_read_where_a_line_names_one() -> None:
    said = (b"SecurityWarning: x\n", b"ModuleNotFoundError: y\n", b"# FATAL z\n", b"fine\n")
    assert [each["level"] for each in objects(*said)] == ["warning", "error", "critical", "info"]


def test_an_endless_line_takes_bounded_memory() -> None:
    assert len(objects(*[b"x" * LONGEST] * 4)) > 1
