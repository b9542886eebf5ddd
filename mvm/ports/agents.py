"""Asking a node's agent directly, past every queue."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol


class ConnectedAgent(Protocol):
    """One agent over one connection, used by one thread."""

    def call(self, method: str, params: Mapping[str, Any], *, deadline_s: float) -> dict[str, Any]:
        """As `NodeAgents.call`. A connection that was lost meanwhile is made anew."""
        ...


class NodeAgents(Protocol):
    """Requests over QUIC with mutual TLS.

    Raises the agent's own `MvmError` when it refuses, `Unreachable` (``agent.unreachable``) when nobody answers
    at `address` (``[NODE@]HOST:PORT``), `Forbidden` (``agent.refused``) when either side rejects the other's
    certificate or (``agent.other_node``) another node answers than was meant, which then learns nothing, and
    `TimedOut` (``agent.timeout``) past the deadline, in seconds.
    """

    def call(self, address: str, method: str, params: Mapping[str, Any], *, deadline_s: float) -> dict[str, Any]:
        """One request, one answer."""
        ...

    def connected(self, address: str) -> AbstractContextManager[ConnectedAgent]:
        """For several requests: shaking hands takes longer than most of them. Connects with the first."""
        ...

    def stream(
        self, address: str, method: str, params: Mapping[str, Any], *, deadline_s: float | None
    ) -> Iterator[dict[str, Any]]:
        """One request, answers as they come until the agent ends the stream. Closing the iterator cancels it."""
        ...
