"""Requests over real connections: answers, errors, frames, streams, deadlines, many clients at once."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from base64 import b64decode, b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvm.agent.dispatch import UNSENT, Reply
from mvm.agent.endpoint import Endpoint
from mvm.agent.places import STREAMS
from mvm.drivers.quic import client, frames
from mvm.drivers.quic.client import QuicAgents
from mvm.drivers.quic.frames import MAX_FRAME, FrameReader, encode
from mvm.errors import Failed, Forbidden, InvalidInput, MvmError, QuotaExceeded, TimedOut, Unreachable
from tests.support.quic_agent import REF, Agent, coordinator, free_udp_port, make_certs, running_agent
from tests.support.waiting import until

EXEC = {"ref": REF, "command_b64": b64encode(b"echo \xff").decode(), "deadline_s": 30.0}
LASTING = {"ref": REF, "command_b64": b64encode(b"sleep").decode(), "deadline_s": 100.0}


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    with running_agent(make_certs(tmp_path)) as agent:
        yield agent
        agent.node.gate.set()


def call(agent: Agent, method: str, **params: Any) -> dict[str, Any]:
    return agent.agents.call(agent.address, method, params, deadline_s=10)


def test_every_method_answers(agent: Agent) -> None:
    agent.node.gate.set()
    assert call(agent, "node.ping") == {}
    assert call(agent, "node.info") == {"node_id": "node-a"}
    assert call(agent, "tenant.list") == {"items": [{"tenant_id": "acme"}]}
    assert call(agent, "pool.list", tenant="acme") == {"items": []}
    found = call(agent, "instance.list", tenant="acme", pool="acme/web", status="running")
    assert found["items"][2] == {"ref": "acme/web/i-00000002", "status": "running"}
    assert call(agent, "instance.info", ref=REF) == {"ref": REF}
    texts = list(agent.agents.stream(agent.address, "instance.logs", {"ref": REF}, deadline_s=10))
    assert texts == [{"text": "line\n"}]


def test_a_long_answer_comes_in_parts_and_is_joined(agent: Agent) -> None:
    agent.node.many = 5000
    items = call(agent, "instance.list")["items"]
    assert [item["ref"] for item in items] == [f"acme/web/i-{n:08x}" for n in range(5000)]
    agent.node.many = 0
    assert call(agent, "instance.list") == {"items": []}


def test_a_commands_output_comes_as_it_is_written(agent: Agent) -> None:
    parts = list(agent.agents.stream(agent.address, "instance.exec", EXEC, deadline_s=30))
    told = {"exit_code": 3, "truncated": True, "timed_out": False}
    assert parts[-1] == told
    for name, expected in (("stdout_b64", b"echo \xff" * 7), ("stderr_b64", b"e" * (1 << 20))):
        assert b"".join(b64decode(part[name], validate=True) for part in parts if name in part) == expected


@pytest.mark.parametrize(
    ("method", "params", "code", "field"),
    [
        ("node.reboot", {}, "agent.unknown_method", "method"),
        ("instance.info", {}, "agent.invalid_params", "ref"),
        ("instance.info", {"ref": 7}, "agent.invalid_params", "ref"),
        ("instance.info", {"ref": REF, "colour": "red"}, "agent.invalid_params", "colour"),
        ("instance.info", {"ref": "acme/web"}, "instance.invalid_ref", "instance"),
        ("instance.list", {"status": "asleep"}, "instance.invalid_status", "status"),
        ("instance.list", {"tenant": "No"}, "tenant.invalid_id", "tenant"),
        ("instance.exec", EXEC | {"deadline_s": -1}, "agent.invalid_params", "deadline_s"),
        ("instance.exec", EXEC | {"command_b64": ""}, "agent.invalid_params", "command_b64"),
        ("instance.exec", EXEC | {"command_b64": "ä"}, "agent.invalid_params", "command_b64"),
    ],
)
def test_bad_input_names_its_field(agent: Agent, method: str, params: dict[str, Any], code: str, field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        call(agent, method, **params)
    assert (caught.value.code, caught.value.fields["field"]) == (code, field)


def test_a_node_may_ask_for_node_info_and_nothing_else(agent: Agent) -> None:
    other = QuicAgents(agent.certs_dir, identity="node")
    assert other.call(agent.address, "node.info", {}, deadline_s=30) == {"node_id": "node-a"}
    before = list(agent.node.calls)
    for method in ("node.ping", "node.stats", "tenant.list", "pool.list", "instance.list", "instance.info",
                   "instance.exec", "instance.logs"):  # fmt: skip
        with pytest.raises(Forbidden) as caught:
            other.call(agent.address, method, {}, deadline_s=30)
        assert caught.value.code == "agent.forbidden"
    assert agent.node.calls == before


def test_a_defect_tells_the_client_nothing(agent: Agent, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(MvmError) as caught:
        call(agent, "node.stats")
    assert caught.value.code == "internal"
    assert "secret" not in str(caught.value.to_dict())
    assert str(caught.value.fields["request"]) in capsys.readouterr().out


BAD_REQUESTS = {
    "not JSON": ((5).to_bytes(4, "big") + b"hello", "agent.bad_frame"),
    "not an object": ((2).to_bytes(4, "big") + b"[]", "agent.bad_frame"),
    "nested without end": ((500_000).to_bytes(4, "big") + b"[" * 500_000, "agent.bad_frame"),
    "half a header": (b"\x00\x00", "agent.bad_frame"),
    "half a frame": (encode({"id": "1", "method": "node.ping", "params": {}})[:-1], "agent.bad_frame"),
    "nothing": (b"", "agent.bad_frame"),
    "two frames": (encode({"id": "1", "method": "node.ping", "params": {}}) * 2, "agent.bad_frame"),
    "too large": ((MAX_FRAME + 1).to_bytes(4, "big") + b"x" * 3_000_000, "agent.frame_too_large"),
    "no id": (encode({"method": "node.ping", "params": {}}), "agent.bad_request"),
    "an odd id": (encode({"id": "a b", "method": "node.ping", "params": {}}), "agent.bad_request"),
    "a member too many": (encode({"id": "1", "method": "node.ping", "params": {}, "x": 1}), "agent.bad_request"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_bad_request_is_answered_with_its_error(agent: Agent, name: str) -> None:
    data, code = BAD_REQUESTS[name]
    with closing(agent.connect(coordinator(agent.ca))) as connection, pytest.raises(InvalidInput) as caught:
        list(connection.request(data))
    assert caught.value.code == code
    assert call(agent, "node.ping") == {}
    assert agent.node.calls == []


def test_one_connection_serves_request_after_request(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    connect = client.open_connection
    monkeypatch.setattr(client, "open_connection", lambda *a, **k: (opened.append(a[0]), connect(*a, **k))[1])
    with agent.agents.connected(agent.address) as asked:
        for _ in range(20):
            assert asked.call("node.ping", {}, deadline_s=30) == {}
        assert len(opened) == 1
        with pytest.raises(InvalidInput):
            asked.call("instance.info", {"ref": 7}, deadline_s=30)
        assert asked.call("node.ping", {}, deadline_s=30) == {}


@pytest.mark.parametrize("goodbye", [True, False], ids=["closed", "forgotten"])
def test_a_connection_that_the_agent_does_not_know_any_more_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, goodbye: bool
) -> None:
    certs_dir, port = make_certs(tmp_path), free_udp_port()
    with running_agent(certs_dir, port=port) as first:
        asked = client.KeptConnection(first.address, lambda: first.connect(coordinator(first.ca)))
        assert asked.call("node.info", {}, deadline_s=30) == {"node_id": "node-a"}
        if not goodbye:  # as if it had been killed
            monkeypatch.setattr(Endpoint, "close", lambda self: self._transport.close())
    monkeypatch.undo()
    monkeypatch.setattr(client, "FRESH_S", 0)
    with running_agent(certs_dir, port=port), closing(asked):
        assert asked.call("node.ping", {}, deadline_s=30) == {}
    with pytest.raises(Unreachable):
        asked.call("node.ping", {}, deadline_s=30)


def test_a_request_too_large_is_not_even_sent(agent: Agent) -> None:
    with pytest.raises(InvalidInput) as caught:
        call(agent, "instance.info", ref="x" * MAX_FRAME)
    assert caught.value.code == "agent.frame_too_large"


def test_unfinished_requests_cannot_fill_the_memory(agent: Agent) -> None:
    connection = agent.connect(coordinator(agent.ca))
    quic = connection._quic
    for _ in range(8):
        stream = quic.get_next_available_stream_id()
        quic.send_stream_data(stream, MAX_FRAME.to_bytes(4, "big") + b"x" * (MAX_FRAME - 1))
    with closing(connection), pytest.raises(Unreachable) as caught:
        list(connection.request(encode({"id": "1", "method": "pool.list", "params": {}})))
    assert "too many unfinished requests" in caught.value.message


def test_the_deadline_ends_a_call(agent: Agent) -> None:
    with pytest.raises(TimedOut) as caught:
        agent.agents.call(agent.address, "pool.list", {}, deadline_s=0.3)
    assert caught.value.code == "agent.timeout"


def test_nobody_there_is_known_at_once(agent: Agent) -> None:
    with pytest.raises(Unreachable) as caught:
        agent.agents.call(f"127.0.0.1:{free_udp_port()}", "node.ping", {}, deadline_s=600)
    assert caught.value.code == "agent.unreachable"
    assert "refused" in caught.value.message  # told by the network, not by a clock


@pytest.mark.parametrize("address", ["", "localhost", "127.0.0.1:", "127.0.0.1:0", "127.0.0.1:65536", ":4433", "a:b"])
def test_an_address_is_host_and_port(agent: Agent, address: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        agent.agents.call(address, "node.ping", {}, deadline_s=30)
    assert caught.value.code == "agent.invalid_address"


def test_closing_a_stream_ends_its_generator(agent: Agent) -> None:
    stream = agent.agents.stream(agent.address, "instance.logs", {"ref": REF, "follow": True}, deadline_s=None)
    assert next(stream) == {"text": "line\n"}
    assert not agent.node.log_closed.is_set()
    stream.close()
    assert agent.node.log_closed.wait(60)


def test_much_text_arrives_whole(agent: Agent) -> None:
    agent.node.log_text = "x" * 50_000
    agent.node.gate.set()  # it writes as fast as it can
    stream = agent.agents.stream(agent.address, "instance.logs", {"ref": REF, "follow": True}, deadline_s=None)
    taken = [next(stream) for _ in range(200)]
    assert sum(len(part["text"]) for part in taken) == 200 * 50_000
    stream.close()
    assert agent.node.log_closed.wait(60)


class FullOutlet:
    """A stream whose reader takes nothing."""

    def __init__(self) -> None:
        self.waiting = 0

    def write(self, data: bytes, *, end: bool) -> None:
        self.waiting += len(data)

    def unsent(self) -> int:
        return self.waiting


def test_a_reader_that_is_slow_holds_the_writer_back() -> None:
    async def scene() -> None:
        outlet = FullOutlet()
        reply = Reply(asyncio.get_running_loop(), outlet, lambda _: None)
        frame = b"x" * (UNSENT - 1)
        assert await asyncio.to_thread(reply.send, frame)
        second = asyncio.create_task(asyncio.to_thread(reply.send, frame))
        while outlet.waiting < 2 * len(frame):
            await asyncio.sleep(0)
        reply.check_room()
        assert not second.done()
        outlet.waiting = 0
        reply.check_room()
        assert await second
        third = asyncio.create_task(asyncio.to_thread(reply.send, frame + b"xx"))
        while not outlet.waiting:
            await asyncio.sleep(0)
        reply.cancel()
        assert not await third
        assert not await asyncio.to_thread(reply.send, b"")

    asyncio.run(scene())


def test_a_stream_ends_with_an_error_when_the_agent_stops(tmp_path: Path) -> None:
    with running_agent(make_certs(tmp_path)) as agent:
        stream = agent.agents.stream(agent.address, "instance.logs", {"ref": REF, "follow": True}, deadline_s=30)
        next(stream)
    with pytest.raises(Unreachable) as caught:
        list(stream)
    assert caught.value.code in {"agent.stopping", "agent.unreachable"}
    assert agent.node.log_closed.is_set()


def test_a_request_at_work_is_finished_when_the_agent_stops(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        with running_agent(make_certs(tmp_path)) as agent:
            answer = pool.submit(call, agent, "pool.list")
            until(lambda: agent.node.calls == ["pools"], 60, "the request is at work")
            threading.Timer(0.2, agent.node.gate.set).start()
        assert answer.result(60) == {"items": []}


def test_twenty_clients_at_once(agent: Agent) -> None:
    agent.node.many = 500
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: call(agent, "instance.list"), range(60)))
    assert all(len(answer["items"]) == 500 for answer in answers)


def follow(agent: Agent, ref: str) -> Iterator[dict[str, Any]]:
    stream = agent.agents.stream(agent.address, "instance.logs", {"ref": ref, "follow": True}, deadline_s=120)
    assert next(stream) == {"text": "line\n"}
    return stream


def test_who_follows_too_much_is_told_and_nobody_else_is_affected(agent: Agent) -> None:
    streams = [follow(agent, REF) for _ in range(STREAMS.share or 0)]
    with pytest.raises(QuotaExceeded) as caught:
        follow(agent, REF)
    assert caught.value.code == "agent.share_used"
    assert caught.value.fields["tenant"] == "acme"
    streams.append(follow(agent, "other/web/i-00000001"))
    assert call(agent, "node.info") == {"node_id": "node-a"}
    assert call(agent, "instance.wake", ref=REF, actor="test") == {"ref": REF}
    assert list(agent.agents.stream(agent.address, "instance.exec", EXEC, deadline_s=30))[-1]["exit_code"] == 3
    for stream in streams:
        stream.close()  # type: ignore[attr-defined]
    until(lambda: _follows(agent), 60, "there is room again")


def test_a_wake_never_waits_for_commands_without_end(agent: Agent) -> None:
    """As many as the agent once had threads for all that may last: wakes, of whatever tenant, were refused then."""
    endless = [command(agent) for _ in range(32)]
    for ref in (REF, "other/web/i-00000001"):
        assert call(agent, "instance.wake", ref=ref, actor="test") == {"ref": ref}
    assert call(agent, "node.info") == {"node_id": "node-a"}
    for stream in endless:
        stream.close()  # type: ignore[attr-defined]


def command(agent: Agent) -> Iterator[dict[str, Any]]:
    stream = agent.agents.stream(agent.address, "instance.exec", LASTING, deadline_s=120)
    next(stream)
    return stream


def _follows(agent: Agent) -> bool:
    try:
        follow(agent, REF).close()  # type: ignore[attr-defined]
    except QuotaExceeded:
        return False
    return True


def test_a_command_ends_with_its_client_however_that_goes(agent: Agent) -> None:
    agent.node.gate.clear()
    for leave in (leave_politely, leave_killed):
        agent.node.command_begun.clear()
        agent.node.command_ended.clear()
        with leave(agent):
            assert agent.node.command_begun.wait(60)
            assert not agent.node.command_ended.wait(1), "it runs while its client lives"
        assert agent.node.command_ended.wait(10), leave.__name__


@contextmanager
def leave_politely(agent: Agent) -> Iterator[None]:
    stream = command(agent)
    yield
    stream.close()  # type: ignore[attr-defined]


def test_a_report_ends_with_its_client_however_that_goes(agent: Agent) -> None:
    agent.node.gate.clear()
    asked: dict[str, Any] = {"active": True}
    with pytest.raises(TimedOut):
        agent.agents.call(agent.address, "net.verify", asked, deadline_s=1)
    assert agent.node.report_ended.wait(10), "its client waits no longer"
    agent.node.report_begun.clear()
    agent.node.report_ended.clear()
    with leave_killed(agent, "net.verify", asked):
        assert agent.node.report_begun.wait(60)
        assert not agent.node.report_ended.wait(1), "it goes on while its client lives"
    assert agent.node.report_ended.wait(10), "its client was killed"


@contextmanager
def leave_killed(agent: Agent, method: str = "instance.exec", params: dict[str, Any] = LASTING) -> Iterator[None]:
    """By a process that says nothing when it ends."""
    script = (
        "import sys; from pathlib import Path; from mvm.drivers.quic.client import QuicAgents\n"
        f"stream = QuicAgents(Path({str(agent.certs_dir)!r})).stream({agent.address!r}, {method!r}, {params!r},"
        " deadline_s=120)\nlist(stream)"
    )
    with subprocess.Popen([sys.executable, "-c", script]) as client:
        yield
        client.kill()


@given(st.lists(st.dictionaries(st.text(), st.integers() | st.text() | st.booleans()), max_size=4), st.data())
def test_frames_survive_any_cutting(messages: list[dict[str, Any]], data: st.DataObject) -> None:
    stream = b"".join(encode(message) for message in messages)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=5)))
    reader, found = FrameReader(), []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        found += reader.feed(stream[start:end])
    assert found == messages
    assert reader.pending == 0


def test_parts_join_by_kind() -> None:
    assert frames.join([{"a": [1], "s": "x"}, {"a": [2], "s": "y"}, {"n": 1}]) == {"a": [1, 2], "s": "xy", "n": 1}
    with pytest.raises(Failed):
        frames.join([])
