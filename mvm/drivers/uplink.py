"""Whether pools that reach outside have an interface to do so."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

from mvm.domain.desired import parse
from mvm.domain.egress import Egress
from mvm.domain.ids import PoolRef
from mvm.drivers import netns, store_glance
from mvm.settings import Settings

_SEE = "see docs/operations.md, Network"


def lacking(settings: Settings) -> str | None:
    """What is wrong with the uplink that some pool of this node, or of its desired state, needs; None: nothing is.

    Raises `MvmError` when it cannot be looked at: of the store, of the document, of the namespace.
    """
    pools = sorted(set(_reaching_out(settings)))
    if not pools:
        return None
    who = f"{pools[0]}{f' and {len(pools) - 1} more' if len(pools) > 1 else ''}"
    if not settings.uplink:
        return f"{who} would reach outside, and there is no uplink: set MVM_UPLINK; {_SEE}"
    missing = _missing(settings)
    return f"{who} would reach outside, and the uplink {settings.uplink} {missing}; {_SEE}" if missing else None


def _reaching_out(settings: Settings) -> Iterator[PoolRef]:
    database = settings.layout.database
    document = store_glance.desired(database)
    asked = parse(document).tenants if document is not None else ()
    yield from (pool.ref for pool in store_glance.pools(database) if pool.egress.kind is not Egress.NONE)
    yield from (p.ref for tenant in asked for p in tenant.pools if p.egress.kind is not Egress.NONE)


def _missing(settings: Settings) -> str | None:
    with netns.entered(netns.path_of(settings.namespace)) if settings.namespace else nullcontext():
        try:
            socket.if_nametoindex(settings.uplink)
        except OSError:
            return f"is not in network namespace {settings.namespace or 'of the host'}"
        routes = [line.split() for line in Path("/proc/thread-self/net/route").read_text().splitlines()[1:]]
    out = any(route[0] == settings.uplink and route[1] == "00000000" for route in routes)
    return None if out else "has no default route"
