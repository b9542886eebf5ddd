"""Foreign messages harm nothing: whatever somebody puts into a queue, the worker lives and its jobs count no death."""

from __future__ import annotations

import base64
import json
import os
import pickle
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest

from mvm.domain.job import JobState, JobVerb
from mvm.domain.messages import MAX_BYTES
from mvm.drivers.celery_queue import task_message
from tests.celery.alone import NODE, OneNode, one_node
from tests.support.waiting import until

pytestmark = [pytest.mark.redis, pytest.mark.timeout(300)]
QUEUE = "node.n1"


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OneNode]:
    with one_node(tmp_path_factory.mktemp("foreign")) as node:
        yield node


def good(node: OneNode, **headers: Any) -> dict[str, Any]:
    job = node.jobs.new(JobVerb.TENANT_CREATE, "never", NODE, actor="test")
    message = task_message(job)
    message["headers"].update(headers)
    return message


def body(value: object) -> str:
    return base64.b64encode(json.dumps(value).encode()).decode()


def changed(node: OneNode, part: str, **values: Any) -> dict[str, Any]:
    message = good(node)
    message[part] = {**message[part], **values}
    return message


def foreign(node: OneNode) -> list[bytes]:
    """Of every kind; each is of no job."""
    afterwards = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
    shapes: list[Any] = [
        {},
        [],
        5,
        "text",
        None,
        {"body": "", "headers": {}, "properties": {}},
        {"headers": [], "properties": []},
        {**good(node), "headers": None},
        {**good(node), "properties": None},
        {**good(node), "body": None},
        {**good(node), "body": 7},
        {k: v for k, v in good(node).items() if k != "properties"},
        changed(node, "properties", delivery_tag=None),
        changed(node, "properties", delivery_info=None),
        changed(node, "properties", delivery_info={"exchange": None, "routing_key": 5}),
        changed(node, "properties", body_encoding="rot13"),
        changed(node, "properties", priority="high"),
        good(node, task=None),
        good(node, task="os.system"),
        good(node, task="celery.backend_cleanup"),
        good(node, id=None),
        good(node, id={"$": 1}),
        good(node, eta="tomorrow"),
        good(node, expires=[1]),
        good(node, timelimit=5),
        good(node, retries="many"),
        good(node, stamped_headers=5),
        good(node, shadow=[1]),
        good(node, compression="zlib"),
        good(node, group=[]),
        {
            **good(node),
            "content-type": "application/x-python-serialize",
            "content-encoding": "binary",
            "body": base64.b64encode(pickle.dumps(([], {}, {}))).decode(),
        },
        {**good(node), "content-encoding": "utf-7"},
        {**good(node), "content-type": "application/x-yaml"},
        {**good(node), "body": "!!! no base64"},
        {**good(node), "body": body({"args": []})},
        {**good(node), "body": body([[], {}])},
        {**good(node), "body": body([{}, [], afterwards])},
        {**good(node), "body": body([[], {}, {**afterwards, "chain": "x"}])},
        {**good(node), "body": base64.b64encode(b"[" * 100_000).decode()},
        {**good(node), "body": base64.b64encode(b'[[], {"subject": "\\ud800"}, {}]').decode()},
        {"task": "mvm.tenant.create", "id": str(uuid4()), "args": [], "kwargs": {}},  # protocol 1
    ]
    texts = [
        b"garbage{",
        b"",
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'"\\ud800"',
        pickle.dumps({"a": 1}),
        b"1" * 5000,
        b'{"x":"' + b"a" * MAX_BYTES + b'"}',
    ]
    return texts + [json.dumps(shape).encode() for shape in shapes]


def test_no_kind_of_foreign_message_ends_the_worker_or_counts_a_death(node: OneNode) -> None:
    ref, pid = node.instance(), node.main._container.pid
    kinds = foreign(node)
    before = node.link.command("LLEN", "mvm:foreign")
    with node.held(f"instance {ref}"):
        busy = node.jobs.submit(JobVerb.INSTANCE_START, ref, NODE, actor="test")
        until(lambda: node.job(busy).state is JobState.RUNNING, 60, "a job is in flight")
        for raw in kinds:
            node.link.command("LPUSH", QUEUE, raw)
        until(lambda: not node.link.command("LLEN", QUEUE), 60, "all are taken")
        after = node.jobs.submit(JobVerb.TENANT_UPDATE, "acme", NODE, actor="test")
        assert node.ended(after).state is JobState.SUCCEEDED
    done = node.ended(busy)
    assert (done.state, done.deaths, done.attempt) == (JobState.SUCCEEDED, 0, 1)
    assert (node.main._container.status, node.main._container.pid) == ("running", pid)
    notes = [json.loads(raw) for raw in node.link.command("LRANGE", "mvm:foreign", 0, -1)]
    assert len(notes) - before == len(kinds), "each is set aside once"
    assert {note["queue"] for note in notes} == {QUEUE}
    assert node.main.logs().count("foreign message set aside") == len(kinds), "and said once"
    until(lambda: not node.link.command("HLEN", "mvm:unacked:n1:main"), 20, "nothing is left unacknowledged")
    assert "Traceback" not in node.main.logs()


@pytest.mark.parametrize("data", [b"garbage{", b"{}", b"[]", b"5", b'{"properties": {}}', b'{"body": "x"}'])
def test_a_foreign_broadcast_ends_no_worker(node: OneNode, data: bytes) -> None:
    pid = node.main._container.pid
    heard = node.link.command("PUBLISH", "/0.celery.pidbox", data)
    assert heard == 2, "both workers"
    assert "2 nodes online" in node.celery("inspect", "ping").stdout
    assert (node.main._container.status, node.main._container.pid) == ("running", pid)


def test_what_lies_among_the_unacknowledged_ends_no_successor(node: OneNode) -> None:
    for n, raw in enumerate((b"garbage{", b"[]", b"[1, 2, 3]", b'[{"body": 5}, "", "node.n1"]')):
        node.link.command("HSET", "mvm:unacked:n1:main", f"tag{n}", raw)
        node.link.command("ZADD", "mvm:unacked_index:n1:main", 1, f"tag{n}")
    until(lambda: not node.link.command("HLEN", "mvm:unacked:n1:main"), 30, "they are set aside as they are due")
    node.link.command("HSET", "mvm:unacked:n1:main", "tag9", b"garbage{")
    node.main._container.kill()
    node.main._container.start()
    until(lambda: not node.link.command("HLEN", "mvm:unacked:n1:main"), 60, "the next worker finds it")
    node.ok(JobVerb.TENANT_UPDATE, "acme")


def test_garbage_in_the_queue_of_a_dead_worker_hides_no_job(node: OneNode) -> None:
    node.main._container.kill()
    waiting = node.jobs.submit(JobVerb.TENANT_UPDATE, "acme", NODE, actor="test")
    for raw in (b"garbage{", b"{}", b"[]", json.dumps(good(node, id="x")).encode()):
        node.link.command("LPUSH", QUEUE, raw)
    assert node.jobs.queued(NODE) == {waiting.job_id}
    assert node.jobs.send_lost(NODE, older_than_s=0) == []
    node.main._container.start()
    assert node.ended(waiting).state is JobState.SUCCEEDED


def call(node: OneNode, task: str, args: list[Any], kwargs: dict[str, Any], task_id: str | None = None) -> str:
    """A task as a program sends it that knows Celery and nothing of mvm."""
    task_id = task_id or str(uuid4())
    message = good(node, task=task, id=task_id, root_id=task_id, ignore_result=False, origin=f"{os.getpid()}@elsewhere")
    message["body"] = body([args, kwargs, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}])
    node.link.command("LPUSH", QUEUE, json.dumps(message))
    return task_id


@pytest.mark.parametrize(
    ("task", "args", "kwargs", "says"),
    [
        ("mvm.tenant.create", [], {}, "its subject alone"),
        ("mvm.tenant.create", ["Acme"], {}, "is not the id of a tenant"),
        ("mvm.tenant.create", [{"a": 1}], {}, "its subject alone"),
        ("mvm.tenant.create", ["new", "other"], {}, "its subject alone"),
        ("mvm.tenant.create", ["new"], {"net_id": "7"}, "$.net_id"),
        ("mvm.tenant.create", ["new"], {"colour": "red"}, "$.colour"),
        ("mvm.pool.create", ["acme/new"], {}, "$.flake_ref: is missing"),
        ("mvm.instance.start", ["acme/web/i-00000000"], {"node": "n2"}, "is for node n2"),
        ("mvm.sweep.orphans", ["n1"], {}, "Beat does"),
        ("mvm.tenant.create", [], {"submitted_at": "now", "subject": "x", "node": "n1"}, "is damaged"),
    ],
)
def test_foreign_arguments_are_refused_and_who_waits_is_told(
    node: OneNode, task: str, args: list[Any], kwargs: dict[str, Any], says: str
) -> None:
    task_id = call(node, task, args, kwargs)
    until(lambda: node.jobs.refusal(task_id) is not None, 30, "it is refused")
    assert says in str(node.jobs.refusal(task_id))
    assert task_id not in [job.job_id for job in node.jobs.list(limit=1000)]


def test_an_id_that_no_job_has_is_refused(node: OneNode) -> None:
    call(node, "mvm.tenant.create", ["new"], {}, task_id="my-own-id")
    until(lambda: node.jobs.refusal("my-own-id") is not None, 30, "it is refused")


def test_a_task_sent_by_another_program_becomes_a_job(node: OneNode) -> None:
    task_id = call(node, "mvm.tenant.create", ["sent"], {"net_id": 77})
    until(lambda: any(job.job_id == task_id for job in node.jobs.list(subject="sent")), 30, "it is listed")
    done = node.ended(task_id)
    assert (done.state, done.actor, (done.result or {})["net_id"]) == (JobState.SUCCEEDED, "celery", 77)
