"""What ``mvm doctor`` finds out about the packet filter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mvm.drivers import doctor
from mvm.drivers.shell import LocalShell
from mvm.errors import Failed
from mvm.settings import Settings


class Refusing(LocalShell):
    def run(self, argv: Any, **options: Any) -> Any:
        if "nft" in argv:
            raise Failed("shell.failed", "nft failed with 1: Error: Could not process rule: Operation not supported")
        return super().run(argv, **options)


def found(shell: LocalShell, state_dir: Path) -> doctor.Check:
    (check,) = [each for each in doctor.examine(Settings(state_dir=state_dir), shell) if each.name == "packet filter"]
    return check


@pytest.mark.root
def test_a_kernel_that_takes_the_rules(tmp_path: Path) -> None:
    assert found(LocalShell(), tmp_path).result == "ok"


def test_a_kernel_that_does_not(tmp_path: Path) -> None:
    check = found(Refusing(), tmp_path)
    assert check.result == "fail"
    assert "Operation not supported" in check.detail
    assert "nf_tables" in check.hint
