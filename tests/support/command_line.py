"""The command line over a node in memory: no processes, no sockets; jobs run when somebody follows them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result
from structlog.testing import capture_logs

from mvm.agent.methods import accept, method_table
from mvm.cli.fleet import Fleet
from mvm.cli.main import cli
from mvm.domain.ids import JobId, NodeId
from mvm.domain.job import Job
from mvm.drivers.quic.frames import join
from mvm.drivers.quic.identity import Peer, Role
from mvm.errors import Forbidden, Unreachable
from mvm.ports.agents import NodeAgents
from mvm.ports.clock import Clock
from mvm.ports.queue import JobQueue
from mvm.ports.registry import Registry
from mvm.services.jobs import Jobs
from mvm.services.views import NodeView

ADDRESS = "127.0.0.1:4433"
DEAD = "127.0.0.1:4999"
_COORDINATOR = Peer(Role.COORDINATOR, "", datetime.now(UTC) + timedelta(days=1))


@dataclass
class LocalAgent:
    """One of `LocalAgents`, asked again and again."""

    agents: LocalAgents
    address: str

    def call(self, method: str, params: Mapping[str, Any], *, deadline_s: float) -> dict[str, Any]:
        return self.agents.call(self.address, method, params, deadline_s=deadline_s)


class LocalAgents:
    """Agents by address, called directly through the agent's own table, with JSON in between as on the wire."""

    def __init__(self, nodes: Mapping[str, NodeView]) -> None:
        self.nodes = dict(nodes)

    def call(self, address: str, method: str, params: Mapping[str, Any], *, deadline_s: float) -> dict[str, Any]:
        return join(list(self.stream(address, method, params, deadline_s=deadline_s)))

    def connected(self, address: str) -> AbstractContextManager[LocalAgent]:
        return nullcontext(LocalAgent(self, address))

    def stream(
        self, address: str, method: str, params: Mapping[str, Any], *, deadline_s: float | None
    ) -> Iterator[dict[str, Any]]:
        meant, _, address = address.rpartition("@")
        if address not in self.nodes:
            raise Unreachable("agent.unreachable", f"no agent answers at {address}", hint="is its stack up?")
        node = str(self.nodes[address].node_info()["node_id"])
        if meant not in ("", node):
            raise Forbidden("agent.other_node", f"node {node} answers at {address}, and node {meant} was meant")
        message = json.loads(json.dumps({"id": "1", "method": method, "params": dict(params)}))
        for part in accept(method_table(self.nodes[address]), _COORDINATOR, message).run(lambda: None):
            if part is not None:
                yield json.loads(json.dumps(part))


class WorkedJobs(Jobs):
    """Jobs that a worker does as soon as somebody follows them; `work` is that worker."""

    def __init__(self, registry: Registry, queue: JobQueue, clock: Clock, work: Callable[[], object]) -> None:
        super().__init__(registry, queue, clock)
        self.work = work

    def follow(self, job_ids: Sequence[JobId], *, deadline_s: float | None = None) -> Iterator[Job]:
        with capture_logs():  # a worker's log is no output of the command
            self.work()
        return super().follow(job_ids, deadline_s=deadline_s)


@dataclass
class MemoryClient:
    """As `mvm.wiring.Client`."""

    registry: Registry
    jobs: WorkedJobs
    agents: NodeAgents
    node_id: NodeId
    connection: dict[str, Any] = field(default_factory=lambda: {"agent_address": ADDRESS, "netns": "mvm-test"})


class ManyNodes(Fleet):
    """A fleet with agents at several addresses."""

    addresses: Sequence[str] = (ADDRESS,)  # type: ignore[assignment]


class CommandLine:
    """Runs ``mvm`` with words and keeps no state between runs but the node's."""

    def __init__(self, state_dir: Path, client: MemoryClient) -> None:
        self.client = client
        self.fleet = ManyNodes(str(state_dir), client)  # type: ignore[arg-type]

    def __call__(self, *words: str, stdin: str | None = None) -> Result:
        umask = os.umask(0o022)  # some commands narrow theirs, as processes of their own may
        try:
            result = CliRunner().invoke(cli, list(words), obj=self.fleet, prog_name="mvm", input=stdin)
        finally:
            os.umask(umask)
        assert "Traceback" not in result.output, result.output
        return result

    def ok(self, *words: str) -> str:
        """What a run that must succeed prints on stdout."""
        result = self(*words)
        assert result.exit_code == 0, result.output
        return result.stdout

    def json(self, *words: str) -> Any:
        """As `ok`, with ``-o json``, parsed."""
        before, dashes, after = _split(words)
        return json.loads(self.ok(*before, "-o", "json", *dashes, *after))

    def fails(self, exit_code: int, code: str, *words: str) -> Result:
        """A run that must end so; checked on stderr, and as JSON on stdout."""
        before, dashes, after = _split(words)
        result = self(*before, "-o", "json", *dashes, *after)
        assert result.exit_code == exit_code, result.output
        error = json.loads(result.stdout)["error"]
        assert error["code"] == code, error
        assert set(error) >= {"code", "message", "hint", "fields"}
        assert f"error[{code}]: " in result.stderr
        return result


def _split(words: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    if "--" not in words:
        return words, (), ()
    at = words.index("--")
    return words[:at], ("--",), words[at + 1 :]
