"""A Celery user's habits, with real workers: each as a program of its own that imports ``workers``."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from mvm.domain.job import JobState, JobVerb
from mvm.drivers.celery_queue import task_message
from tests.celery.alone import NODE, OneNode, one_node
from tests.celery.conftest import ROOT
from tests.support.waiting import until

pytestmark = [pytest.mark.redis, pytest.mark.timeout(300)]
PAGE = (ROOT / "docs" / "celery.md").read_text()
_START = """
import json
from workers.app import app
from workers.instances import create, sleep, start, stop, warm
"""


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OneNode]:
    with one_node(tmp_path_factory.mktemp("users")) as node:
        yield node


def examples(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_every_example_of_the_page_runs(node: OneNode) -> None:
    sent = node.python("\n".join(examples("python")) + "\nimport json\nprint(json.dumps(sent.id))")
    until(lambda: node.jobs.find(sent) is not None, 60, "a worker has made a job of what was sent without mvm's app")
    assert node.ended(sent).state is JobState.SUCCEEDED
    shell = [line for block in examples("sh") for line in block.splitlines()]
    known = next(line.split()[-1] for line in shell if " result " in line)
    node.python(f"{_START}app.send_task('mvm.tenant.update', ['acme'], task_id={known!r})\nprint('true')")
    for line in shell:
        node.run(sys.executable, "-m", *shlex.split(line))


def test_what_the_page_lists_as_refused_is_refused_and_says_why(node: OneNode) -> None:
    ref = node.instance()
    told = node.python(f"""{_START}
from mvm.errors import MvmError
from workers.sweeps import orphans
told = {{}}
ref = {ref!r}
for name, ask in dict(
    countdown=lambda: start.apply_async((ref,), countdown=3600),
    eta=lambda: start.apply_async((ref,), eta="2100-01-01"),
    link_error=lambda: start.apply_async((ref,), link_error=stop.s(ref)),
    time_limit=lambda: start.apply_async((ref,), time_limit=5),
    soft=lambda: start.apply_async((ref,), soft_time_limit=5),
    priority=lambda: start.apply_async((ref,), priority=9), queue=lambda: start.apply_async((ref,), queue="celery"),
    serializer=lambda: start.apply_async((ref,), serializer="pickle"),
    compression=lambda: start.apply_async((ref,), compression="zlib"),
    task_id=lambda: start.apply_async((ref,), task_id="mine"), direct=lambda: start(ref),
    eager=lambda: start.apply((ref,)).get(), forget=lambda: app.AsyncResult(36 * "0").forget(),
    sweep=lambda: orphans.delay("n1"), subject=lambda: start.delay("acme"), none=lambda: start.delay(),
    word=lambda: start.delay(ref, colour="red"), kind=lambda: start.delay(ref, force="yes"),
    pool=lambda: create.delay("acme/ghost"), map=lambda: start.map([ref]).apply_async(),
    starmap=lambda: start.starmap([(ref,)]).apply_async(), chunks=lambda: start.chunks([(ref,)], 1).apply_async(),
).items():
    try:
        ask()
        told[name] = "accepted"
    except MvmError as error:
        told[name] = error.code
print(json.dumps(told))
""")
    option = dict.fromkeys(
        (
            "countdown",
            "eta",
            "link_error",
            "time_limit",
            "soft",
            "priority",
            "queue",
            "serializer",
            "compression",
            "map",
            "starmap",
            "chunks",
        ),
        "job.option_refused",
    )
    arguments = dict.fromkeys(("sweep", "none", "word", "kind"), "job.invalid_arguments")
    assert told == option | arguments | {
        "task_id": "job.invalid_id",
        "direct": "job.called_directly",
        "eager": "job.called_directly",
        "forget": "job.read_only",
        "subject": "instance.invalid_ref",
        "pool": "pool.not_found",
    }
    assert [job.verb for job in node.jobs.list(subject=ref)] == [], "nothing was recorded"


def test_an_id_is_one_jobs_whatever_is_asked_by_it_later(node: OneNode) -> None:
    node.instance()
    told = node.python("""
import json, uuid
from mvm.errors import NotAllowed
from workers.tenants import destroy, update
used, told = str(uuid.uuid4()), []
for task, most in ((update, 31), (update, 32), (destroy, 0), (update, 31)):
    words = {"quota": {"max_running": most}} if most else {}
    try:
        done = task.apply_async(("acme",), words, task_id=used).get(timeout=60)
        told.append(done["quota"]["max_running"])
    except NotAllowed as error:
        told.append(error.code)
print(json.dumps(told))
""")
    assert told == [31, "job.id_used", "job.id_used", 31], "the same is asked for again, and told again"


def test_a_called_task_is_a_job_with_celerys_id(node: OneNode) -> None:
    ref = node.instance()
    told = node.python(f"""{_START}
import getpass
result = start.apply_async(kwargs={{"subject": {ref!r}}})
value = result.get(timeout=60)
print(json.dumps([result.id, result.state, value["ref"], app.AsyncResult(result.id).state, getpass.getuser()]))
""")
    job = node.job(told[0])
    assert told[1:4] == ["SUCCESS", ref, "SUCCESS"]
    assert (job.verb, job.actor, job.state) == (JobVerb.INSTANCE_START, told[4], JobState.SUCCEEDED)
    assert told[0] in [each.job_id for each in node.jobs.list(subject=ref)]
    later = node.jobs.submit(JobVerb.INSTANCE_STOP, ref, NODE, actor="test")
    assert [each.job_id for each in node.jobs.list(subject=ref)][:2] == [later.job_id, told[0]], "newest first"


def test_states_are_celerys(node: OneNode) -> None:
    ref = node.instance()
    ask = f"{_START}print(json.dumps(app.AsyncResult(ID).state))"
    with node.held(f"instance {ref}"):
        runs = node.jobs.submit(JobVerb.INSTANCE_START, ref, NODE, actor="test")
        until(lambda: node.job(runs).state is JobState.RUNNING, 60, "it has begun")
        assert node.python(ask.replace("ID", repr(str(runs.job_id)))) == "STARTED"
    later = node.python(f"""{_START}
result = stop.apply_async(({ref!r},), countdown=100)
before = result.state
result.revoke()
try:
    result.get(timeout=60)
except Exception as error:
    print(json.dumps([before, result.state, [kind.__name__ for kind in type(error).__mro__]]))
""")
    assert later[:2] == ["PENDING", "REVOKED"]
    assert {"TaskRevokedError", "Cancelled"} <= set(later[2])


def test_waiting_for_a_job_that_does_not_exist_ends_and_says_so(node: OneNode) -> None:
    node.instance()
    for unknown in ("j-000000000000-0000000000", "11111111-2222-4333-8444-555555555555"):
        told = node.celery("result", unknown, check=False)
        assert told.returncode != 0
        assert f"there is no job {unknown}" in told.stderr.splitlines()[-1]
        program = f"{_START}result = app.AsyncResult({unknown!r})\n"
        assert node.python(f"{program}print(json.dumps(result.state))") == "PENDING", "Celery's word for it"
        looked = node.celery("inspect", "--json", "query_task", unknown)
        assert set(map(str, json.loads(looked.stdout).values())) == {"{}"}


def test_what_may_become_a_job_yet_is_waited_for(node: OneNode) -> None:
    """A later link of a chain, a chord's body and what another program has sent, while a worker has no hand free."""
    ref, other = node.instance(), node.instance()
    with node.held(f"instance {ref}"):
        says = node.python(f"""{_START}
from celery import Celery, chain, chord
from celery.exceptions import TimeoutError
from mvm.settings import load_settings
settings = load_settings()
plain = Celery("plain", broker=settings.broker, set_as_current=False)
plain.conf.broker_transport_options = {{"sep": ":"}}
busy = [start.delay({ref!r}) for _ in range(6)]
waited = [
    chain(start.si({ref!r}), stop.si({ref!r}), start.si({ref!r})).apply_async(),
    chord([start.si({other!r}), stop.si({ref!r})], stop.si({other!r})).apply_async(),
    plain.send_task("mvm.instance.create", ["acme/web"], queue=f"node.{{settings.node}}"),
]
app.backend.unheard_of_s = 0.5
says = []
for result in waited:
    try:
        app.AsyncResult(result.id).get(timeout=2)
    except Exception as error:
        says.append(type(error).__name__)
print(json.dumps(says))
""")
    assert set(says) == {"TimeoutError"}


def test_what_follows_a_broken_link_is_told_so(node: OneNode) -> None:
    ref = node.instance()
    ids, says = node.python(f"""{_START}
from celery import chain, chord
from mvm.errors import MvmError
def said(result):
    try:
        result.get(timeout=60)
    except MvmError as error:
        return error.code
    except Exception as error:
        return type(error).__name__
broken = chain(start.s({ref!r}), start.s({ref!r}), stop.s({ref!r}), start.s({ref!r})).apply_async()
links = [broken, broken.parent, broken.parent.parent, broken.parent.parent.parent]
ids = [link.id for link in links]
says = [said(app.AsyncResult(id)) for id in ids]
joined = chord([start.s({ref!r})], stop.s({ref!r})).apply_async()
print(json.dumps([ids, says + [said(app.AsyncResult(joined.id))]]))
""")
    assert says == ["job.chain_broken", "job.chain_broken", "instance.invalid_transition", None, "job.chain_broken"]
    assert [node.jobs.find(i) is not None for i in ids] == [False, False, True, True]
    first, second = node.job(ids[3]), node.job(ids[2])
    assert (second.canvas or {})["parent_id"] == first.job_id
    assert (second.canvas or {})["root_id"] == first.job_id


def test_a_link_that_was_cancelled_breaks_its_chain(node: OneNode) -> None:
    ref = node.instance()
    with node.held(f"instance {ref}"):
        first, last = node.python(f"""{_START}
from celery import chain
last = chain(start.si({ref!r}), stop.si({ref!r})).apply_async()
print(json.dumps([last.parent.id, last.id]))
""")
        until(lambda: node.job(first).state is JobState.RUNNING, 60, "it has begun")
        node.jobs.cancel(node.job(first).job_id)
    until(lambda: node.jobs.refusal(last) is not None, 60, "the next link is told")
    assert node.jobs.find(last) is None  # type: ignore[arg-type]


def test_a_chain_outlives_the_death_of_the_worker(node: OneNode) -> None:
    """What Celery joined to a job is with it when it is sent again."""
    ref = node.instance()
    with node.held(f"instance {ref}"):
        first, last = node.python(f"""{_START}
from celery import chain
last = chain(start.si({ref!r}), stop.si({ref!r})).apply_async()
print(json.dumps([last.parent.id, last.id]))
""")
        until(lambda: node.job(first).state is JobState.RUNNING, 60, "it has begun")
        node.main._container.kill()
        node.link.command("DEL", "mvm:unacked:n1:main", "mvm:unacked_index:n1:main")  # and its message is lost
        node.jobs.send_again([node.job(first)])
        node.main._container.start()
    until(lambda: node.jobs.find(last) is not None, 60, "the next link is asked for")  # type: ignore[arg-type]
    assert node.ended(last).state is JobState.SUCCEEDED
    assert node.job(first).deaths == 1


def test_flower_is_told_of_tries_parent_and_root(node: OneNode) -> None:
    """By the events that it shows: a link's, a bulk job's child's, and that of a further try."""
    refs = [node.instance(), node.instance()]
    bulk = node.jobs.submit_bulk(JobVerb.INSTANCE_START, refs, lambda _: NODE, actor="test")
    child = node.jobs.children(bulk.job_id)[0]
    headers = task_message(child.with_(attempt=2))["headers"]
    assert (headers["root_id"], headers["parent_id"], headers["retries"]) == (bulk.job_id, bulk.job_id, 2)
    assert node.ended(bulk).state is JobState.SUCCEEDED
    told = node.python(f"""{_START}
import threading
from celery import chain
seen, done = [], threading.Event()
def receive():
    with app.connection_for_read() as connection:
        def each(event):
            seen.append(event)
            if sum(e["type"] == "task-succeeded" for e in seen) == 2:
                receiver.should_stop = True
        receiver = app.events.Receiver(connection, handlers={{"task-received": each, "task-succeeded": each}})
        ready.set()
        receiver.capture(limit=None, timeout=60)
ready = threading.Event()
thread = threading.Thread(target=receive)
thread.start()
ready.wait(30)
import time
while not app.connection_for_read().default_channel.client.pubsub_numpat():
    time.sleep(0.05)
last = chain(stop.si({refs[0]!r}), start.si({refs[0]!r})).apply_async()
last.get(timeout=60)
thread.join(60)
got = {{e["uuid"]: e for e in seen if e["type"] == "task-received"}}
print(json.dumps([last.id, last.parent.id, got]))
""")
    last, first, events = told
    assert (events[last]["root_id"], events[last]["parent_id"], events[last]["retries"]) == (first, first, 0)
    assert events[first]["root_id"] == first


def test_before_task_publish_is_sent_for_messages_of_the_command_line(node: OneNode) -> None:
    told = node.python("""
import json
from celery import signals
from mvm.domain.job import JobVerb
from workers.app import app
seen = []
@signals.before_task_publish.connect
def mark(sender=None, headers=None, body=None, routing_key=None, **_):
    headers["shadow"] = "marked"
    seen.append(["before", sender, headers["id"], routing_key, body[1]["subject"]])
@signals.after_task_publish.connect
def after(sender=None, headers=None, **_):
    seen.append(["after", sender, headers["id"]])
job = app.jobs.submit(JobVerb.TENANT_UPDATE, "acme", app._mvm_settings.node, actor="me")
print(json.dumps([job.job_id, seen]))
""")
    assert told[1] == [
        ["before", "mvm.tenant.update", told[0], "node.n1", "acme"],
        ["after", "mvm.tenant.update", told[0]],
    ]
    node.ended(told[0])
    assert task_message(node.job(told[0]))["headers"]["shadow"] is None, "in that process alone"


def test_remote_control_looks_at_workers(node: OneNode) -> None:
    def said(*words: str) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(node.celery("inspect", "--json", *words).stdout)
        return answer

    assert said("ping").keys() == {"main@n1", "urgent@n1"}
    queues = said("active_queues")
    assert [(q["name"], q["routing_key"]) for q in queues["main@n1"]] == [("node.n1", "node.n1")]
    assert "mvm.instance.start" in said("registered")["main@n1"]
