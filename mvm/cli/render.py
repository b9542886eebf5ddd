"""Results on stdout: aligned plain text for people, JSON and YAML for programs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import click

_COLOURS = {"good": "32", "bad": "31", "busy": "33", "dim": "2", "hint": "36", "head": "1"}
_WORDS = {
    "running": "good", "succeeded": "good", "ready": "good", "ok": "good", "failed": "bad", "unreachable": "bad",
    "queued": "busy", "warm": "busy", "sleeping": "dim", "stopped": "dim", "created": "dim", "cancelled": "dim",
}  # fmt: skip

Columns = Mapping[str, str | Callable[[Mapping[str, Any]], object]]
"""A heading each; the value is a field's name or a function of the row."""


def coloured(*, err: bool = False) -> bool:
    """Whether the stream is a terminal that may have colour."""
    stream = sys.stderr if err else sys.stdout
    return stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def paint(text: str, style: str, *, err: bool = False) -> str:
    """`text` in colour, where there may be colour."""
    return f"\x1b[{_COLOURS[style]}m{text}\x1b[0m" if style and coloured(err=err) else text


def clean(text: str, *, lines: bool = False) -> str:
    """`text` without control characters: a guest's words must not drive the terminal. `lines` keeps line breaks."""
    kept = "\n\t" if lines else ""
    return "".join(c if c.isprintable() or c in kept else "" if c == "\r" else "?" for c in text)


def emit(data: Any, output: str) -> None:
    """`data` as JSON or YAML."""
    if output == "yaml":
        import yaml

        # By way of JSON: the domain's names are kinds of str, which YAML's safe writer does not know.
        click.echo(yaml.safe_dump(json.loads(json.dumps(data)), sort_keys=False, allow_unicode=True), nl=False)
    else:
        click.echo(json.dumps(data, indent=2))


def show_list(rows: Sequence[Mapping[str, Any]], columns: Columns, output: str, *, empty: str) -> None:
    """A list: an array, or a table. An empty table says `empty` on stderr."""
    if output != "table":
        emit(list(rows), output)
    elif rows:
        click.echo("\n".join(table(rows, columns)))
    else:
        click.echo(empty, err=True)


def show_one(item: Mapping[str, Any], output: str) -> None:
    """One thing: an object, or a line per field."""
    if output != "table":
        emit(item, output)
        return
    lines = [(name, cell(value)) for name, value in _flat(item)]
    width = max((len(name) for name, _ in lines), default=0)
    for name, text in lines:
        click.echo(f"{paint(name.ljust(width), 'head')}  {paint(text, _WORDS.get(text, ''))}".rstrip())


def table(rows: Iterable[Mapping[str, Any]], columns: Columns, *, headed: bool = True) -> list[str]:
    """Lines of aligned columns, below their headings unless these were shown before."""
    cells = [[cell(row.get(get) if isinstance(get, str) else get(row)) for get in columns.values()] for row in rows]
    heads = [name.upper() for name in columns]
    widths = [max(len(line[i]) for line in [heads, *cells]) for i in range(len(heads))]

    def line(words: Sequence[str], style: Callable[[str], str]) -> str:
        last = len(words) - 1
        padded = (word if i == last else word.ljust(widths[i]) for i, word in enumerate(words))
        return "  ".join(paint(text, style(text.strip())) for text in padded).rstrip()

    lines = [line(words, lambda text: _WORDS.get(text, "")) for words in cells]
    return [line(heads, lambda _: "head"), *lines] if headed else lines


def cell(value: object) -> str:
    """One value on one line."""
    if value is None or value in ("", [], {}):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return " ".join(f"{key}={cell(part)}" for key, part in value.items())
    if isinstance(value, list | tuple):
        return " ".join(cell(part) for part in value)
    return clean(str(value))


def _flat(item: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, object]]:
    for name, value in item.items():
        if isinstance(value, Mapping) and value and name not in ("error", "params"):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def age(when: str | None) -> str:
    """How long ago: ``12s``, ``5m``, ``3h``, ``2d``."""
    if not when:
        return "-"
    seconds = max(0, int((datetime.now(UTC) - datetime.fromisoformat(when)).total_seconds()))
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"
