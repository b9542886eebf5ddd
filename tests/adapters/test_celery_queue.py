"""Our Celery messages against Celery's own."""

from __future__ import annotations

import base64
import json
import warnings
from datetime import UTC, datetime
from typing import Any

import pytest

from mvm.domain.ids import JobId, NodeId
from mvm.domain.job import Job, JobVerb, Lane, Reason
from mvm.drivers.celery_queue import CeleryQueue, queue_key, task_kwargs
from mvm.drivers.redis_link import RedisLink
from mvm.errors import Unreachable
from tests.support.redis_server import RedisServer

NOW = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)


def a_job(lane: Lane = Lane.NORMAL, **changes: Any) -> Job:
    job_id = JobId("j-0193583f6c2a-9f3b7c21d4")
    return Job(
        job_id, JobVerb.INSTANCE_START, "acme/web/i-7f2c91ab", NodeId("n1"), "root", Reason.MANUAL, NOW, lane=lane
    ).with_(**changes)


@pytest.mark.redis
@pytest.mark.parametrize("lane", list(Lane))
def test_a_message_is_what_celery_would_send(redis_server: RedisServer, lane: Lane) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from celery import Celery
        from kombu import Queue
    link = RedisLink(redis_server.url, code="x")
    job = a_job(lane)
    CeleryQueue(link).send([job])
    ours = json.loads(link.command("RPOP", queue_key(job)))
    app = Celery("t", broker=f"redis+socket://{redis_server.socket}")
    name = "node.n1.urgent" if lane is Lane.URGENT else "node.n1"
    app.conf.task_queues = [Queue(name)]
    priority = {Lane.URGENT: 0, Lane.NORMAL: 3, Lane.BULK: 9}[lane]
    app.send_task(
        "mvm.instance.start", kwargs=task_kwargs(job), task_id=job.job_id, queue=name, priority=priority,
        ignore_result=True,
    )  # fmt: skip
    raw = link.command("RPOP", queue_key(job))
    assert raw is not None, "Celery put its message elsewhere"
    theirs = json.loads(raw)
    assert json.loads(base64.b64decode(ours["body"])) == json.loads(base64.b64decode(theirs["body"]))
    assert ours.keys() == theirs.keys()
    assert ours["properties"].keys() == theirs["properties"].keys() - {"expiration"}
    assert ours["properties"]["priority"] == theirs["properties"]["priority"]
    varying = {"kwargsrepr", "argsrepr", "origin"}
    assert {k: v for k, v in ours["headers"].items() if k not in varying} == {
        k: v for k, v in theirs["headers"].items() if k not in varying
    }
    app.close()
    link.close()


def test_no_broker_is_a_clear_error(tmp_path: Any) -> None:
    link = RedisLink(f"unix://{tmp_path}/none.sock", code="broker.unreachable")
    with pytest.raises(Unreachable) as caught:
        CeleryQueue(link).send([a_job()])
    assert caught.value.code == "broker.unreachable"
    assert "none.sock" in caught.value.message


@pytest.mark.redis
def test_what_waits_in_a_nodes_queues_is_known(redis_server: RedisServer) -> None:
    link = RedisLink(redis_server.url, code="x")
    queue = CeleryQueue(link)
    jobs = [a_job(lane, job_id=JobId(f"j-0193583f6c2a-{n:010x}")) for n, lane in enumerate(Lane)]
    elsewhere = a_job(node_id=NodeId("n10"))
    queue.send([*jobs, elsewhere])
    assert queue.queued(NodeId("n1")) == {job.job_id for job in jobs}
    link.close()
