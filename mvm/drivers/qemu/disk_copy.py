"""A copy of a guest's data disk as it is at one instant, made by its VMM while the guest goes on writing."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from threading import Event
from time import monotonic
from typing import Any

from mvm.drivers.files import closing_fd
from mvm.drivers.qemu.qmp import CommandFailed, Qmp
from mvm.errors import Failed, TimedOut

Monitor = Callable[[], AbstractContextManager[Qmp]]
_NAME = "mvm-backup"
_ASK_AGAIN_S = 0.1


def copy(monitor: Monitor, disk: Path, into: Path, *, deadline_s: float) -> None:
    """The new file `into` is `disk` as it was when this was called; what is written meanwhile is copied before.

    The monitor is let go of in between: others have work for it. Raises `TimedOut` (``vmm.silent``) past the deadline
    and `Failed` (``vmm.failed``); then nothing of it is left in the VMM.
    """
    end = monotonic() + deadline_s
    with closing_fd(os.open(into, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)) as fd:
        os.ftruncate(fd, disk.stat().st_size)
        with monitor() as qmp:
            _clear(qmp)  # what a backup left that was killed
            _begin(qmp, fd)
        try:
            while (told := _ended(monitor)) is None:
                if monotonic() > end:
                    raise TimedOut("vmm.silent", f"the disk was not copied within {deadline_s:g} s")
                Event().wait(_ASK_AGAIN_S)
            if told:
                raise Failed("vmm.failed", f"the VMM could not copy the disk: {told}", hint="is the disk full?")
        finally:
            with monitor() as qmp:
                _clear(qmp)
        os.fsync(fd)


def _begin(qmp: Qmp, fd: int) -> None:
    number = qmp.run("add-fd", fds=(fd,), opaque=_NAME)["fdset-id"]
    file = {"driver": "file", "filename": f"/dev/fdset/{number}", "locking": "off"}
    qmp.run("blockdev-add", driver="raw", node_name=_NAME, discard="unmap", detect_zeroes="unmap", file=file)
    qmp.run("blockdev-backup", job_id=_NAME, device="data", target=_NAME, sync="full", auto_dismiss=False)


def _ended(monitor: Monitor) -> str | None:
    """None while it is at work; then what went wrong, or nothing."""
    with monitor() as qmp:
        job = _job(qmp)
    if job is None:
        return "the job is gone"
    return str(job.get("error", "")) if job["status"] == "concluded" else None


def _job(qmp: Qmp) -> dict[str, Any] | None:
    jobs: list[dict[str, Any]] = qmp.run("query-jobs")
    return next((job for job in jobs if job["id"] == _NAME), None)


def _clear(qmp: Qmp) -> None:
    """Nothing of a copy is left in the VMM."""
    while (job := _job(qmp)) is not None:
        if job["status"] == "concluded":
            qmp.run("job-dismiss", id=_NAME)
            continue
        with suppress(CommandFailed):  # it may just have ended
            qmp.run("job-cancel", id=_NAME)
        qmp.wait("JOB_STATUS_CHANGE", id=(_NAME,), status=("concluded",))
    if any(node["node-name"] == _NAME for node in qmp.run("query-named-block-nodes", flat=True)):
        qmp.run("blockdev-del", node_name=_NAME)
    for each in qmp.run("query-fdsets"):
        if any(fd.get("opaque") == _NAME for fd in each["fds"]):
            qmp.run("remove-fd", fdset_id=each["fdset-id"])
