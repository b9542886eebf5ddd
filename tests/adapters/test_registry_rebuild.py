"""What a node puts back into its registry when a part of that was lost."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from mvm.domain.job import JobState, JobVerb
from mvm.domain.layout import StateLayout
from mvm.domain.tenant import Quota
from mvm.drivers import redis_files
from mvm.drivers.redis_registry import RedisRegistry
from mvm.drivers.registry_rebuild import rebuild
from mvm.drivers.shell import LocalShell
from mvm.drivers.sqlite_store import SqliteStore
from tests.support import make

pytestmark = pytest.mark.redis
SHELL = LocalShell()


def test_what_is_the_nodes_comes_back_and_what_ended_does_not(tmp_path: Path) -> None:
    """The registry is of a moment in which one tenant was not yet destroyed, and one job not yet done."""
    layout = StateLayout(tmp_path)
    layout.redis.mkdir()
    gone, bulk = make.job(), make.bulk(2)[0]
    done = make.ended(gone)
    unknown = make.job(verb=JobVerb.INSTANCE_STOP, state=JobState.RUNNING)
    with redis_files.served(layout.redis, SHELL) as link:
        registry = RedisRegistry(link)
        stale = registry.reserve_tenant(make.ACME, None, None, Quota(), make.START)
        registry.record([gone])
        registry.record([bulk])
    kept = stale.__class__("bolt", stale.network, Quota(max_running=3), make.START)  # type: ignore[arg-type]
    with closing(SqliteStore(layout.database)) as store:
        store.put_tenant(kept)
        store.put_job(done)
        store.put_job(unknown)
    assert rebuild(layout, make.NODE, SHELL) == 2
    with redis_files.served(layout.redis, SHELL) as link:
        registry = RedisRegistry(link)
        assert registry.tenant(make.ACME) is None
        assert registry.tenant(kept.id) == kept
        found = {job.job_id: job.state for job in registry.jobs()}
        assert found == {
            done.job_id: JobState.SUCCEEDED,
            unknown.job_id: JobState.RUNNING,
            bulk.job_id: JobState.FAILED,
        }
        lost = registry.job(bulk.job_id)
        assert lost is not None
        assert (lost.error or {})["code"] == "registry.lost"
        assert [job.job_id for job in registry.open_jobs(make.NODE)] == [unknown.job_id]
        assert link.command("SISMEMBER", "mvm:net_ids", kept.network.net_id) == 1
