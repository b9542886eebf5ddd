"""Documents, read against a description of what they may say: every error at once, each with its JSON path. Pure.

A description is made of kinds (`Integer`, `Text`, `Object`, ...). It reads a decoded JSON value, and it tells the
JSON schema of what it reads. What is wrong is noted, and what could not be read is `BAD`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from enum import StrEnum
from typing import Any, Final, NamedTuple, Protocol

from mvm.errors import InvalidInput, MvmError, QuotaExceeded

MAX_BYTES = 16 << 20
MAX_VALUES = 500_000  # objects, arrays and what they hold; one takes up to a hundred times its text in memory
_BEFORE_VALUES = (b"{", b"[", b",")  # each value but one follows one of them
_SHOWN = 60  # characters of a value, in a message
_TOLD = 100  # problems in an error's message; its fields have all
_MOST = 1000  # after so many nobody reads on
_GUESSED = 20  # unknown fields of one object for which the nearest known one is looked for


class _Bad:
    """What could not be read; the reason has been noted."""

    __slots__ = ()


BAD: Final = _Bad()
_MISSING: Final = object()


class Problem(NamedTuple):
    """One thing that is wrong, and where. `quota`: it is well-formed, and more than a quota gives."""

    path: str
    message: str
    quota: bool = False

    def __str__(self) -> str:
        return f"{self.path}: {self.message}"


class TooMany(Exception):
    """`Problems` is full."""


class Problems(list[Problem]):
    """What is wrong, as far as anybody will read it; raises `TooMany` with the last that it takes."""

    def append(self, problem: Problem) -> None:
        """Note one more."""
        super().append(problem)
        if len(self) >= _MOST:
            raise TooMany


class _Pairs(dict[str, Any]):
    """A JSON object that remembers which names it had more than once."""

    repeated: tuple[str, ...] = ()


def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these fields."""
    made = dict(items)
    if len(made) == len(items):
        return made
    counts = Counter(name for name, _ in items)
    marked = _Pairs(made)
    marked.repeated = tuple(name for name, count in counts.items() if count > 1)
    return marked


def check_size(size: int) -> None:
    """Raises `InvalidInput` for a document of so many bytes."""
    if size > MAX_BYTES:
        raise InvalidInput(
            "desired.too_large", f"the desired state has {size} bytes", hint=f"allowed: {MAX_BYTES}", size=size
        )


def decode_text(content: bytes) -> str:
    """`content` as text; raises `InvalidInput` when it is too large, or not UTF-8."""
    check_size(len(content))
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise malformed("not UTF-8", f"byte {error.start} cannot be read") from None


def check_values(count: int, most: int = MAX_VALUES) -> None:
    """Raises `InvalidInput` for a document of so many values."""
    if count > most:
        hint = f"allowed: {most}" + ("; as JSON more are" if most < MAX_VALUES else "")
        raise InvalidInput("desired.too_large", f"the desired state has more than {most} values", hint=hint)


def decode_json(content: bytes) -> Any:
    """The JSON value in `content`; raises `InvalidInput` when there is none, or it is too large to be read."""
    text = decode_text(content)
    check_values(sum(content.count(each) for each in _BEFORE_VALUES))
    try:
        return json.loads(text, object_pairs_hook=pairs, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise malformed("not JSON", f"line {error.lineno}, column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError):  # digits without end, brackets without end
        raise malformed("not JSON", "a number is too long, or brackets are nested too deeply") from None


def read_whole(kind: Kind, value: Any, problems: Problems) -> Any:
    """What `kind` reads from `value`; `BAD` when there were too many problems to go on."""
    try:
        return kind.read(value, "$", problems)
    except TooMany:
        return BAD


def malformed(what: str, why: str) -> InvalidInput:
    """The error of text that is no document at all."""
    return InvalidInput("desired.malformed", f"the desired state is {what}: {why}", hint="see: docs/desired-state.md")


def _no_constant(name: str) -> None:
    raise json.JSONDecodeError(f"{name} is no number in JSON", "", 0)


def shown(value: object) -> str:
    """A value in a message: as JSON, and short."""
    text = json.dumps(value, default=str) if not isinstance(value, dict | list) else _size_of(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def _size_of(value: dict[str, Any] | list[Any]) -> str:
    return f"an object of {len(value)} fields" if isinstance(value, dict) else f"an array of {len(value)}"


def join(path: str, name: object) -> str:
    """The path of a field, or with a number of an item."""
    if isinstance(name, int):
        return f"{path}[{name}]"
    text = str(name)
    return f"{path}.{text}" if text.isidentifier() and len(text) <= _SHOWN else f"{path}[{shown(text)}]"


class Kind(Protocol):
    """What a value may be."""

    def read(self, value: Any, path: str, problems: list[Problem]) -> Any:
        """The value as the domain has it, or `BAD` with the reason in `problems`."""
        ...

    def schema(self) -> dict[str, Any]:
        """JSON schema of what `read` takes."""
        ...


@dataclass(frozen=True, slots=True)
class Integer:
    """A whole number from `low` to `high`."""

    low: int
    high: int

    def read(self, value: Any, path: str, problems: list[Problem]) -> Any:
        """The number."""
        if type(value) is int and self.low <= value <= self.high:
            return value
        whole = "" if type(value) is int else "whole numbers, "
        limits = f"{self.low} to {self.high}" if self.high > self.low else f"{self.low}"
        problems.append(Problem(path, f"{shown(value)} is not allowed: {whole}{limits}"))
        return BAD

    def schema(self) -> dict[str, Any]:
        """A const, or a range."""
        if self.low == self.high:
            return {"const": self.low}
        return {"type": "integer", "minimum": self.low, "maximum": self.high}


@dataclass(frozen=True, slots=True)
class Boolean:
    """True or false."""

    def read(self, value: Any, path: str, problems: list[Problem]) -> Any:
        """The same."""
        if isinstance(value, bool):
            return value
        problems.append(Problem(path, f"{shown(value)} is not allowed: true or false"))
        return BAD

    def schema(self) -> dict[str, Any]:
        """A boolean."""
        return {"type": "boolean"}


@dataclass(frozen=True, slots=True)
class Text:
    """A text that `parse` takes; it raises `InvalidInput` for others. `pattern` is for the schema."""

    parse: Callable[[str], Any]
    pattern: str | None = None

    def read(self, value: Any, path: str, problems: list[Problem]) -> Any:
        """What `parse` makes of it."""
        if not isinstance(value, str):
            problems.append(Problem(path, f"{shown(value)} is not a text"))
            return BAD
        try:
            return self.parse(value)
        except InvalidInput as error:
            problems.append(Problem(path, _words(error)))
            return BAD

    def schema(self) -> dict[str, Any]:
        """A string."""
        return {"type": "string", **({"pattern": f"^(?:{self.pattern})$"} if self.pattern else {})}


@dataclass(frozen=True, slots=True)
class Choice:
    """One of an enumeration's words."""

    of: type[StrEnum]

    def read(self, value: Any, path: str, problems: list[Problem]) -> Any:
        """Its member."""
        if isinstance(value, str) and value in tuple(self.of):
            return self.of(value)
        problems.append(Problem(path, f"{shown(value)} is not allowed: {', '.join(self.of)}"))
        return BAD

    def schema(self) -> dict[str, Any]:
        """The words."""
        return {"enum": [word.value for word in self.of]}


@dataclass(frozen=True, slots=True)
class Array:
    """At most `most` items of one kind."""

    of: Kind
    most: int

    def read(self, value: Any, path: str, problems: list[Problem]) -> Any:
        """A list with `BAD` for each item that is."""
        if not isinstance(value, list):
            problems.append(Problem(path, f"{shown(value)} is not an array"))
            return BAD
        if len(value) > self.most:
            problems.append(Problem(path, f"{len(value)} items are not allowed: at most {self.most}"))
            return BAD
        return [self.of.read(item, join(path, at), problems) for at, item in enumerate(value)]

    def schema(self) -> dict[str, Any]:
        """An array."""
        return {"type": "array", "maxItems": self.most, "items": self.of.schema()}


@dataclass(frozen=True, slots=True)
class Field:
    """A field of an object. One without a `default` is required; `None` as default: it may be left out."""

    kind: Kind
    about: str
    default: Any = _MISSING

    @property
    def required(self) -> bool:
        """Whether it has to be there."""
        return self.default is _MISSING

    def schema(self) -> dict[str, Any]:
        """The kind's, with a description and the default."""
        told = {"default": self.default} if isinstance(self.default, bool | int | str) else {}
        return {**self.kind.schema(), "description": self.about, **told}


@dataclass(frozen=True, slots=True)
class Object:
    """An object of known fields, made into a value by `make`, which may raise `InvalidInput`.

    By `dict` it stays an object of the fields that could be read.
    """

    fields: Mapping[str, Field]
    make: Callable[..., Any] = dict

    def read(self, value: Any, path: str, problems: list[Problem]) -> Any:
        """The value made, or `BAD` when something in it is; an object by `dict` is never."""
        if not isinstance(value, dict):
            problems.append(Problem(path, f"{shown(value)} is not an object"))
            return BAD
        before, values = len(problems), {}
        self._check_names(value, path, problems)
        for name, field in self.fields.items():
            if name in value:
                read = field.kind.read(value[name], join(path, name), problems)
                if read is not BAD:
                    values[name] = read
            elif field.required:
                problems.append(Problem(join(path, name), "is missing"))
            else:
                values[name] = field.default
        if self.make is dict:
            return values
        if len(problems) > before:
            return BAD
        try:
            return self.make(**values)
        except InvalidInput as error:
            at = error.fields.get("field")
            problems.append(Problem(join(path, at) if at in self.fields else path, _words(error)))
            return BAD

    def _check_names(self, value: dict[str, Any], path: str, problems: list[Problem]) -> None:
        unknown = [name for name in value if name not in self.fields]
        for at, name in enumerate(unknown):
            near = get_close_matches(str(name)[:_SHOWN], self.fields, 1) if at < _GUESSED else []
            guess = f": did you mean {near[0]}?" if near else f"; known are {', '.join(self.fields)}"
            problems.append(Problem(join(path, str(name)), f"is not a field here{guess if at < _GUESSED else ''}"))
        for name in getattr(value, "repeated", ()):
            problems.append(Problem(join(path, name), "is given more than once"))

    def schema(self) -> dict[str, Any]:
        """An object that has no other fields."""
        return {
            "type": "object",
            "additionalProperties": False,
            "required": [name for name, field in self.fields.items() if field.required],
            "properties": {name: field.schema() for name, field in self.fields.items()},
        }


def _words(error: InvalidInput) -> str:
    """Its message and hint, with no dashes before names: these are no options of a command."""
    text = f"{error.message}; {error.hint}" if error.hint else error.message
    return re.sub(r"--(?=[a-z])", "", text)


def refuse_all(problems: list[Problem]) -> None:
    """Raises one error that tells all of `problems`, if there are any."""
    if not problems:
        return
    over = all(problem.quota for problem in problems)
    kind: type[MvmError] = QuotaExceeded if over else InvalidInput
    count = "1 error" if len(problems) == 1 else f"{len(problems)} errors"
    more = [f"and {len(problems) - _TOLD} more"] if len(problems) > _TOLD else []
    if len(problems) >= _MOST:
        count, more = f"{_MOST} errors and perhaps more", [f"and {_MOST - _TOLD} more, if not more than that"]
    raise kind(
        "desired.over_quota" if over else "desired.invalid",
        "\n  ".join([f"the desired state has {count}:", *map(str, problems[:_TOLD]), *more]),
        hint="nothing was changed; see: docs/desired-state.md",
        errors=[{"path": problem.path, "message": problem.message} for problem in problems[:_MOST]],
    )  # fmt: skip
