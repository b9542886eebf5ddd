"""supervisord as the stack needs it: ``python -m mvm.drivers.supervisord text|json -c FILE``.

It outlives a full disk: its own answer to a log line that cannot be written is a traceback on stderr. That is a file of
the same file system, so writing it fails too, and that failure would end supervisord and with it the stack.

With ``json`` every line of every log is a JSON object: its own, and what parts write that is none, such as the lines of
Redis, and Python's warnings and tracebacks from before logging is set up.
"""

from __future__ import annotations

import sys
import traceback
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from supervisor import dispatchers, loggers
from supervisor.supervisord import main

from mvm.domain.loglines import Lines, object_of

_OWN = "%(asctime)s"
_LEVELS = {"CRIT": "critical", "ERRO": "error", "WARN": "warning", "INFO": "info"}


class _AsObject:
    """Stands where supervisord has a format for its own lines."""

    def __mod__(self, record: dict[str, str]) -> str:
        level = _LEVELS.get(record["levelname"], "debug")
        return object_of(record["message"], "supervisord", datetime.now(UTC), level) + "\n"


def _set_format(handler: Any, fmt: str) -> None:
    """Handlers of its own log write objects; those of parts' logs write what they are given."""
    handler.fmt = _AsObject() if fmt.startswith(_OWN) else fmt


def _log(dispatcher: Any, data: bytes) -> None:
    lines = _lines_of(dispatcher)
    if data and dispatcher.childlog and (whole := lines.take(data, datetime.now(UTC))):
        dispatcher.childlog.info(whole)


def _close(dispatcher: Any) -> None:
    rest = _lines_of(dispatcher).end(datetime.now(UTC))
    if rest and dispatcher.childlog:
        dispatcher.childlog.info(rest)
    dispatchers.PDispatcher.close(dispatcher)


def _lines_of(dispatcher: Any) -> Lines:
    if not hasattr(dispatcher, "mvm_lines"):
        dispatcher.mvm_lines = Lines(dispatcher.process.config.name)
    lines: Lines = dispatcher.mvm_lines
    return lines


def _say_if_possible(_handler: loggers.Handler) -> None:
    with suppress(OSError):
        traceback.print_exc(file=sys.stderr)
        sys.stderr.flush()


if __name__ == "__main__":
    loggers.Handler.handleError = _say_if_possible
    if sys.argv.pop(1) == "json":
        loggers.Handler.setFormat = _set_format
        dispatchers.POutputDispatcher._log = _log
        dispatchers.POutputDispatcher.close = _close
    main()
