"""Which accelerator QEMU runs guests on, and why."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mvm.drivers.files import write_private
from mvm.drivers.qemu import argv
from mvm.drivers.qemu.tsc import host_tsc_khz
from mvm.errors import MvmError
from mvm.ports.shell import Shell

KVM = Path("/dev/kvm")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PROOF = "mvm: probe"  # the initramfs says so when it is asked to
_DEADLINE_S = 8.0


@dataclass(frozen=True, slots=True)
class Accelerator:
    """What guests run on; `reason` is a clause for people."""

    name: argv.AccelName
    reason: str


class AcceleratorProbe:
    """Chooses KVM when a guest has booted on it, TCG otherwise.

    That /dev/kvm opens proves nothing: on some hosts guests die or hang on it. So a guest is booted, once; the result
    is kept in `cache` until the host boots again.
    """

    def __init__(self, shell: Shell, cache: Path, *, kvm: Path = KVM) -> None:
        self._shell = shell
        self._cache = cache
        self._kvm = kvm
        self._lock = threading.Lock()
        self._known: Accelerator | None = None

    def choose(self, find: Callable[[], tuple[Path, Path] | None]) -> Accelerator:
        """The accelerator to use; `find` gives a kernel and an initramfs to try KVM with, or None if there are none."""
        with self._lock:
            if self._known is None:
                self._known = self._without_trying() or self._remembered()
            if self._known is None:
                files = find()
                if files is None:  # not kept: the first image changes the answer
                    return Accelerator("tcg", f"{self._kvm} is there, but without an image it cannot be tried")
                self._known = self._try(*files)
                self._remember(self._known)
            return self._known

    def _without_trying(self) -> Accelerator | None:
        try:
            os.close(os.open(self._kvm, os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            return Accelerator("tcg", f"{self._kvm}: {error.strerror}")
        return None

    def _try(self, kernel: Path, initramfs: Path) -> Accelerator:
        command = [
            *argv.base("kvm"), "-m", "128M", "-serial", "stdio", "-kernel", str(kernel), "-initrd", str(initramfs),
            "-append", argv.kernel_line(host_tsc_khz(), "mvm.probe"),
        ]  # fmt: skip
        try:
            done = self._shell.run(command, timeout_s=_DEADLINE_S)
        except MvmError as error:
            return Accelerator("tcg", f"a guest on KVM did not boot: {_first_line(error)}")
        if _PROOF in done.stdout:
            return Accelerator("kvm", "a guest booted on it")
        return Accelerator("tcg", "a guest on KVM ended before it had booted")

    def _remembered(self) -> Accelerator | None:
        try:
            data: dict[str, Any] = json.loads(self._cache.read_text())
            if data.pop("boot_id") == _boot_id():
                return Accelerator(**data)
        except (OSError, ValueError, KeyError, TypeError):
            pass  # nothing, or nothing of use: it is found out again
        return None

    def _remember(self, accelerator: Accelerator) -> None:
        self._cache.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_private(self._cache, json.dumps({"boot_id": _boot_id(), **asdict(accelerator)}).encode())


def _boot_id() -> str:
    return _BOOT_ID.read_text().strip()


def _first_line(error: MvmError) -> str:
    stderr = str(error.fields.get("stderr", "")).strip()
    return stderr.splitlines()[0] if stderr else error.message
