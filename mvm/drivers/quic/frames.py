"""What travels on a stream: JSON objects, each behind its length in four bytes, big end first.

One stream carries one request ``{"id", "method", "params"}`` and, the other way, ``{"ok": {...}}`` once or more
often, or ``{"error": {...}}``, and then the stream's end. A stream that ends within a frame has failed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mvm.errors import Failed, InvalidInput

ALPN = "mvm/1"
MAX_FRAME = 1 << 20
CHUNK = MAX_FRAME // 4  # of what a sender cuts a long answer into
_HEADER = 4


def encode(message: Mapping[str, Any]) -> bytes:
    """One frame. Raises `InvalidInput` (``agent.frame_too_large``)."""
    body = json.dumps(message, separators=(",", ":")).encode()
    if len(body) > MAX_FRAME:
        raise _too_large(len(body))
    return len(body).to_bytes(_HEADER, "big") + body


class FrameReader:
    """Cuts a stream of bytes into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    @property
    def pending(self) -> int:
        """Bytes held of a frame that is not complete."""
        return len(self._buffer)

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """The messages that `data` completes.

        Raises `InvalidInput` (``agent.frame_too_large``, ``agent.bad_frame``); the stream cannot go on then.
        """
        self._buffer += data
        messages: list[dict[str, Any]] = []
        while len(self._buffer) >= _HEADER:
            size = int.from_bytes(self._buffer[:_HEADER], "big")
            if size > MAX_FRAME:
                raise _too_large(size)
            if len(self._buffer) < _HEADER + size:
                break
            messages.append(_decode(bytes(self._buffer[_HEADER : _HEADER + size])))
            del self._buffer[: _HEADER + size]
        return messages


def join(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One answer from its parts: strings and lists under one key are put together, of the rest the last counts.

    Raises `Failed` (``agent.protocol``) when there are none.
    """
    if not parts:
        raise Failed("agent.protocol", "the agent ended its answer before it began")
    whole: dict[str, Any] = {}
    pieces: dict[str, list[Any]] = {}
    for part in parts:
        for key, value in part.items():
            pieces.setdefault(key, []).append(value)
    for key, values in pieces.items():
        if all(isinstance(value, str) for value in values):
            whole[key] = "".join(values)
        elif all(isinstance(value, list) for value in values):
            whole[key] = [item for value in values for item in value]
        else:
            whole[key] = values[-1]
    return whole


def _decode(body: bytes) -> dict[str, Any]:
    try:
        message = json.loads(body)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        raise InvalidInput("agent.bad_frame", "a frame does not hold JSON") from None
    if not isinstance(message, dict):
        raise InvalidInput("agent.bad_frame", "a frame does not hold a JSON object")
    return message


def _too_large(size: int) -> InvalidInput:
    return InvalidInput("agent.frame_too_large", f"a frame of {size} bytes; at most {MAX_FRAME} are allowed", size=size)
