"""What may arrive in a queue: Celery's task messages (protocol 2) in kombu's envelope for Redis. Pure.

Anybody who reaches the broker can put anything into a queue. What Celery itself would stumble over later, it is asked
here, before it sees it: who passes is of the shape that every field of it has by the protocol.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Collection, Mapping
from datetime import datetime
from enum import StrEnum
from typing import Any

from mvm.errors import InvalidInput

MAX_BYTES = 4 << 20
_CODE = "message.foreign"
_LONGEST_NAME = 255
_PRIORITIES = range(10)

Check = Callable[[Any], bool]


class Why(StrEnum):
    """Why a message is foreign; a metric's label."""

    TOO_LARGE = "too_large"
    NOT_JSON = "not_json"
    SHAPE = "shape"
    CONTENT = "content"
    BODY = "body"
    TASK = "unknown_task"


class ForeignMessage(InvalidInput):
    """Not a message of ours; `task_id` is the id it names, if it can be read."""

    def __init__(self, why: Why, message: str, *, task_id: str | None = None) -> None:
        super().__init__(_CODE, message, hint="see docs/celery.md: Foreign messages", why=why.value)
        self.why = why
        self.task_id = task_id


def read_task(raw: bytes, tasks: Collection[str]) -> dict[str, Any]:
    """The envelope in `raw`, a message of one of `tasks`. Raises `ForeignMessage`."""
    envelope = read_envelope(raw)
    headers = envelope["headers"]
    _check(headers, _HEADERS, "headers")
    task_id = headers["id"]
    if headers["task"] not in tasks:
        raise ForeignMessage(Why.TASK, f"there is no task {headers['task'][:80]!r} here", task_id=task_id)
    content = (envelope.get("content-type"), envelope.get("content-encoding"))
    if content != ("application/json", "utf-8") or "compression" in headers:
        raise ForeignMessage(Why.CONTENT, f"its content is {content}, JSON as it is is read alone", task_id=task_id)
    try:
        _check_body(_json(base64.b64decode(envelope["body"], validate=True), Why.BODY))
    except ForeignMessage as error:
        raise ForeignMessage(error.why, error.message, task_id=task_id) from None
    return envelope


def read_envelope(raw: bytes) -> dict[str, Any]:
    """The envelope in `raw`, whatever it is about. Raises `ForeignMessage`."""
    if len(raw) > MAX_BYTES:
        raise ForeignMessage(Why.TOO_LARGE, f"the message has {len(raw)} bytes, at most {MAX_BYTES} are read")
    envelope: dict[str, Any] = _json(raw, Why.NOT_JSON)
    check_envelope(envelope)
    return envelope


def check_envelope(envelope: object) -> None:
    """Raises `ForeignMessage` unless kombu can make a message of it, whatever it is about."""
    if not isinstance(envelope, dict):
        raise ForeignMessage(Why.SHAPE, "the message is no object")
    _check(envelope, _ENVELOPE, "the message")
    _check(envelope["properties"], _PROPERTIES, "properties")
    _check(envelope["properties"]["delivery_info"], _DELIVERY, "delivery_info")
    try:
        base64.b64decode(envelope["body"], validate=True)
    except (binascii.Error, ValueError):
        raise ForeignMessage(Why.BODY, "the body is not base64") from None


def _check_body(body: object) -> None:
    if not isinstance(body, list) or [type(part) for part in body] != [list, dict, dict]:
        raise ForeignMessage(Why.BODY, "the body is not arguments, keyword arguments and what comes after")
    _check(body[2], _AFTERWARDS, "the body's last part")


def _json(raw: bytes, why: Why) -> Any:
    try:
        value = json.loads(raw)
        if b"\\ud" in raw or b"\\uD" in raw:  # half a character, which nothing could write down again
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        raise ForeignMessage(why, f"it is not JSON: {str(error)[:200]}") from None


def _check(value: Mapping[str, Any], checks: Mapping[str, Check], what: str) -> None:
    for name, holds in checks.items():
        if not holds(value.get(name)):
            raise ForeignMessage(Why.SHAPE, f"{what}: {name} cannot be {str(value.get(name))[:80]!r}")


# --- what each field may be
def _name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _LONGEST_NAME


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _object(value: Any) -> bool:
    return isinstance(value, dict)


def _number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


def _seconds(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _time(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(datetime.fromisoformat(value))
    except ValueError:
        return False


def _maybe(holds: Check) -> Check:
    return lambda value: value is None or holds(value)


def _many(holds: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(holds, value))


_ENVELOPE: Mapping[str, Check] = {"headers": _object, "properties": _object, "body": _text}
_DELIVERY: Mapping[str, Check] = {"exchange": _text, "routing_key": _text}
_PROPERTIES: Mapping[str, Check] = {
    "delivery_tag": _name,
    "delivery_info": _object,
    "body_encoding": lambda value: value == "base64",
    "priority": _maybe(lambda value: _number(value) and value in _PRIORITIES),
    "correlation_id": _maybe(_text),
    "reply_to": _maybe(_text),
}
_HEADERS: Mapping[str, Check] = {
    "task": _name,
    "id": _name,
    "shadow": _maybe(_text),
    "root_id": _maybe(_name),
    "parent_id": _maybe(_name),
    "group": _maybe(_name),
    "group_index": _maybe(_number),
    "retries": _maybe(_number),
    "timelimit": _maybe(lambda value: _many(_maybe(_seconds))(value) and len(value) == 2),
    "eta": _maybe(_time),
    "expires": _maybe(_time),
    "argsrepr": _maybe(_text),
    "kwargsrepr": _maybe(_text),
    "origin": _maybe(_text),
    "ignore_result": _maybe(lambda value: isinstance(value, bool)),
    "replaced_task_nesting": _maybe(_number),
    "stamped_headers": _maybe(_many(_text)),
    "stamps": _maybe(_object),
}
_AFTERWARDS: Mapping[str, Check] = {
    "callbacks": _maybe(_many(_object)),
    "errbacks": _maybe(_many(_object)),
    "chain": _maybe(_many(_object)),
    "chord": _maybe(_object),
}
