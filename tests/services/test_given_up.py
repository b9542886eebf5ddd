"""Instances recorded as sleeping whose snapshot is gone: on purpose, and not recorded, or by somebody's hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from mvm.domain.ids import InstanceRef
from mvm.domain.instance import Instance
from mvm.domain.job import JobState, JobVerb
from mvm.domain.lifecycle import Status
from mvm.errors import Failed, GuestRefused, MvmError, NotFound, TimedOut
from tests.services.conftest import Node
from tests.services.test_sleep import running

V = JobVerb
MOVED = NotFound("snapshot.not_found", "there is no snapshot")
DAMAGED = Failed("snapshot.damaged", "manifest.json cannot be read")
FULL = Failed("disk.full", "the node's store: database or disk is full")


class Killed(BaseException):
    pass


@pytest.fixture
def asleep(node: Node) -> str:
    (ref,) = running(node)
    node.ok(V.INSTANCE_SLEEP, ref)
    return ref


@contextmanager
def instead(target: object, name: str, error: BaseException) -> Iterator[None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, name, fail)
        yield


@contextmanager
def stopping(node: Node, errors: Sequence[BaseException]) -> Iterator[None]:
    """Each of the first times that an instance is to be recorded as stopped ends so."""
    store, left = node.services.store, list(errors)
    save = store.save_instance

    def failing(instance: Instance) -> Instance:
        if instance.status is Status.STOPPED and left:
            raise left.pop(0)
        return save(instance)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "save_instance", failing)
        yield


@contextmanager
def refused(node: Node, ref: str, error: MvmError) -> Iterator[None]:
    """What it slept in cannot be read for a while."""
    vmm, snapshot = node.host.vmm, node.host.storage.snapshot(InstanceRef.parse(ref))

    def unless_ours(real: Callable[..., Any]) -> Callable[..., Any]:
        def read(path: object, *args: object, **words: object) -> Any:
            if path == snapshot:
                raise error
            return real(path, *args, **words)

        return read

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vmm, "manifest", unless_ours(vmm.manifest))
        patch.setattr(vmm, "restore", unless_ours(vmm.restore))
        yield


def test_a_stop_that_could_not_be_recorded_leaves_nothing_to_wake_from(node: Node, asleep: str) -> None:
    with stopping(node, [FULL]):
        node.fails("disk.full", V.INSTANCE_STOP, asleep)
    assert node.instance(asleep).status is Status.SLEEPING
    node.fails("instance.invalid_transition", V.INSTANCE_WAKE, asleep)
    assert node.ok(V.INSTANCE_START, asleep)["status"] == "running"
    assert not node.host.leaks()


def test_such_a_stop_can_be_asked_for_again(node: Node, asleep: str) -> None:
    with stopping(node, [FULL]):
        node.fails("disk.full", V.INSTANCE_STOP, asleep)
    assert node.ok(V.INSTANCE_STOP, asleep)["status"] == "stopped"


def test_and_is_tried_again_by_itself(node: Node, asleep: str) -> None:
    with stopping(node, [TimedOut("store.busy", "locked")]):
        assert node.ok(V.INSTANCE_STOP, asleep)["status"] == "stopped"


def test_and_is_taken_up_after_a_kill(node: Node, asleep: str) -> None:
    job = node.submit(V.INSTANCE_STOP, asleep)
    with stopping(node, [Killed()]), pytest.raises(Killed):
        node.services.runner.run(job)
    assert node.services.runner.run(job).state is JobState.SUCCEEDED


@pytest.mark.parametrize("error", [Killed(), Failed("storage.failed", "memory: Input/output error")])
def test_a_stop_that_could_not_drop_the_snapshot_leaves_it_fit_to_wake(
    node: Node, asleep: str, error: BaseException
) -> None:
    job = node.submit(V.INSTANCE_STOP, asleep)
    with instead(node.host.vmm, "discard", error):
        if isinstance(error, Killed):
            with pytest.raises(Killed):
                node.services.runner.run(job)
        else:
            assert node.services.runner.run(job).state is JobState.FAILED
    wake = node.submit(V.INSTANCE_WAKE, asleep)  # which overtakes the stop
    assert node.services.runner.run(wake).state is JobState.SUCCEEDED


def test_a_forced_start_that_fails_and_cannot_be_undone_leaves_nothing_to_wake_from(node: Node, asleep: str) -> None:
    node.host.fail("guest.configure", GuestRefused("guest.refused", "no"))
    node.host.fail("network.remove_taps", Failed("network.failed", "the kernel said no"))
    node.fails("network.failed", V.INSTANCE_START, asleep, force=True)
    node.sweep(V.SWEEP_STALE_PIDS)
    node.sweep(V.SWEEP_ORPHANS)
    assert node.instance(asleep).status is Status.STOPPED
    assert node.instance(asleep).in_flight is None
    assert not node.host.leaks()


@pytest.mark.parametrize("error", [MOVED, DAMAGED])
@pytest.mark.parametrize("verb", [V.INSTANCE_WAKE, V.INSTANCE_START])
def test_what_a_killed_wake_left_is_not_given_up_while_it_cannot_be_read(
    node: Node, asleep: str, verb: JobVerb, error: MvmError
) -> None:
    job = node.submit(V.INSTANCE_WAKE, asleep)
    with instead(node.host.vmm, "restore", Killed()), pytest.raises(Killed):
        node.services.runner.run(job)
    with refused(node, asleep, error):
        node.fails(error.code, verb, asleep)
        assert node.services.runner.run(job).state is JobState.FAILED
        node.sweep(V.SWEEP_STALE_PIDS)
    assert node.instance(asleep).status is Status.SLEEPING
    assert node.ok(V.INSTANCE_WAKE, asleep)["status"] == "running"


def test_a_forced_start_ends_what_a_killed_wake_left(node: Node, asleep: str) -> None:
    ref = InstanceRef.parse(asleep)
    job = node.submit(V.INSTANCE_WAKE, asleep)
    with instead(node.host.guest, "wake", Killed()), pytest.raises(Killed):
        node.services.runner.run(job)
    (woken,) = node.host.vmm.processes()[ref]
    with refused(node, asleep, MOVED):
        node.ok(V.INSTANCE_START, asleep, force=True)
    assert node.host.vmm.processes()[ref] != (woken,)
