"""Celery's remote control over jobs: what it ends, ends; and a worker that takes nothing is seen to take nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mvm.domain.job import JobState, JobVerb
from mvm.drivers.probes import Probes
from tests.celery.alone import NODE, OneNode, one_node
from tests.support.waiting import until

pytestmark = [pytest.mark.redis, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OneNode]:
    with one_node(tmp_path_factory.mktemp("control")) as node:
        yield node


def test_a_revoked_job_ends_as_cancelled_and_is_not_sent_again(node: OneNode) -> None:
    """With its message in the queue, and with it taken already."""
    ref = node.instance()
    node.celery("control", "cancel_consumer", "node.n1", "-d", "main@n1")
    waits = node.jobs.submit(JobVerb.TENANT_UPDATE, "acme", NODE, actor="test")
    assert "OK" in node.celery("control", "revoke", waits.job_id).stdout
    assert node.ended(waits).state is JobState.CANCELLED
    node.celery("control", "add_consumer", "node.n1", "-d", "main@n1")
    until(lambda: not node.jobs.queued(NODE), 30, "its message is taken")
    assert node.jobs.send_lost(NODE, older_than_s=0) == []
    assert node.job(waits).state is JobState.CANCELLED

    with node.held(f"instance {ref}"):
        runs = node.jobs.submit(JobVerb.INSTANCE_START, ref, NODE, actor="test")
        until(lambda: node.job(runs).state is JobState.RUNNING, 60, "it has begun")
        node.celery("control", "revoke", runs.job_id)
        assert node.job(runs).state is JobState.RUNNING, "what runs is left alone, as Celery does"
        node.celery("control", "terminate", "TERM", runs.job_id)
        assert node.jobs._registry.cancel_requested(runs.job_id)
    assert node.ended(runs).state is JobState.CANCELLED


def test_a_task_revoked_before_it_is_a_job_never_becomes_one(node: OneNode) -> None:
    task_id = "0b7e8f3e-6c1d-4a59-9d3a-2f4f0d7e3a11"
    node.celery("control", "revoke", task_id)
    node.run(
        sys.executable,
        "-c",
        f"""
from workers.tenants import create
from celery import Celery
other = Celery("other", broker={node.redis.host_url!r})
other.conf.broker_transport_options = {{"sep": ":", "priority_steps": [0]}}
other.send_task("mvm.tenant.create", ["early"], task_id={task_id!r}, queue="node.n1")
""",
    )
    until(lambda: not node.jobs.queued(NODE), 30, "its message is taken")
    until(lambda: node.jobs.refusal(task_id) is not None, 10, "whoever waits for it is told")
    assert node.jobs.find(task_id) is None  # type: ignore[arg-type]


def test_a_queue_that_is_not_consumed_is_seen(node: OneNode) -> None:
    probes = Probes(node.settings)
    for part, worker, queue in (("worker", "main", "node.n1"), ("urgent", "urgent", "node.n1.urgent")):
        assert probes.ask(part, {}).well
        node.celery("control", "cancel_consumer", queue, "-d", f"{worker}@n1")
        told = probes.ask(part, {}).note or ""
        assert told.startswith("takes nothing from its queue"), told
        node.run("sh", "-c", told.partition(": ")[2].replace("celery", f"{sys.executable} -m celery", 1))
        assert probes.ask(part, {}).well


def test_a_second_worker_of_a_role_is_refused(node: OneNode) -> None:
    for role, queue in (("main", "node.n1"), ("urgent", "node.n1.urgent")):
        argv = [
            sys.executable,
            "-m",
            "celery",
            "-A",
            "workers",
            "worker",
            "-n",
            f"{role}@n1",
            "-Q",
            queue,
            "-P",
            "threads",
            "-c",
            "1",
            "--without-gossip",
            "--without-mingle",
        ]
        done = node.run(*argv, check=False, MVM_WORKER_ROLE=role)
        assert done.returncode == 1, done.stderr
        assert "worker.already_running" in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
    assert node.instance(), "it takes jobs as before"
    assert (node.main._container.status, node.urgent._container.status) == ("running", "running")


def test_a_worker_of_another_state_directory_with_the_same_node_id_is_refused(node: OneNode, tmp_path: Path) -> None:
    """It would take over what the first one has in flight."""
    words = "worker -n main@n1 -Q node.n1 -P threads -c 1 --without-gossip --without-mingle"
    done = node.run(
        *(sys.executable, "-m", "celery", "-A", "workers", *words.split()),
        check=False,
        MVM_WORKER_ROLE="main",
        MVM_STATE_DIR=str(tmp_path),
    )
    assert done.returncode != 0, done.stderr
    assert "another state directory has a worker for n1:main" in done.stdout + done.stderr
    assert node.instance(), "it takes jobs as before"


def test_the_next_worker_of_a_role_starts_after_the_last_was_killed(node: OneNode) -> None:
    node.main._container.kill()
    node.main._container.start()
    assert node.instance(), "it takes jobs as before"
    assert node.main._container.status == "running"
