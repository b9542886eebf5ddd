"""What a node puts back into its private registry when a part of that was lost."""

from __future__ import annotations

from contextlib import closing
from datetime import UTC, datetime

from mvm.domain.ids import NodeId
from mvm.domain.job import JobState, JobVerb
from mvm.domain.layout import StateLayout
from mvm.drivers import redis_files
from mvm.drivers.redis_registry import RedisRegistry
from mvm.drivers.sqlite_store import SqliteStore
from mvm.errors import Failed
from mvm.ports.shell import Shell


def rebuild(layout: StateLayout, node: NodeId, shell: Shell) -> int:
    """Tenants, placements and jobs are as the node's store has them; no net id is forgotten. Returns how many jobs.

    For a registry that this node alone uses, whose Redis does not run. What ended in the part that was lost would else
    stay for ever: tenants that were destroyed, jobs that are done. Bulk jobs are the registry's own: one that had not
    ended cannot be followed any more, and has failed.
    """
    if not layout.database.exists():
        return 0
    with closing(SqliteStore(layout.database)) as store, redis_files.served(layout.redis, shell) as link:
        registry = RedisRegistry(link)
        link.command("DEL", "mvm:tenants", "mvm:pools", f"mvm:open:{node}")
        registry.restore(store.tenants(), {p.ref: p.node_id for p in store.pools()}, store.given_net_ids())
        jobs = [job for job in store.jobs() if not job.verb.is_sweep]
        registry.put_back(jobs)
        for job in registry.jobs(limit=len(jobs) + 10_000):
            if job.verb is JobVerb.BULK and not job.state.final:
                error = Failed("registry.lost", "a part of the registry was lost while it was under way",
                               hint="its children are: mvm job list --subject " + job.subject)  # fmt: skip
                registry.update(job.with_(state=JobState.FAILED, error=error.to_dict(), finished_at=datetime.now(UTC)))
    return len(jobs)
