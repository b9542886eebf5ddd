"""What may arrive in a queue, and what may be asked for: any value is read, or refused with its reason."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvm.domain.calls import WORDS, read_call
from mvm.domain.canvas import canvas_of
from mvm.domain.job import JobVerb, Lane
from mvm.domain.messages import ForeignMessage, read_envelope, read_task
from mvm.drivers.celery_queue import task_message
from mvm.errors import InvalidInput
from tests.support import make
from tests.support.strategies import json_objects

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("node.n1"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
TASKS = {verb.task_name for verb in JobVerb}


def message() -> dict[str, Any]:
    made = task_message(make.job())
    return json.loads(json.dumps(made))  # type: ignore[no-any-return]


def test_a_message_of_ours_is_taken() -> None:
    ours = message()
    assert read_task(json.dumps(ours).encode(), TASKS) == ours


@given(st.binary(max_size=40))
def test_bytes_are_read_or_foreign(raw: bytes) -> None:
    with pytest.raises(ForeignMessage):
        read_task(raw, TASKS)


@given(part=st.sampled_from(["headers", "properties", None]), name=st.data(), value=values)
def test_a_message_with_any_value_in_any_field_is_read_or_foreign(part: str | None, name: Any, value: Any) -> None:
    changed = message()
    fields = changed if part is None else changed[part]
    field = name.draw(st.sampled_from(sorted(fields)))
    fields[field] = value
    raw = json.dumps(changed).encode()
    for reader in (lambda: read_task(raw, TASKS), lambda: read_envelope(raw)):
        with suppress(ForeignMessage):
            reader()


@given(verb=st.sampled_from(sorted(JobVerb)), args=st.lists(values, max_size=3), kwargs=json_objects)
def test_any_arguments_are_a_job_or_refused(verb: JobVerb, args: list[Any], kwargs: dict[str, Any]) -> None:
    try:
        call = read_call(verb, args, kwargs)
    except InvalidInput:
        return
    assert call.verb in WORDS
    json.dumps(dict(call.params))


def test_what_a_chain_hands_over_is_left_aside() -> None:
    for before in ({"ref": "x"}, [1], None):
        assert read_call(JobVerb.INSTANCE_START, [before, "acme/web/i-7f2c91ab"], {}).subject == "acme/web/i-7f2c91ab"
        assert read_call(JobVerb.TENANT_CREATE, [before], {"subject": "acme"}).subject == "acme"


def test_words_are_params_and_some_are_the_callers() -> None:
    call = read_call(
        JobVerb.INSTANCE_STOP, ["acme/web/i-7f2c91ab"], {"force": True, "lane": "bulk", "actor": "me", "node": "n2"}
    )
    assert (call.params, call.lane, call.actor, call.node) == ({"force": True}, Lane.BULK, "me", "n2")
    assert read_call(JobVerb.INSTANCE_CREATE, ["acme/web"], {"params": {"count": 3}}).params == {"count": 3}


def test_a_job_by_itself_has_no_canvas_and_a_bulk_jobs_child_neither() -> None:
    assert canvas_of({"root_id": "a", "parent_id": None, "chain": [], "group": None}, "a", None) is None
    assert canvas_of({"root_id": "p", "parent_id": "p"}, "a", "p") is None
    assert canvas_of({"root_id": "r", "parent_id": "q", "chain": [{}]}, "a", None) == {
        "root_id": "r",
        "parent_id": "q",
        "chain": [{}],
    }
