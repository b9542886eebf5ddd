"""Whether pools that reach outside have an interface to do so, in a namespace of the test's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mvm.domain.desired import DesiredPool
from mvm.domain.egress import Egress, EgressPolicy
from mvm.domain.tenant import Quota, Tenant
from mvm.drivers.shell import LocalShell
from mvm.drivers.sqlite_store import SqliteStore
from mvm.drivers.uplink import lacking
from mvm.settings import Settings
from tests.support.fleet_model import observed_pool
from tests.support.fleets import SOURCES, network
from tests.support.make import ACME, START, WEB
from tests.support.namespace import own_namespace

pytestmark = pytest.mark.root


def test_a_missing_uplink_is_told_when_a_pool_needs_it(tmp_path: Path) -> None:
    settings = Settings(state_dir=tmp_path, node_id="n1", netns="host")
    store = SqliteStore(settings.layout.database)
    pool = observed_pool(DesiredPool(WEB, SOURCES[0]))
    store.put_tenant(Tenant(ACME, network(1), Quota(), START))
    store.put_pool(pool)
    assert lacking(settings) is None, "nobody reaches out"
    store.put_pool(replace(pool, egress=EgressPolicy(Egress.NAT)))
    assert "acme/web would reach outside, and there is no uplink: set MVM_UPLINK" in str(lacking(settings))
    shell = LocalShell()
    with own_namespace() as name:
        there = settings.model_copy(update={"uplink": "up0", "netns": name})
        assert f"the uplink up0 is not in network namespace {name}" in str(lacking(there))
        shell.run(["ip", "link", "add", "up0", "type", "veth", "peer", "name", "far0"])
        shell.run(["ip", "addr", "add", "198.51.100.1/30", "dev", "up0"])
        shell.run(["ip", "link", "set", "up0", "up"])
        shell.run(["ip", "link", "set", "far0", "up"])
        assert "has no default route" in str(lacking(there))
        shell.run(["ip", "route", "add", "default", "via", "198.51.100.2"])
        assert lacking(there) is None
    store.close()
