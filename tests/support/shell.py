"""The host's shell, remembering what it ran."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mvm.drivers.shell import LocalShell
from mvm.ports.shell import Completed


class RecordingShell(LocalShell):
    def __init__(self) -> None:
        self.ran: list[Sequence[str]] = []

    def run(self, argv: Sequence[str], **options: Any) -> Completed:
        self.ran.append(argv)
        return super().run(argv, **options)
