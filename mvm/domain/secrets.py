"""A tenant's secrets: names and texts that its guests find as files below /run/secrets."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from mvm.domain.ids import JobId
from mvm.errors import InvalidInput

MAX_BYTES = 256 << 10  # of the file they come in
MAX_COUNT = 256
NODE_KEY_BYTES = 32
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_NAME_RULE = "allowed: 1 to 128 of letters, digits, _, . and -, beginning with a letter, digit or _"
_FORM = 'a secrets file is a JSON object of names and texts, {"NAME": "text"}, or lines of NAME=VALUE'


@dataclass(frozen=True, slots=True)
class Secrets:
    """All secrets of one tenant. `epoch` grows with every change and rotation; 0: there never were any.

    `job` is what made this epoch by rotation, so that a job delivered twice makes one.
    """

    epoch: int
    set_at: datetime
    values: Mapping[str, str] = field(repr=False)
    job: JobId | None = None


def parse(content: bytes) -> dict[str, str]:
    """The names and values in a secrets file.

    It holds a JSON object, or lines of ``NAME=VALUE`` with empty lines and ``#`` comments between them, whose values
    are taken as they are. Raises `InvalidInput` (``secrets.*``) that names the line or the secret, never its value.
    """
    if len(content) > MAX_BYTES:
        raise InvalidInput(
            "secrets.too_large", f"the secrets file has {len(content)} bytes", hint=f"allowed: {MAX_BYTES}",
            field="from_file", value=len(content),
        )  # fmt: skip
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise _invalid(f"line {line} is not UTF-8", "write it as UTF-8; binary values as base64", line=line) from None
    values = _unique(_json(text) if text.lstrip().startswith("{") else _lines(text))
    if not values:
        raise InvalidInput("secrets.empty", "the secrets file holds no secret", hint=_FORM, field="from_file")
    if len(values) > MAX_COUNT:
        raise _invalid(f"there are {len(values)} secrets", f"allowed: {MAX_COUNT}", count=len(values))
    return values


def _json(text: str) -> Iterable[tuple[str, object]]:
    found: list[tuple[str, object]] = []

    def keep(pairs: list[tuple[str, object]]) -> None:
        found[:] = pairs  # the outermost object comes last

    try:
        json.loads(text, object_pairs_hook=keep)
    except json.JSONDecodeError as error:
        raise _invalid(
            f"line {error.lineno}, column {error.colno} is no JSON: {error.msg}", _FORM, line=error.lineno
        ) from None
    except (RecursionError, ValueError):  # nested without end, or a number of too many digits
        raise _invalid("it is no JSON object of texts", _FORM) from None
    return found


def _lines(text: str) -> Iterable[tuple[str, object]]:
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.removesuffix("\r")
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, equals, value = line.partition("=")
        if not equals:
            raise _invalid(f"line {number} is not NAME=VALUE", _FORM, line=number)
        if not _NAME.fullmatch(name):  # not repeated: who forgets the name may have written the secret there
            raise _invalid(f"line {number} has no usable name", _NAME_RULE, line=number)
        yield name, value


def _unique(pairs: Iterable[tuple[str, object]]) -> dict[str, str]:
    values: dict[str, str] = {}
    for place, (name, value) in enumerate(pairs, start=1):
        if not _NAME.fullmatch(name):
            raise _invalid(f"the name of secret {place} cannot be a file's", _NAME_RULE, place=place)
        if name in values:
            raise _invalid(f"secret {name} is there twice", "write each name once", secret=name)
        if not isinstance(value, str):
            raise _invalid(f"secret {name} is no text", 'write it as "text"', secret=name)
        if not value:
            raise _invalid(f"secret {name} is empty", "leave it out, or give it a value", secret=name)
        try:
            value.encode()
        except UnicodeEncodeError:
            raise _invalid(f"secret {name} has half a character", "write it as UTF-8", secret=name) from None
        values[name] = value
    return values


def _invalid(message: str, hint: str, **fields: object) -> InvalidInput:
    return InvalidInput("secrets.invalid", f"the secrets file: {message}", hint=hint, field="from_file", **fields)
