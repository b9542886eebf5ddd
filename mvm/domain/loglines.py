"""One form for the lines of all logs: what a program writes that is no JSON object becomes one."""

from __future__ import annotations

import json
import re
from datetime import datetime

LONGEST = 64 * 1024
"""Bytes of a line; a longer one becomes several."""

_LEVELS = {
    "critical": re.compile(r"\b(CRIT|CRITICAL|FATAL)\b"),
    "error": re.compile(r"\b(ERRO|ERROR|\w*Error)\b"),
    "warning": re.compile(r"\b(WARN|WARNING|\w*Warning)\b"),
}


def object_of(text: str, logger: str, at: datetime, level: str | None = None) -> str:
    """A line's JSON object; without a `level` it is the first that the text names, else ``info``."""
    found = level or next((name for name, pattern in _LEVELS.items() if pattern.search(text)), "info")
    line = {"event": text, "logger": logger, "level": found, "timestamp": at.isoformat().replace("+00:00", "Z")}
    return json.dumps(line, ensure_ascii=False)


class Lines:
    """What one part writes, piece by piece."""

    def __init__(self, logger: str) -> None:
        self._logger = logger
        self._rest = b""

    def take(self, data: bytes, at: datetime) -> bytes:
        """Whole lines of what came so far, each a JSON object; empty ones are left out."""
        *whole, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > LONGEST:
            whole.append(self._rest)
            self._rest = b""
        return b"".join(self._object(line, at) for line in whole if line.strip())

    def end(self, at: datetime) -> bytes:
        """What is left when nothing more comes."""
        return self.take(b"\n", at) if self._rest else b""

    def _object(self, line: bytes, at: datetime) -> bytes:
        if line.startswith(b"{") and _is_object(line):
            return line + b"\n"
        return object_of(line.decode(errors="replace").rstrip("\r"), self._logger, at).encode() + b"\n"


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
