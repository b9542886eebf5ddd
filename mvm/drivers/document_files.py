"""Desired-state documents in files: JSON, or YAML by the name's ending."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mvm.domain.document import MAX_BYTES, check_size, check_values, decode_json, decode_text, malformed, pairs
from mvm.errors import NotFound

_DEEPEST = 50
MAX_YAML_VALUES = 100_000  # reading one takes tens of times as long as reading JSON
_TAGS = frozenset(
    f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map", "timestamp")
)
"""What JSON has, and dates, which are kept as text."""


def read_document(path: Path) -> Any:
    """The value in a file; raises `InvalidInput` (``desired.*``), and `NotFound` (``desired.not_found``)."""
    try:
        if path.is_file():
            check_size(path.stat().st_size)
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise NotFound(
            "desired.not_found", f"{path} cannot be read: {error.strerror}", hint="see --desired", field="desired"
        ) from None
    return decode_yaml(content) if path.suffix in (".yaml", ".yml") else decode_json(content)


def decode_yaml(content: bytes) -> Any:
    """The value in YAML text, as JSON would have it. No aliases: a short text could say endlessly much."""
    import yaml

    class Loader(yaml.CSafeLoader):
        """Keeps what JSON has not, dates, as text, and remembers names that are given twice."""

        def construct_object(self, node: Any, deep: bool = False) -> Any:
            """One value. A tag may be written by hand, and promise what the text does not hold."""
            if node.tag not in _TAGS:
                raise yaml.constructor.ConstructorError(None, None, f"JSON has no {node.tag}", node.start_mark)
            try:
                return super().construct_object(node, deep)
            except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
                raise yaml.constructor.ConstructorError(
                    None, None, f"this is no {node.tag}, or too long", node.start_mark
                ) from None

    def mapping(loader: Any, node: Any) -> dict[str, Any]:
        read = loader.construct_object
        return pairs([(str(read(name)), read(value, deep=True)) for name, value in node.value])

    Loader.add_constructor("tag:yaml.org,2002:map", mapping)
    Loader.add_constructor("tag:yaml.org,2002:timestamp", _as_text)
    text, depth = decode_text(content), 0
    try:
        for count, event in enumerate(yaml.parse(text, Loader)):
            check_values(count, MAX_YAML_VALUES)
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:
                raise malformed("not YAML", "it is nested too deeply")
            if isinstance(event, yaml.AliasEvent):
                raise malformed("not YAML", f"an alias in line {_line(event)}: write it out")
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise malformed("not YAML", " ".join(str(error).split())[:300]) from None


def _as_text(loader: Any, node: Any) -> Any:
    return loader.construct_scalar(node)


def _line(event: Any) -> int:
    return int(event.start_mark.line) + 1
