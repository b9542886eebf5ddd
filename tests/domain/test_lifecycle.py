from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from mvm.domain.lifecycle import TRANSITIONS, Status, Verb, allowed_verbs, landing
from mvm.errors import NotAllowed

ALL = [(status, verb) for status in Status for verb in Verb]


@given(st.sampled_from(Status), st.sampled_from(Verb))
def test_the_table_decides(status: Status, verb: Verb) -> None:
    if (status, verb) in TRANSITIONS:
        assert landing(status, verb) is TRANSITIONS[status, verb]
        assert verb in allowed_verbs(status)
    else:
        assert verb not in allowed_verbs(status)
        with pytest.raises(NotAllowed) as refused:
            landing(status, verb, "acme/web/i-7f2c91ab")
        error = refused.value
        assert error.code == "instance.invalid_transition"
        assert error.message == f"acme/web/i-7f2c91ab is {status} and cannot {verb}"
        assert error.hint == f"allowed now: {', '.join(allowed_verbs(status)) or 'nothing'}"


def test_nothing_leaves_destroyed() -> None:
    assert allowed_verbs(Status.DESTROYED) == ()


@pytest.mark.parametrize("status", [s for s in Status if s is not Status.DESTROYED])
def test_everything_else_can_be_destroyed(status: Status) -> None:
    assert landing(status, Verb.DESTROY) is Status.DESTROYED


def test_what_holds_a_run_can_be_stopped_and_what_does_not_run_can_be_started() -> None:
    stoppable = {status for status in Status if (status, Verb.STOP) in TRANSITIONS}
    startable = {status for status in Status if (status, Verb.START) in TRANSITIONS}
    assert stoppable == {Status.RUNNING, Status.WARM, Status.SLEEPING}
    assert startable == set(Status) - {Status.RUNNING, Status.DESTROYED}, "warm and sleeping ones start by waking"


def test_a_verb_lands_in_one_place() -> None:
    for verb in Verb:
        assert len({to for (_, asked), to in TRANSITIONS.items() if asked is verb}) == 1


def test_every_status_but_created_is_reached() -> None:
    assert set(TRANSITIONS.values()) == set(Status) - {Status.CREATED}


def test_the_table_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        TRANSITIONS[Status.CREATED, Verb.STOP] = Status.STOPPED  # type: ignore[index]


class Life(RuleBasedStateMachine):
    """Whatever is asked in whatever order: refusals change nothing, and there is always a way to run or the end."""

    def __init__(self) -> None:
        super().__init__()
        self.status = Status.CREATED

    @rule(verb=st.sampled_from(Verb))
    def ask(self, verb: Verb) -> None:
        before = self.status
        try:
            self.status = landing(before, verb)
        except NotAllowed:
            assert self.status is before
        else:
            assert self.status is not before
            assert before is not Status.DESTROYED

    @invariant()
    def it_can_come_to_run_unless_destroyed(self) -> None:
        seen, todo = {self.status}, [self.status]
        while todo:
            status = todo.pop()
            for verb in allowed_verbs(status):
                to = landing(status, verb)
                if to not in seen:
                    seen.add(to)
                    todo.append(to)
        assert (Status.RUNNING in seen) == (self.status is not Status.DESTROYED)


TestLife = Life.TestCase


def test_who_has_a_vmm() -> None:
    assert {status for status in Status if status.has_vmm} == {Status.RUNNING, Status.WARM}
    assert {status for status in Status if status.is_up} == {Status.RUNNING, Status.WARM, Status.SLEEPING}
