"""Ports and processes of this machine."""

from __future__ import annotations

import socket
from pathlib import Path


def free_port() -> int:
    """A TCP port of loopback that nobody has right now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
