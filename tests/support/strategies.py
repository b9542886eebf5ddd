"""Hypothesis strategies for domain values."""

from __future__ import annotations

import string
from datetime import UTC, datetime

from hypothesis import strategies as st

from mvm.domain.addressing import CLUSTER, TenantNetwork
from mvm.domain.ids import InstanceId, JobId, NodeId, PoolId, PoolRef, Revision, TenantId
from mvm.domain.instance import InFlight, Instance, ProcessIdentity
from mvm.domain.job import Job, JobState, JobVerb, Lane, Progress, Reason
from mvm.domain.lifecycle import Status, Verb

HEX = "0123456789abcdef"


def hexes(length: int) -> st.SearchStrategy[str]:
    return st.text(HEX, min_size=length, max_size=length)


@st.composite
def slugs(draw: st.DrawFn) -> str:
    """Words of letters and digits joined by single hyphens, at most 32 characters, a letter first."""
    words = draw(st.lists(st.text(string.ascii_lowercase + string.digits, min_size=1, max_size=6), max_size=4))
    return "-".join([draw(st.sampled_from(string.ascii_lowercase)), *words])[:32].rstrip("-")


times = st.datetimes(datetime(2020, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC))
node_ids = st.builds(NodeId, slugs())
pool_refs = st.builds(PoolRef, st.builds(TenantId, slugs()), st.builds(PoolId, slugs()))
instance_ids = st.builds(lambda h: InstanceId(f"i-{h}"), hexes(8))
instance_refs = st.builds(lambda pool, i: pool.instance(i), pool_refs, instance_ids)
job_ids = st.builds(lambda ms, raw: JobId.make(ms, raw), st.integers(0, 2**48 - 1), st.binary(min_size=5, max_size=5))
revisions = st.builds(Revision, hexes(64))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
json_objects = st.dictionaries(st.text(max_size=8), json_values, max_size=4)
counts = st.integers(0, 100)

jobs = st.builds(
    Job, job_ids, st.sampled_from(JobVerb), st.text(max_size=20), node_ids, st.text(max_size=8),
    st.sampled_from(Reason), times, json_objects, st.sampled_from(Lane), st.sampled_from(JobState),
    st.none() | st.text(max_size=8), st.builds(Progress, counts, counts, counts), st.none() | json_objects,
    st.none() | json_objects, st.none() | job_ids, st.none() | times, st.none() | times,
)  # fmt: skip

in_flights = st.builds(InFlight, job_ids, st.sampled_from(Verb))


@st.composite
def networks(draw: st.DrawFn) -> TenantNetwork:
    """Any network a tenant can have."""
    prefix = draw(st.integers(16, 29))
    at = draw(st.integers(0, (1 << (prefix - CLUSTER.prefixlen)) - 1))
    address = int(CLUSTER.network_address) + (at << (32 - prefix))
    return TenantNetwork(draw(st.integers(0, 4095)), type(CLUSTER)((address, prefix)))


instances = st.builds(
    Instance, instance_refs, node_ids, st.integers(3, 65534), st.sampled_from(Status), times, st.integers(0, 99),
    st.none() | revisions, st.booleans(),
    st.none() | st.builds(ProcessIdentity, st.integers(1, 2**22), st.integers(0, 2**60)),
    st.none() | in_flights, st.none() | st.text(max_size=20), st.none() | times, st.none() | times,
)  # fmt: skip
