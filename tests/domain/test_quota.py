from __future__ import annotations

from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvm.domain.tenant import Limit, Quota, check_quota
from mvm.errors import InvalidInput, QuotaExceeded
from tests.support.make import ACME

FLAGS = {
    "max_vcpus": "--max-vcpus", "max_mem_mib": "--max-mem", "max_running": "--max-running", "max_warm": "--max-warm",
    "max_pools": "--max-pools", "max_instances_per_pool": "--max-instances-per-pool", "max_disk_gib": "--max-disk",
}  # fmt: skip
amounts = st.integers(0, 50)
limits = st.lists(st.builds(Limit, st.sampled_from(sorted(FLAGS)), amounts, amounts, amounts), max_size=7)


@given(limits)
def test_the_first_limit_that_would_be_passed_is_named(checked: list[Limit]) -> None:
    passed = [limit for limit in checked if limit.used + limit.wanted > limit.limit]
    if not passed:
        check_quota(ACME, checked)
        return
    with pytest.raises(QuotaExceeded) as refused:
        check_quota(ACME, checked)
    error, first = refused.value, passed[0]
    assert error.code == "quota.exceeded"
    assert error.fields == {"field": first.name, "limit": first.limit, "used": first.used, "wanted": first.wanted}
    assert f"mvm tenant update acme {FLAGS[first.name]} N" in error.hint


def test_a_limit_can_be_used_up_but_not_passed() -> None:
    check_quota(ACME, [Limit("max_running", 3, 1, 4)])
    with pytest.raises(QuotaExceeded):
        check_quota(ACME, [Limit("max_running", 3, 2, 4)])


def test_every_limit_has_its_flag() -> None:
    assert {field.name for field in fields(Quota)} == FLAGS.keys()


@pytest.mark.parametrize("name", sorted(FLAGS))
@given(value=st.integers(-(10**7), 10**7))
def test_a_quota_is_0_to_a_million(name: str, value: int) -> None:
    if 0 <= value <= 1_000_000:
        assert getattr(Quota(**{name: value}), name) == value
    else:
        with pytest.raises(InvalidInput) as refused:
            Quota(**{name: value})
        assert refused.value.code == "tenant.invalid_quota"
        assert refused.value.fields["field"] == name
