"""Which migrations are due."""

import pytest

from mvm.domain.layout import STATE_VERSION
from mvm.domain.migration import Migration, due, refuse_newer, settings_of
from mvm.errors import NotAllowed

SECOND = Migration(2, "b", list[int].clear)
THIRD = Migration(3, "c", list[int].clear)
FIFTH = Migration(5, "e", list[int].clear)
ALL = (FIFTH, SECOND, THIRD)


@pytest.mark.parametrize(
    ("found", "newest", "expected"),
    [(1, 5, (SECOND, THIRD, FIFTH)), (2, 5, (THIRD, FIFTH)), (3, 4, ()), (5, 5, ()), (0, 2, (SECOND,))],
)
def test_each_version_between_is_gone_through_in_order(
    found: int, newest: int, expected: tuple[Migration[list[int]], ...]
) -> None:
    assert due(ALL, found, newest=newest) == expected


@pytest.mark.parametrize("found", [STATE_VERSION + 1, 99, -1, "7a", ""])
def test_what_a_newer_mvm_wrote_is_refused(found: int | str) -> None:
    with pytest.raises(NotAllowed) as caught:
        refuse_newer("it", found)
    assert caught.value.code == "state.version"
    assert "newer" in caught.value.hint


def test_saved_settings_that_are_gone_are_left_out() -> None:
    assert settings_of({"node_id": "n1", "no_such_thing": 1}, 1, ("node_id", "driver")) == {"node_id": "n1"}
