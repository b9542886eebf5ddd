"""What an instance is when it comes back from a backup."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mvm.domain.backup import Entry, Found, as_restored, found, job_as_restored, manifest, read_manifest
from mvm.domain.ids import JobId
from mvm.domain.instance import InFlight, Instance, ProcessIdentity
from mvm.domain.job import JobState
from mvm.domain.lifecycle import Status, Verb
from tests.support import make

RUNS = Instance(
    make.instance_ref(), make.NODE, 3, Status.RUNNING, make.START, process=ProcessIdentity(7, 8),
    in_flight=InFlight(JobId("j-019b76daa846-e629fa6598"), Verb.STOP),
)  # fmt: skip


@pytest.mark.parametrize(
    ("status", "has_vmm", "how", "back"),
    [
        (Status.RUNNING, True, Found.IN_USE, Status.STOPPED),
        (Status.WARM, True, Found.IN_USE, Status.STOPPED),
        (Status.RUNNING, False, Found.AT_REST, Status.STOPPED),
        (Status.SLEEPING, False, Found.ASLEEP, Status.SLEEPING),
        (Status.SLEEPING, True, Found.IN_USE, Status.STOPPED),  # a wake was cut off
        (Status.STOPPED, False, Found.AT_REST, Status.STOPPED),
        (Status.STOPPED, True, Found.IN_USE, Status.STOPPED),  # a start was cut off
        (Status.READY, False, Found.AT_REST, Status.READY),
        (Status.CREATED, False, Found.AT_REST, Status.CREATED),
    ],
)
def test_it_is_what_its_disks_are(status: Status, has_vmm: bool, how: Found, back: Status) -> None:
    instance = replace(RUNS, status=status)
    assert found(instance, has_vmm=has_vmm, wakes=True) is how
    restored = as_restored(instance, how, make.START)
    assert (restored.status, restored.process, restored.in_flight) == (back, None, None)
    assert (restored.last_error is not None) == (restored.status is not status), "why it is another is told"


def test_what_was_lost_is_told() -> None:
    """A stop was cut off once it had dropped what the instance slept in."""
    half_stopped = replace(RUNS, status=Status.SLEEPING)
    assert found(half_stopped, has_vmm=False, wakes=False) is Found.LOST
    restored = as_restored(half_stopped, Found.LOST, make.START, "memory is missing")
    assert restored.status is Status.STOPPED
    assert "lost: memory is missing [backup.restored]" in str(restored.last_error)


def test_an_unfinished_job_has_failed() -> None:
    ended = job_as_restored(make.job(state=JobState.RUNNING), make.START)
    assert (ended.state, (ended.error or {})["code"]) == (JobState.FAILED, "backup.restored")


def test_a_list_of_files_is_read_only_as_it_was_written() -> None:
    files = {"a": Entry(1, 0o600, 2, "0" * 64)}
    raw = manifest(files)
    assert read_manifest(raw) == files
    for spoilt in (raw[:-1], raw + b"\n", raw.replace(b"384", b"385"), b"", b"{}\n"):
        with pytest.raises(ValueError):
            read_manifest(spoilt)
