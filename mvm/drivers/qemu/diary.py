"""What QEMU says while nobody listens: its events, in a file that it inherits as its standard output.

A monitor of its own is opened by what it finds on its standard input. So an instance's last run can be asked how it
ended, whoever was connected when it did.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from mvm.drivers import files

EVENTS_LOG = "events.log"
NEGOTIATE = b'{"execute":"qmp_capabilities"}\n'
WORDS = ("-chardev", "stdio,id=events,signal=off", "-mon", "chardev=events,mode=control")
_RESERVED = 16 << 10  # bytes; a full disk is no time to have no room for what happens then
_READ = 64 << 10


def begin(directory: Path) -> Path:
    """The empty file for a new VMM, with room that is its own."""
    path = directory / EVENTS_LOG
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with files.closing_fd(fd):
        files.reserve(fd, _RESERVED)
    return path


def shutdown_reason(directory: Path) -> tuple[str | None, bool]:
    """The reason that the VMM gave for its last shutdown, and whether it kept a diary at all.

    What is there was written by a VMM, which a guest may have taken over: it is read in part, and for one word only.
    """
    try:
        with (directory / EVENTS_LOG).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _READ))
            lines = file.read(_READ).splitlines()
    except FileNotFoundError:
        return None, False
    for line in reversed(lines):
        if b'"SHUTDOWN"' in line and (reason := _reason(line)):
            return reason, True
    return None, bool(lines)


def _reason(line: bytes) -> str | None:
    try:
        event = json.loads(line)
        return str(event["data"]["reason"]) if event["event"] == "SHUTDOWN" else None
    except (ValueError, RecursionError, KeyError, TypeError):
        return None
