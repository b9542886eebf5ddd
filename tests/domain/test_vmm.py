"""How a run ended, and what a pool makes of that."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mvm.domain.actions import Create, Request, Why
from mvm.domain.lifecycle import Status, Verb
from mvm.domain.remarks import Cause
from mvm.domain.room import Room
from mvm.domain.scaling import revived, scale
from mvm.domain.tenant import Quota
from mvm.domain.vmm import PANIC, Ending, OnExit, VmmState, ending, ending_of, has_room
from tests.domain.test_scaling import NETWORK, SHAPE, START, WEB, instance, need

HALTED = replace(instance(1, Status.STOPPED), last_error="it halted", ended=Ending.HALTED)
REBOOTED = replace(instance(2, Status.STOPPED), last_error="it rebooted", ended=Ending.REBOOTED)
SPARE = instance(0, Status.STOPPED, age=9)


@pytest.mark.parametrize(
    ("reason", "console", "told", "how"),
    [
        ("guest-shutdown", "", True, Ending.HALTED),
        ("guest-reset", "reboot: Restarting system", True, Ending.REBOOTED),
        ("guest-reset", f"{PANIC}: sysrq\nKernel Offset: disabled", True, Ending.PANICKED),
        ("guest-panic", "", True, Ending.PANICKED),
        ("host-signal", "reboot: Power down", True, Ending.TERMINATED),
        ("something new", "", True, Ending.CRASHED),
        (None, "reboot: Power down", True, Ending.CRASHED),  # a guest's word, where the VMM would have said so
        (None, "[ 6.3] reboot: Power down\n", False, Ending.HALTED),  # a VMM of before
        (None, "[ 6.3] reboot: Restarting system", False, Ending.REBOOTED),
        (None, "reboot: Power down\nand on it goes", False, Ending.CRASHED),
        (None, "", False, Ending.CRASHED),
    ],
)
def test_the_vmms_word_comes_first(reason: str | None, console: str, told: bool, how: Ending) -> None:
    assert ending(reason, console, told=told) is how


def test_each_state_that_is_over_has_an_ending_and_none_goes_on() -> None:
    for state in VmmState:
        assert not (state.over and state.stands_still)
        if state.over:
            assert ending_of(state) in Ending
    assert (has_room(0), has_room(1 << 30)) == (False, True)


def decided(on_exit: OnExit, running: int, *observed: object) -> tuple[object, ...]:
    room = Room.of(Quota(), NETWORK, {WEB: SHAPE}, observed)  # type: ignore[arg-type]
    return scale(need(running, on_exit=on_exit), observed, room, now=START).actions  # type: ignore[arg-type]


def test_one_that_rebooted_starts_before_an_older_spare_one() -> None:
    assert decided(OnExit.RESTART, 1, SPARE, REBOOTED) == (
        Request(REBOOTED.ref, Verb.START, Status.STOPPED, Why.REBOOTED),
    )


def test_what_rests_fills_a_place_and_takes_none_from_one_that_runs() -> None:
    runs = instance(3, Status.RUNNING)
    assert decided(OnExit.STOP, 1, HALTED) == ()
    assert decided(OnExit.STOP, 1, HALTED, runs) == ()
    assert decided(OnExit.STOP, 3, HALTED, REBOOTED) == (Create(WEB, 1),)
    crashed = replace(HALTED, ended=Ending.CRASHED)
    assert decided(OnExit.STOP, 1, crashed) == (Request(crashed.ref, Verb.START, Status.STOPPED, Why.TOO_FEW),)


def test_that_some_rest_is_told() -> None:
    room = Room.of(Quota(), NETWORK, {WEB: SHAPE}, [HALTED])
    scaled = scale(need(1, on_exit=OnExit.STOP), [HALTED], room, now=START)
    assert [(remark.cause, remark.count) for remark in scaled.remarks] == [(Cause.RESTED, 1)]


def test_without_counts_only_those_start_that_rebooted() -> None:
    room = Room.of(Quota(), NETWORK, {WEB: SHAPE}, [])
    asked = revived([HALTED, REBOOTED, SPARE], SHAPE, room, now=START)
    assert asked == (Request(REBOOTED.ref, Verb.START, Status.STOPPED, Why.REBOOTED),)
