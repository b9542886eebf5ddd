"""The host's memory, as its kernel counts it."""

from __future__ import annotations

from pathlib import Path

from mvm.errors import Failed
from mvm.ports.host import MemoryLeft


class ProcMemory:
    """ports/host.py over ``/proc/meminfo``."""

    def __init__(self, path: Path = Path("/proc/meminfo")) -> None:
        self._path = path

    def left(self) -> MemoryLeft:
        """See ports/host.py."""
        try:
            pairs = (line.partition(":") for line in self._path.read_text().splitlines())
            mib = {name: int(rest.split()[0]) >> 10 for name, _, rest in pairs if name.startswith("Mem")}
            return MemoryLeft(mib["MemTotal"], mib["MemAvailable"])
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise Failed("host.unreadable", f"{self._path} does not tell the host's memory: {error!r}") from None
