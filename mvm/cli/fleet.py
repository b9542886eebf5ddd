"""What commands reach: the running stack's jobs and registry, and the nodes' agents. Opened when first used."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mvm.cli.errors import show_error
from mvm.domain.ids import NodeId, PoolRef, TenantId
from mvm.domain.layout import DEFAULT_STATE_DIR, StateLayout
from mvm.domain.migration import refuse_newer
from mvm.domain.refusals import not_found
from mvm.errors import Forbidden, MvmError, NotFound, TimedOut, Unreachable

if TYPE_CHECKING:
    from mvm.ports.agents import NodeAgents
    from mvm.ports.registry import Registry
    from mvm.services.jobs import Jobs
    from mvm.wiring import Client

READ_S = 10.0  # for an agent's answer


class Gathered(NamedTuple):
    """What the agents that answered said, and the errors of the others."""

    items: list[dict[str, Any]]
    errors: list[MvmError]


class Fleet:
    """The stack that runs over one state directory. `client` is given by tests."""

    def __init__(self, state_dir: str | None = None, client: Client | None = None) -> None:
        self.layout = StateLayout(Path(state_dir or DEFAULT_STATE_DIR).absolute())
        self._given = client

    @cached_property
    def _client(self) -> Client:
        from mvm.wiring import open_client

        return self._given or open_client(self._read_connection(), self.layout)

    def _read_connection(self) -> Mapping[str, Any]:
        try:
            connection = json.loads(self.layout.connection.read_text())
        except (FileNotFoundError, NotADirectoryError):
            raise self._down("is not up") from None
        except PermissionError:
            raise no_permission(self.layout.root) from None
        except (OSError, ValueError):
            raise self._down("left a damaged connection file") from None
        if not isinstance(connection, dict) or "node_id" not in connection:
            raise self._down("left a damaged connection file")
        refuse_newer("the running stack", connection.get("version", 1))
        return connection

    def _down(self, what: str) -> Unreachable:
        return Unreachable("stack.down", f"the stack of {self.layout.root} {what}", hint="start it: mvm up --detach")

    @property
    def jobs(self) -> Jobs:
        """Submitting and following jobs."""
        return self._client.jobs

    @property
    def registry(self) -> Registry:
        """Who exists, and where."""
        return self._client.registry

    @property
    def agents(self) -> NodeAgents:
        """The nodes' agents."""
        return self._client.agents

    @cached_property
    def distant_agents(self) -> NodeAgents:
        """Agents by address, with this state directory's certificates; no stack need run here."""
        from mvm.wiring import open_client

        if self._given is None and not self.layout.connection.exists():
            return open_client({}, self.layout).agents
        return self.agents

    @property
    def node_id(self) -> NodeId:
        """The node of this machine."""
        return self._client.node_id

    @property
    def netns(self) -> str | None:
        """The network namespace of the guests; None for the caller's own."""
        return self._client.connection.get("netns") or None

    @property
    def addresses(self) -> Sequence[str]:
        """The agents that know this fleet's instances."""
        return (self._client.connection["agent_address"],)

    # --- routes
    def tenant_route(self, tenant: TenantId) -> NodeId:
        """The node for jobs of an existing tenant; raises `NotFound`."""
        if self.registry.tenant(tenant) is None:
            raise not_found("tenant", tenant)
        return self.node_id

    def pool_route(self, pool: PoolRef) -> NodeId:
        """The node that has the pool; raises `NotFound`, also when it is the tenant that does not exist."""
        node = self.registry.pool_node(pool)
        if node is None:
            self.tenant_route(pool.tenant)
            raise not_found("pool", pool)
        return node

    # --- questions to agents
    def call(self, address: str, method: str, **params: Any) -> dict[str, Any]:
        """One agent's answer; what is None is left out."""
        return ask(self.agents, address, method, **params)

    def rows(self, method: str, **params: Any) -> Gathered:
        """The lists of every agent put together; see `gather`."""
        answers, errors = gather(self.agents, self.addresses, method, **params)
        return Gathered([row for answer in answers for row in answer["items"]], errors)

    def one(self, what: str, name: object, key: str, method: str, **params: Any) -> dict[str, Any]:
        """The row whose `key` is `name`; raises `NotFound`, or what kept an agent from answering."""
        rows, errors = self.rows(method, **params)
        for row in rows:
            if row[key] == str(name):
                return row
        raise errors[0] if errors else not_found(what, name)


def ask(agents: NodeAgents, address: str, method: str, **params: Any) -> dict[str, Any]:
    """One agent's answer; parameters that are None are left out."""
    given = {name: value for name, value in params.items() if value is not None}
    return agents.call(address, method, given, deadline_s=READ_S)


def gather(agents: NodeAgents, addresses: Sequence[str], method: str, **params: Any) -> Gathered:
    """The answers of those agents that answer, and for each other an error that names its node.

    What one agent does not know another may: `NotFound` is raised when nobody knows it. When no agent answers,
    the last one's error is raised and the others are shown.
    """
    answers: list[dict[str, Any]] = []
    errors: list[MvmError] = []
    unknown: list[MvmError] = []
    for address in addresses:
        try:
            answers.append(ask(agents, address, method, **params))
        except NotFound as error:
            unknown.append(error)
        except (Unreachable, TimedOut, Forbidden) as error:
            errors.append(named(error, address))
    if answers:
        return Gathered(answers, errors)
    *others, last = [*unknown[:1], *errors]
    for other in others:
        show_error(other)
    raise last


def named(error: MvmError, address: str) -> MvmError:
    """`error`, with the address of the node that it is about."""
    if address not in error.message:
        error.message = f"node {address}: {error.message}"
    error.fields.setdefault("node", address)
    return error


def no_permission(path: object) -> Forbidden:
    """The state directory is another user's."""
    return Forbidden(
        "permission.denied", f"{path} may not be read by this user", hint="run it as root, for example with sudo",
        path=str(path),
    )  # fmt: skip
