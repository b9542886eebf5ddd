"""Whether this host can keep VMMs apart, found out by trying."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from mvm.domain.pool import SeccompPolicy
from mvm.drivers import processes
from mvm.drivers.files import closing_fd
from mvm.drivers.qemu import cage
from mvm.drivers.syscalls import failure
from mvm.errors import Failed, MvmError
from mvm.ports.cgroup import Cgroups
from mvm.ports.shell import Shell

_UID = 0x6000_0000  # the first of those that are kept for VMMs, which none has: their offsets begin at 2
_DEADLINE_S = 20.0


def trial(shell: Shell) -> str | None:
    """Why QEMU cannot be in a cage here; None when it has been in one, to tell its version."""
    made = cage.Cage(uid=_UID, policy=SeccompPolicy.STRICT, vcpus=1, files={})
    with tempfile.TemporaryDirectory() as name:
        log = Path(name) / "log"
        try:
            with closing_fd(cage.executable(made)) as program, cage.alone():
                process = shell.spawn([str(cage.qemu()), "--version"], log=log, program=f"/proc/self/fd/{program}")
        except MvmError as error:
            return error.message
        if not processes.wait_gone(process, _DEADLINE_S):
            processes.kill(process)
            return "QEMU did not tell its version"
        said = log.read_text(errors="replace")
    return failure(said) or (None if "QEMU emulator version" in said else said.strip()[-200:] or "QEMU said nothing")


def lacking(shell: Shell, cgroups: Cgroups) -> Mapping[str, str]:
    """What this host lacks, and why: ``cage``, or limits of ``memory``, ``cpu`` or ``pids``."""
    why = trial(shell)
    return {**({"cage": why} if why else {}), **cgroups.missing()}


def check(missing: Mapping[str, str]) -> None:
    """Raises `Failed` (``cage.incomplete``) that names what is missing."""
    if missing:
        told = "; ".join(f"{name} ({why})" for name, why in missing.items())
        raise Failed(
            "cage.incomplete", f"this host cannot isolate guests as required, it lacks: {told}",
            hint="see: mvm doctor; without MVM_REQUIRE_ISOLATION guests are started nevertheless",
            missing=sorted(missing),
        )  # fmt: skip
